"""Every setting of a training run, with its presets: the paper's sizes, and one for small data.

The paper (section 4) gives batch, epochs, optimiser, backbones and Dropping. Where it is silent (learning rate,
warm-up, regularisation) the values are ours, and marked so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..runtime.errors import ItuneError
from ..runtime.settings import MOST_BEAMS, Method

METHODS: tuple[Method, ...] = get_args(Method)
METHOD_FIELDS: dict[str, tuple[str, ...]] = {
    "i-tuning": ("bottleneck", "heads", "lambda_", "score_scale", "first_adapter_layer"),
    "clipcap": ("mapper", "prefix_length", "clip_length", "mapper_layers", "mapper_heads", "pooling", "normalize"),
    "smallcap": ("attention_width", "heads"),
}
"""The settings that not every method has."""
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {"smallcap": {"heads": None, "num_beams": 3}, "i-tuning": {"heads": 1}}
"""What a method's authors do otherwise than a preset that was made for another."""
TRANSFORMER_FIELDS = ("clip_length", "mapper_layers", "mapper_heads")
"""Those that ClipCap's MLP mapper does without."""
RETRIEVING: tuple[str, ...] = ("i-tuning", "smallcap")
"""The methods that take captions of a datastore into the prompt."""
DEFAULT_RETRIEVE = 4
DEFAULT_VISION = "openai/clip-vit-base-patch16"


class ConfigError(ItuneError):
    """Settings that contradict each other or lie outside their range."""


@dataclass(frozen=True)
class TrainConfig:
    """A resolved training configuration; the defaults are the paper's base model."""

    preset: str = "base"
    """The preset that the other values started from."""

    method: Method = "i-tuning"
    """How the language model is given the image."""

    language_model: str = "openai-community/gpt2"
    """Hub id or folder of a GPT-2-family checkpoint; frozen."""

    vision: str = DEFAULT_VISION
    """Hub id or folder of a CLIP vision checkpoint, or an ONNX tower; frozen."""

    bottleneck: int | None = None
    """Adapter width r; None is half the language model's width (reproduces the paper's parameter counts)."""

    heads: int | None = 1
    """Attention heads of each adapter (paper: one); None, as of SmallCap, is as many as the language model has."""

    attention_width: int = 16
    """SmallCap: width of a head's queries, keys and values (its paper: 64, 32, 16, 8 or 4)."""

    datastore: str | None = None
    """Folder of the datastore whose captions are retrieved into the prompts; None retrieves nothing."""

    retrieve: int | None = None
    """How many captions are retrieved; None is 4 with a datastore, 0 without."""

    lambda_: float = 1.0
    """The paper's lambda >= 1, the scale of what an adapter retrieves."""

    score_scale: float | None = None
    """Factor on Q K^T; None is 1/sqrt(r / heads) (ours: the literal 1.0 saturates, see the design)."""

    first_adapter_layer: int = 0
    """I-Tuning Dropping: decoder layers below this one carry no adapter and keep no activations."""

    mapper: Literal["transformer", "mlp"] = "transformer"
    """ClipCap: what makes the prefix of an image's embedding (its paper: the transformer where GPT-2 is frozen)."""

    prefix_length: int = 10
    """ClipCap: embeddings that stand before the caption (its paper: 10)."""

    clip_length: int = 10
    """ClipCap: vectors that the image's embedding becomes within the transformer mapper (its paper: 10)."""

    mapper_layers: int = 8
    """ClipCap: layers of the transformer mapper (its paper: 8)."""

    mapper_heads: int = 8
    """ClipCap: attention heads of the transformer mapper (its paper: 8)."""

    pooling: Literal["projected", "cls", "mean"] | None = None
    """ClipCap: which embedding of an image the mapper reads. `projected` is CLIP's embedding in the space that it
    shares with text, as in the paper; `cls` the CLS position; `mean` the mean of all. None is the first that the
    tower has: projected, then cls for a CLIP; mean for an ONNX tower, which need not have a CLS position."""

    normalize: bool = False
    """ClipCap: scale that embedding to length 1 (its code has the option, off by default)."""

    epochs: int = 30
    """Passes over the training photos (paper: 30; 10 for the Visual Genome stage)."""

    batch_size: int = 4096
    """Captions per optimiser step (paper: 4,096), reached by accumulating gradients."""

    images_per_forward: int = 32
    """Images, with all their captions, that go through the model at once; bounds memory, not the result."""

    learning_rate: float = 5e-4
    """Peak learning rate of AdamW (ours)."""

    weight_decay: float = 0.01
    """AdamW's decoupled weight decay on matrices; biases have none (ours)."""

    warmup: float = 0.05
    """Fraction of all steps over which the learning rate rises linearly; a cosine to zero follows (ours)."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""

    dropout: float = 0.0
    """Dropout on what an adapter retrieves."""

    visual_dropout: float = 0.0
    """Fraction of an image's visual embeddings that a training step leaves out."""

    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the training targets."""

    ema_decay: float = 0.0
    """Decay per step of the moving average of the weights that is evaluated and saved; 0 uses the weights."""

    flip: bool = False
    """Mirror half of the training photos (captions that tell left from right are never mirrored)."""

    lower: bool = False
    """Lower-case the captions."""

    strip_period: bool = False
    """Drop a caption's final period."""

    prompt: str = ""
    """Text that stands before every caption, and is not scored."""

    begin: str = "<|endoftext|>"
    """The token that begins all; "" is none, as in checkpoints of SmallCap's authors (no flag: --init-from has it)."""

    end: str = "<|endoftext|>"
    """The token that ends a caption; a text token, such as ".", is none of the caption's."""

    max_caption_tokens: int = 64
    """Longer captions are cut (and then have no end token)."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast of the forward pass; weights and optimiser stay float32."""

    seed: int = 0
    """Seeds initialisation, order, dropout and flips; a resumed run repeats them."""

    num_beams: int = 5
    """Beams of the dev evaluation that chooses the best checkpoint."""

    max_new_tokens: int = 32
    """Longest caption of the dev evaluation, in tokens."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"--method {self.method} does not exist: choose one of {', '.join(METHODS)}")
        for name, low, high in (
            ("epochs", 1, None),
            ("batch_size", 1, None),
            ("images_per_forward", 1, None),
            ("learning_rate", 0.0, None),
            ("weight_decay", 0.0, None),
            ("warmup", 0.0, 1.0),
            ("max_grad_norm", 0.0, None),
            ("dropout", 0.0, 0.99),
            ("visual_dropout", 0.0, 0.99),
            ("label_smoothing", 0.0, 0.99),
            ("ema_decay", 0.0, 0.99999),
            ("attention_width", 1, None),
            ("prefix_length", 1, None),
            ("clip_length", 1, None),
            ("mapper_layers", 1, None),
            ("mapper_heads", 1, None),
            ("max_caption_tokens", 1, None),
            ("num_beams", 1, MOST_BEAMS),
            ("seed", 0, 2**32 - 1),
            ("max_new_tokens", 1, None),
        ):
            value = getattr(self, name)
            if not (value >= low and (high is None or value <= high)):
                limits = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ConfigError(f"{flag(name)} must be {limits}, not {value}")
        for name, low in (("heads", 1), ("bottleneck", 1), ("retrieve", 0)):
            if (value := getattr(self, name)) is not None and value < low:
                raise ConfigError(f"{flag(name)} must be at least {low}, not {value}")
        for name, value in vars(self).items():
            if isinstance(value, int) and value > 2**32:
                raise ConfigError(f"{flag(name)} must be at most {2**32}, not {value}")
        for name in ("lambda_", "score_scale"):  # which the export divides by
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"{flag(name)} must be above 0, not {value}")
        self._check_retrieval()
        for name, choices in (("mapper", ("transformer", "mlp")), ("pooling", (None, "projected", "cls", "mean"))):
            if getattr(self, name) not in choices:
                known = ", ".join(filter(None, choices))
                raise ConfigError(f"{flag(name)} {getattr(self, name)} does not exist: choose one of {known}")
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"--precision must be bf16 or fp32, not {self.precision}")

    def _check_retrieval(self) -> None:
        if self.datastore is None:
            if self.retrieve:
                raise ConfigError(f"--retrieve {self.retrieve} needs the captions to choose from: name a --datastore")
            if self.method == "smallcap" and self.retrieve is None:
                raise ConfigError(
                    "--method smallcap retrieves captions: name a --datastore, or train without by --retrieve 0"
                )
            return
        if self.method not in RETRIEVING:
            raise ConfigError(f"--datastore belongs to --method {' and '.join(RETRIEVING)}, not to {self.method}")
        if self.retrieve == 0:
            raise ConfigError("--retrieve 0 takes nothing from the --datastore: leave one of them out")
        if self.prompt:
            raise ConfigError("--prompt contradicts --datastore: the retrieved captions are the prompt")

    @property
    def retrieved(self) -> int:
        """How many captions are retrieved."""
        if self.datastore is None:
            return 0
        return DEFAULT_RETRIEVE if self.retrieve is None else self.retrieve

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self)


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
    # A preset names no datastore, without which `resolve` takes no --retrieve for granted.
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


def flag(field: str) -> str:
    """The command-line flag of a configuration field."""
    return "--" + field.strip("_").replace("_", "-")


def resolve(preset: str, **overrides: Any) -> TrainConfig:
    """The preset with every override that is not None."""
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset} does not exist: choose one of {', '.join(PRESETS)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    base = PRESETS[preset].to_json()
    method = given.get("method", base["method"])
    if method != base["method"]:
        base |= METHOD_DEFAULTS.get(method, {})
    if "retrieve" not in given:
        base["retrieve"] = None
    config = TrainConfig(**(base | given))
    for other, names in METHOD_FIELDS.items():
        own = METHOD_FIELDS[config.method]
        if odd := next((name for name in names if name in given and name not in own), None):
            raise ConfigError(f"{flag(odd)} belongs to --method {other}, not to {config.method}: leave it out")
    if config.mapper == "mlp" and (odd := next((name for name in TRANSFORMER_FIELDS if name in given), None)):
        raise ConfigError(f"{flag(odd)} belongs to --mapper transformer, not to mlp: leave it out")
    return config


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `TrainConfig.to_json`."""
    known = {field.name for field in fields(TrainConfig)}
    if odd := values.keys() - known:
        raise ConfigError(f"the training configuration has an unknown field {min(odd)}")
    return TrainConfig(**values)
