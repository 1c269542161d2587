"""Every setting of a training run, with its presets: the paper's sizes, and one for small data.

The paper (section 4) gives batch, epochs, optimiser, backbones and Dropping. Where it is silent (learning rate,
warm-up, regularisation) the values are ours, and marked so.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from ..flags import flag, refusal
from ..methods.clipcap.settings import TRANSFORMER_FIELDS, ClipCapSettings
from ..methods.ituning.settings import ITuningSettings
from ..methods.schemas import SETTINGS
from ..methods.settings import Count, NonNegative, Share, Whole
from ..methods.smallcap.settings import SmallCapSettings
from ..runtime.errors import ItuneError
from ..runtime.settings import MOST_BEAMS, Method, Settings

__all__ = ["PRESETS", "ConfigError", "TrainConfig", "flag", "from_json", "resolve"]
DEFAULT_RETRIEVE = 4
_OBJECTIVE_FIELDS = {
    "cross-entropy": ("dropout", "visual_dropout", "label_smoothing"),
    "scst": ("scst_samples",),
}
"""Settings of one objective alone; the others leave them at their defaults."""


class ConfigError(ItuneError):
    """Training settings contradict each other or are out of range."""


class ModelSettings(Settings):
    """What is trained, and on which frozen backbones."""

    model_config = ConfigDict(title="Model")

    method: Method = "i-tuning"
    """How the image enters the language model."""
    language_model: str = "openai-community/gpt2"
    """GPT-2 checkpoint, hub id or folder; frozen."""
    vision: str = "openai/clip-vit-base-patch16"
    """CLIP vision checkpoint, hub id or folder, or folder of an ONNX tower; frozen."""
    datastore: Annotated[str, Field(min_length=1), AfterValidator(os.path.normpath)] | None = None
    """Put captions of similar images from this datastore into the prompt."""
    retrieve: Whole | None = None
    """How many captions to retrieve. Default: 4 with a datastore, else 0."""


class OptimisationSettings(Settings):
    """How the adapters are trained."""

    model_config = ConfigDict(title="Optimisation")

    objective: Literal["cross-entropy", "scst"] = "cross-entropy"
    """Cross-entropy of the captions, or self-critical sequence training (SCST), which raises the CIDEr-D of captions
    that the model draws; it needs `--init-from`."""
    scst_samples: Annotated[int, Field(ge=2, le=MOST_BEAMS)] = 5
    """SCST: captions drawn of each photo; the others are the baseline of each one."""
    epochs: Count = 30
    """Passes over the training photos (paper: 30; 10 for the Visual Genome stage)."""
    batch_size: Count = 4096
    """Captions per optimiser step (paper: 4,096), reached by accumulating gradients."""
    images_per_forward: Count = 32
    """Images per forward pass, with all their captions; limits memory without changing the result."""
    learning_rate: NonNegative = 5e-4
    """Peak learning rate of AdamW (ours)."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of AdamW on matrices; biases have none (ours)."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of the steps over which the learning rate rises linearly; a cosine to zero follows (ours)."""
    max_grad_norm: NonNegative = 1.0
    """Clip gradients to this global norm; 0 does not clip."""
    dropout: Share = 0.0
    """Dropout on the output of the adapters' attention."""
    visual_dropout: Share = 0.0
    """Fraction of an image's visual embeddings that a training step leaves out."""
    label_smoothing: Share = 0.0
    """Weight of the uniform distribution in the training targets."""
    ema_decay: Annotated[float, Field(ge=0, le=0.99999)] = 0.0
    """Decay per step of the moving average of the weights, which is evaluated and saved; 0 is off."""
    flip: bool = False
    """Mirror half of the training photos, except those with a caption that mentions left or right."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast of the forward pass; weights and optimiser stay in float32."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation, order, dropout and flips; a resumed run repeats them."""


class CaptionSettings(Settings):
    """How captions become tokens."""

    model_config = ConfigDict(title="Captions")

    lower: bool = False
    """Lower-case the captions."""
    strip_period: bool = False
    """Drop a caption's final period."""
    prompt: str = ""
    """Text before every caption; it does not count towards the loss."""
    begin: str = "<|endoftext|>"
    """First token of the sequence; "" is none, as in checkpoints of SmallCap's authors (only --init-from sets it)."""
    end: str = "<|endoftext|>"
    """Token that ends a caption; a text token, such as ".", is not part of the caption."""
    max_caption_tokens: Count = 64
    """Cut longer captions, which then have no end token."""


class EvaluationSettings(Settings):
    """How dev photos are captioned to choose the best checkpoint."""

    model_config = ConfigDict(title="Evaluation on the dev split")

    num_beams: Annotated[int, Field(ge=1, le=MOST_BEAMS)] = 5
    """Beams of the dev evaluation."""
    max_new_tokens: Count = 32
    """Longest caption of the dev evaluation, and of SCST's samples, in tokens."""
    patience: Count | None = None
    """Stop after this many evaluations in a row without a better score. Default: train all epochs."""


class TrainConfig(
    ModelSettings,
    ITuningSettings,
    SmallCapSettings,
    ClipCapSettings,
    OptimisationSettings,
    CaptionSettings,
    EvaluationSettings,
):
    """A resolved training configuration; the defaults are the paper's base model."""

    preset: str = "base"
    """The preset that the other values started from."""

    @model_validator(mode="after")
    def _retrieval_is_consistent(self) -> Self:
        method = SETTINGS[self.method]
        wrong = None
        if self.datastore is None:
            if self.retrieve:
                wrong = f"--retrieve {self.retrieve} needs captions to choose from: name a --datastore"
            elif self.method == "smallcap" and self.retrieve is None:
                wrong = "--method smallcap retrieves captions: name a --datastore, or --retrieve 0 to train without"
        elif not method.retrieves:
            wrong = f"--datastore does not go with --method {self.method}: leave it out"
        elif self.retrieve == 0:
            wrong = "--retrieve 0 contradicts --datastore: leave one of them out"
        elif self.prompt:
            wrong = "--prompt contradicts --datastore: the retrieved captions are the prompt"
        if wrong:
            raise ValueError(wrong)
        return self

    @property
    def retrieved(self) -> int:
        """How many captions are retrieved."""
        if self.datastore is None:
            return 0
        return DEFAULT_RETRIEVE if self.retrieve is None else self.retrieve

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return self.model_dump(mode="json")


PRESETS: dict[str, TrainConfig] = {
    "base": TrainConfig(),
    "medium": TrainConfig(preset="medium", language_model="openai-community/gpt2-medium"),
    "large": TrainConfig(preset="large", language_model="openai-community/gpt2-large", images_per_forward=16),
    "large-drop18": TrainConfig(
        preset="large-drop18",
        language_model="openai-community/gpt2-large",
        images_per_forward=16,
        first_adapter_layer=18,
    ),
    # Ramos et al., section 4: AdamW, learning rate 1e-4, batch 64, 10 epochs, CLIP ViT-B/32, captions of 25 tokens.
    # Their code decays no weight; its linear schedule is a cosine here, its dropout within the frozen GPT-2 left out.
    # `retrieve` 0, since a preset has no datastore; `resolve` drops it.
    "smallcap": TrainConfig(
        preset="smallcap",
        method="smallcap",
        heads=None,
        vision="openai/clip-vit-base-patch32",
        epochs=10,
        batch_size=64,
        images_per_forward=16,
        learning_rate=1e-4,
        weight_decay=0.0,
        warmup=0.0,
        dropout=0.1,
        max_caption_tokens=25,
        num_beams=3,
        max_new_tokens=25,
        retrieve=0,
    ),
    # Mokady et al., section 4: AdamW, learning rate 2e-5, 5,000 warm-up steps (of 141,700 on COCO), batch 40,
    # 10 epochs, CLIP ViT-B/32. Their code decays no weight and clips no gradient; its linear schedule is a cosine here.
    "clipcap": TrainConfig(
        preset="clipcap",
        method="clipcap",
        vision="openai/clip-vit-base-patch32",
        epochs=10,
        batch_size=40,
        learning_rate=2e-5,
        weight_decay=0.0,
        warmup=0.035,
        max_grad_norm=0.0,
    ),
    # Ours: continues a captioner that was trained by cross-entropy.
    "scst": TrainConfig(
        preset="scst",
        objective="scst",
        epochs=5,
        batch_size=320,
        images_per_forward=32,
        learning_rate=2e-5,
        weight_decay=0.0,
    ),
    "small-data": TrainConfig(
        preset="small-data",
        lambda_=4.0,
        epochs=12,
        batch_size=320,
        images_per_forward=32,
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup=0.1,
        dropout=0.2,
        visual_dropout=0.2,
        label_smoothing=0.1,
        ema_decay=0.995,
        flip=True,
    ),
}


def resolve(preset: str, **overrides: Any) -> TrainConfig:
    """The preset with every override that is not None."""
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset} does not exist: choose one of {', '.join(PRESETS)}")
    overrides = {name: value for name, value in overrides.items() if value is not None}
    values = PRESETS[preset].to_json()
    method = overrides.get("method", values["method"])
    if method != values["method"] and (settings := SETTINGS.get(method)):
        values |= {name: field.default for name, field in settings.model_fields.items()} | settings.other_defaults
    objective = overrides.get("objective", values["objective"])
    others = [name for other, names in _OBJECTIVE_FIELDS.items() if other != objective for name in names]
    values |= {name: TrainConfig.model_fields[name].default for name in others}
    if "retrieve" not in overrides:
        values["retrieve"] = None
    try:
        config = from_json(values | overrides)
    except ValidationError as error:
        raise ConfigError(refusal(error)) from None
    # The fields that do not apply, with what they belong to.
    foreign = {
        name: f"--method {other}, not to {config.method}"
        for other, settings in SETTINGS.items()
        for name in settings.model_fields
    }
    foreign = {name: owner for name, owner in foreign.items() if name not in SETTINGS[config.method].model_fields}
    if config.mapper == "mlp":
        foreign |= dict.fromkeys(TRANSFORMER_FIELDS, "--mapper transformer, not to mlp")
    foreign |= dict.fromkeys(others, f"another --objective than {objective}")
    if wrong := sorted(overrides.keys() & foreign.keys()):
        raise ConfigError(f"{flag(wrong[0])} belongs to {foreign[wrong[0]]}: leave it out")
    return config


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `TrainConfig.to_json`; raises pydantic's ValidationError."""
    return TrainConfig.model_validate(values)
