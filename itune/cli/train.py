"""itune-train: photos and captions in, an adapter checkpoint out."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoint import CheckpointConfig, find_checkpoint, load_config, resolve_source
from ..runtime.errors import ItuneError
from ..training.config import METHOD_FIELDS, METHODS, PRESETS, TrainConfig, flag, from_json, resolve
from . import common
from .display import TrainingDisplay

if TYPE_CHECKING:
    from ..data.features import Features
    from ..data.records import Record
    from ..training.loop import Trainer

_PRESETS, _METHODS = ", ".join(PRESETS), ", ".join(METHODS)


def train(
    data: Annotated[
        Path,
        typer.Option(help="Captions: Flickr8k/30k token file or its folder, Karpathy JSON, or JSONL."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for best/, last/ and logs.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the photos, if not beside the captions.")] = None,
    dev_data: Annotated[Path | None, typer.Option(help="Captions of the dev split, if in a file of its own.")] = None,
    dev_fraction: Annotated[
        float | None, typer.Option(help="Hold out this fraction of the training photos as dev split.")
    ] = None,
    dev_images: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on the first so many dev photos only.")
    ] = None,
    preset: Annotated[str, typer.Option(help=f"Where the other settings start: {_PRESETS}.")] = "base",
    method: Annotated[str | None, typer.Option(help=f"How the language model is given the image: {_METHODS}.")] = None,
    cache_features: Annotated[
        Path | None, typer.Option(help="Compute visual embeddings once and keep them (fp16) in this folder.")
    ] = None,
    init_from: Annotated[Path | None, typer.Option(help="Start from this checkpoint's adapters.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    language_model: Annotated[str | None, typer.Option(help="GPT-2 checkpoint: hub id or folder.")] = None,
    vision: Annotated[str | None, typer.Option(help="CLIP vision checkpoint or ONNX tower: hub id or folder.")] = None,
    bottleneck: Annotated[int | None, typer.Option(help="Adapter width; default: half the language model's.")] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads of an adapter; default: one, of SmallCap GPT-2's.")
    ] = None,
    lambda_: Annotated[float | None, typer.Option("--lambda", help="Scale of what an adapter adds.")] = None,
    score_scale: Annotated[
        float | None,
        typer.Option(help="Factor on Q K^T; default 1/sqrt(bottleneck / heads); 1 is the paper's."),
    ] = None,
    first_adapter_layer: Annotated[
        int | None, typer.Option(help="I-Tuning Dropping: no adapters below this decoder layer.")
    ] = None,
    attention_width: Annotated[
        int | None, typer.Option(help="SmallCap: width of a head's queries, keys and values.")
    ] = None,
    datastore: Annotated[
        Path | None, typer.Option(help="Put captions of similar images, from this datastore, before every caption.")
    ] = None,
    retrieve: Annotated[int | None, typer.Option(help="How many captions; default 4 with a datastore.")] = None,
    mapper: Annotated[str | None, typer.Option(help="ClipCap: transformer or mlp.")] = None,
    prefix_length: Annotated[int | None, typer.Option(help="ClipCap: embeddings before the caption.")] = None,
    clip_length: Annotated[int | None, typer.Option(help="ClipCap: vectors that the image becomes.")] = None,
    mapper_layers: Annotated[int | None, typer.Option(help="ClipCap: layers of the transformer mapper.")] = None,
    mapper_heads: Annotated[int | None, typer.Option(help="ClipCap: its attention heads.")] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="ClipCap: the image's embedding: projected, cls or mean; default: the first there is."),
    ] = None,
    normalize: Annotated[bool | None, typer.Option(help="ClipCap: scale that embedding to length 1.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the photos.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Captions per optimiser step.")] = None,
    images_per_forward: Annotated[
        int | None, typer.Option(help="Images at once through the model; bounds memory, not the result.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Fraction of the steps that warm up.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Gradient clipping; 0 does not clip.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout on what an adapter retrieves.")] = None,
    visual_dropout: Annotated[float | None, typer.Option(help="Visual embeddings left out, as a fraction.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Label smoothing.")] = None,
    ema_decay: Annotated[float | None, typer.Option(help="Moving average of the weights; 0 is off.")] = None,
    flip: Annotated[bool | None, typer.Option(help="Mirror half of the training photos.")] = None,
    lower: Annotated[bool | None, typer.Option(help="Lower-case the captions.")] = None,
    strip_period: Annotated[bool | None, typer.Option(help="Drop the final period.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text before every caption.")] = None,
    end: Annotated[str | None, typer.Option(help="The token that ends a caption.")] = None,
    max_caption_tokens: Annotated[int | None, typer.Option(help="Cut longer captions.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16 (autocast) or fp32.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams of the dev evaluation.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest caption of the dev evaluation.")] = None,
    _version: common.Version = False,
) -> None:
    """Train a captioner's adapters between a frozen vision tower and a frozen GPT-2."""
    given = dict(locals())
    overrides = {name: given[name] for name in TrainConfig.__dataclass_fields__ if name in given and name != "preset"}
    overrides["datastore"] = None if datastore is None else str(datastore)
    common.require("train", "torch", "transformers", "safetensors", "tensorboard")
    if resume:
        init_from = None  # what the run began from
    config = _configuration(preset, overrides, output, resume, init_from)
    splits = Splits(data, images, dev_data, dev_fraction, dev_images)
    from ..loading import check_hashes
    from ..training.run_folder import LAST, only_run

    with only_run(output):
        last = output / LAST
        base = find_checkpoint(init_from) if init_from else last if resume and last.exists() else None
        found = load_config(base) if base else None
        trainer = _prepare(config, splits, output, cache_features, found)
        if base and found:
            language = None if init_from and language_model else trainer.language
            check_hashes(base, found, language, None if init_from and vision else trainer.tower)
        if init_from:
            trainer.init_from(init_from)
        if resume:
            trainer.resume()
        _run(trainer)


def _configuration(
    preset: str, overrides: dict[str, Any], output: Path, resume: bool, init_from: Path | None
) -> TrainConfig:
    from ..training.run_folder import holds_run

    if resume:
        return _saved_configuration(output, overrides)
    if holds_run(output):
        raise ItuneError(f"{output} holds a run already: --resume it, or choose another --output")
    if init_from:
        overrides = _inherit(overrides, find_checkpoint(init_from))
    return resolve(preset, **overrides)


def _saved_configuration(output: Path, overrides: dict[str, Any]) -> TrainConfig:
    path = output / "config.json"
    try:
        config = from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ItuneError(f"--resume: {output} holds no run to resume (no config.json)") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ItuneError(f"--resume: {path} is damaged ({error})") from None
    for name, value in overrides.items():
        if value not in (None, getattr(config, name)):
            raise ItuneError(f"--resume keeps the run's configuration: {flag(name)} was {getattr(config, name)}")
    return config


def _inherit(overrides: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """What --init-from decides: the frozen parts and the text unless given, the adapters' shape in any case."""
    found = load_config(checkpoint)
    shape = {name: getattr(found, name) for name in ("method", *METHOD_FIELDS[found.method])}
    for name, value in shape.items():
        if overrides[name] not in (None, value):
            raise ItuneError(f"{flag(name)} {overrides[name]} contradicts --init-from {checkpoint}, which has {value}")
    defaults = {
        "language_model": resolve_source(found.language_model.source, checkpoint),
        "vision": resolve_source(found.vision.source, checkpoint),
        "lower": found.text.lower,
        "strip_period": found.text.strip_period,
        "prompt": found.text.prompt,
        "begin": found.text.begin or "",
        "end": found.text.end,
    }
    kept = {name: value if overrides.get(name) is None else overrides[name] for name, value in defaults.items()}
    if found.retrieval is not None and overrides["datastore"] is None and overrides["retrieve"] is None:
        raise ItuneError(
            f"--init-from {checkpoint} retrieves {found.retrieval.k} captions: name a --datastore, or go without by "
            "--retrieve 0"
        )
    if found.retrieval is not None and overrides["retrieve"] is None:
        overrides["retrieve"] = found.retrieval.k
    if overrides["datastore"] is not None and overrides["prompt"] is None:
        kept["prompt"] = ""
    return overrides | shape | kept


@dataclass(frozen=True)
class Splits:
    """Where the training and the dev records come from, as the flags say."""

    data: Path
    images: Path | None
    dev_data: Path | None
    dev_fraction: float | None
    dev_images: int | None

    def load(self, seed: int) -> tuple[list[Record], list[Record]]:
        """The training and the dev records."""
        from ..data.records import load_records, split_records

        if self.dev_data and self.dev_fraction is not None:
            raise ItuneError("--dev-data and --dev-fraction exclude each other: name a file or hold out a fraction")
        train = load_records(self.data, images=self.images, split="train")
        if self.dev_fraction is not None:
            train, dev = split_records(train, self.dev_fraction, seed)
        elif self.dev_data:
            dev = load_records(self.dev_data, images=self.images, split=None)
        else:
            dev = load_records(self.data, images=self.images, split="dev")
        return train, dev[: self.dev_images]


def _prepare(
    config: TrainConfig, splits: Splits, output: Path, cache: Path | None, base: CheckpointConfig | None = None
) -> Trainer:
    """`base`: of the checkpoint that the run goes on from, as whose prompts are worded and captions searched for."""
    from ..backbones import load_language_model, load_vision_tower
    from ..data.features import FeatureCache, LiveFeatures
    from ..methods.registry import MODELS
    from ..training.loop import Trainer, TrainingData, left_out
    from ..training.prompting import prepare_prompts

    console = common.console()
    console.print_json(data=config.to_json())
    train, dev = splits.load(config.seed)
    language = load_language_model(config.language_model)
    tower = load_vision_tower(config.vision)
    features: Features = FeatureCache(cache, tower) if cache else LiveFeatures(tower)
    with common.progress("photos") as update:
        unreadable = features.prepare([r.image for r in train], flip=config.flip, progress=update)
        unreadable |= features.prepare([r.image for r in dev], progress=update)
    for reason in unreadable.values():
        console.print(f"left out: {reason}", style="yellow", markup=False)
    train, dev = left_out(train, unreadable), left_out(dev, unreadable)
    if not train:
        raise ItuneError(f"{splits.data}: no photo of the training split can be read")
    data = TrainingData(train, dev, features)
    if config.datastore is not None:
        with common.progress("photos") as update:
            prompting = prepare_prompts(
                config,
                MODELS[config.method].text(config),
                language,
                tower,
                data,
                base=None if base is None else base.retrieval,
                cache=cache,
                progress=lambda _what, done, total: update(done, total),
            )
        assert prompting is not None
        data = replace(data, prompting=prompting)
        longest = max(map(len, prompting.prompts.values()))
        console.print(
            f"{prompting.captions:.2f} of {config.retrieved} retrieved captions fit into a prompt on average; the "
            f"longest takes {longest} of the language model's {language.model.config.n_positions} positions",
            highlight=False,
        )
    search = None if base is None else base.search
    trainer = Trainer(config, language, tower, data, output, search=search)
    trainable = sum(weight.numel() for weight in trainer.weights.values())
    console.print(
        f"{len(train)} training photos, {len(dev)} dev photos, {trainable / 1e6:.2f}M trainable parameters, "
        f"{trainer.total_steps} steps",
        highlight=False,
    )
    return trainer


def _run(trainer: Trainer) -> None:
    from ..training.loop import Interrupted

    def stop(_signal: int, _frame: FrameType | None) -> None:
        trainer.stop_requested = True
        # A second Ctrl-C does not wait for the step to end.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    common.on_ending(stop)
    console = common.console()
    try:
        with TrainingDisplay(trainer) as display:
            progress = trainer.run(display)
    except Interrupted:
        console.print(f"stopped and saved: add --resume to go on ({trainer.output / 'last'})", highlight=False)
        raise typer.Exit(130) from None
    best = f", dev CIDEr-D {100 * progress.best_cider:.1f} in epoch {progress.best_epoch + 1}"
    console.print(
        f"done: {trainer.output / 'best'}{best if trainer.data.dev else ''}\n"
        f"next: itune-export {trainer.output / 'best'} --target onnx --precision int8 -o BUNDLE",
        highlight=False,
    )


def main() -> None:
    """Entry point."""
    common.run(train)


if __name__ == "__main__":
    main()
