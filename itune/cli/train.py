"""itune-train: photos and captions in, an adapter checkpoint out."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import Field

from ..checkpoint import CheckpointConfig, find_checkpoint, resolve_source
from ..flags import flag
from ..methods.schemas import SETTINGS, load_config
from ..runtime.errors import ItuneError, reading
from ..training.config import PRESETS, TrainConfig, from_json, resolve
from . import common
from .data_sets import DataSets, count, photos, readable
from .display import TrainingDisplay
from .program import Flags, Options, Program, Switch, chosen

if TYPE_CHECKING:
    from ..training.loop import Trainer


class _Run(Options, title="Run"):
    output: Annotated[Path, Parameter(name=["--output", "-o"])]
    """Folder for best/, last/ and logs."""
    preset: str = Field("base", description=f"Starting point of all other settings: {', '.join(PRESETS)}.")
    init_from: Path | None = None
    """Start from this checkpoint's adapters."""
    resume: Switch = False
    """Continue the run in `--output`."""


def train(
    *,
    data: DataSets,
    run: _Run,
    settings: Annotated[Options, Flags(TrainConfig, omit=("preset", "begin"))],
) -> int:
    """Train adapters between a frozen vision tower and GPT-2.

    Settings without a flag come from the preset.

    Examples:
        itune-train --data Flickr8k.token.txt --preset small-data -o runs/flickr8k
        itune-train --data dataset_coco.json --method clipcap --preset clipcap -o runs/clipcap
        itune-train --data Flickr8k.token.txt -o runs/flickr8k --resume

    """
    common.require("train", "torch", "transformers", "safetensors", "tensorboard")
    overrides = chosen(settings)
    if run.resume and run.init_from:
        common.say("--init-from is not used: --resume goes on from the adapters in --output")
    init_from = None if run.resume else run.init_from
    config = _configuration(run, overrides, init_from)
    from ..loading import check_hashes
    from ..training.run_folder import LAST, only_run

    with only_run(run.output):
        last = run.output / LAST
        base = find_checkpoint(init_from) if init_from else last if run.resume and last.exists() else None
        found = load_config(base) if base else None
        trainer = _prepare(config, data, run, found, keeps_batch="batch_size" in overrides)
        if base and found:
            # A backbone that --init-from replaces need not match the checkpoint.
            language = None if init_from and "language_model" in overrides else trainer.language
            check_hashes(base, found, language, None if init_from and "vision" in overrides else trainer.tower)
        if init_from:
            trainer.init_from(init_from)
        if run.resume:
            trainer.resume()
        return _train(trainer)


def _configuration(run: _Run, overrides: dict[str, Any], init_from: Path | None) -> TrainConfig:
    from ..training.run_folder import holds_run

    if run.resume:
        preset = {"preset": run.preset} if "preset" in run.model_fields_set else {}
        return _saved_configuration(run.output, overrides | preset)
    if holds_run(run.output):
        raise ItuneError(f"{run.output} already has a run: --resume it, or choose another --output")
    config = resolve(run.preset, **(_inherit(overrides, find_checkpoint(init_from)) if init_from else overrides))
    if config.objective == "scst" and not init_from:
        raise ItuneError("--objective scst continues a trained captioner: name its run or checkpoint with --init-from")
    return config


def _saved_configuration(output: Path, overrides: dict[str, Any]) -> TrainConfig:
    path = output / "config.json"
    with reading(path, mend="--resume needs the folder of an earlier run"):
        config = from_json(json.loads(path.read_text(encoding="utf-8")))
    new_run = f"leave it out, or start a new run with --init-from {output}"
    _check_kept(overrides, config.to_json(), "the run that --resume continues", new_run)
    return config


def _check_kept(overrides: dict[str, Any], kept: dict[str, Any], origin: str, mend: str) -> None:
    """Raise ItuneError if an override contradicts a value that `origin` keeps."""
    for name, value in overrides.items():
        if value != kept.get(name, value):
            raise ItuneError(f"{flag(name)} {value} contradicts {origin}, which has {kept[name]}: {mend}")


def _inherit(overrides: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The overrides with what `--init-from` decides: the adapters' shape always, backbones and text unless set."""
    found = load_config(checkpoint)
    shape = {name: getattr(found, name) for name in ("method", *SETTINGS[found.method].model_fields)}
    _check_kept(overrides, shape, f"--init-from {checkpoint}", "leave it out")
    defaults = {
        "language_model": resolve_source(found.language_model.source, checkpoint),
        "vision": resolve_source(found.vision.source, checkpoint),
        "lower": found.text.lower,
        "strip_period": found.text.strip_period,
        "prompt": "" if "datastore" in overrides else found.text.prompt,
        "begin": found.text.begin or "",
        "end": found.text.end,
    }
    if found.retrieval is not None:
        if not overrides.keys() & {"datastore", "retrieve"}:
            raise ItuneError(
                f"--init-from {checkpoint} retrieves {found.retrieval.k} captions: name a --datastore, or --retrieve 0 "
                "to train without"
            )
        defaults["retrieve"] = found.retrieval.k
    return defaults | overrides | shape


def _prepare(
    config: TrainConfig, splits: DataSets, run: _Run, base: CheckpointConfig | None, keeps_batch: bool
) -> Trainer:
    """The trainer; `base` is the checkpoint that the run continues, whose prompts and search it keeps.

    The batch size is reduced for little data, unless the user or an earlier run has chosen it (`keeps_batch`).
    """
    from ..backbones import load_language_model, load_vision_tower
    from ..data.features import FeatureCache, Features
    from ..export.exportable import check_exportable
    from ..license import find_license, inherit
    from ..methods.registry import MODELS
    from ..training.advice import STEPS_PER_EPOCH, data_advice, fitting_batch_size
    from ..training.batches import special_token
    from ..training.loop import Trainer
    from ..training.prompting import TrainingData, prepare_prompts
    from ..training.run_folder import LAST

    train, dev = splits.load(config.seed)
    language = load_language_model(config.language_model)
    tower = load_vision_tower(config.vision)
    check_exportable(language, tower)
    cache = splits.cache_features
    features = FeatureCache(cache, tower) if cache else Features(tower)
    with common.progress("photos") as update:
        unreadable = features.prepare(photos(train), flip=config.flip, progress=update)
        unreadable |= features.prepare(photos(dev), progress=update)
    for reason in unreadable.values():
        common.warn(f"left out: {reason}")
    data = TrainingData(readable(train, unreadable), readable(dev, unreadable), features)
    records = [record for split in data.train.values() for record in split]
    batch_size = config.batch_size if keeps_batch or run.resume else fitting_batch_size(config, records)
    if batch_size < config.batch_size:
        common.say(
            f"--batch-size {batch_size}, not {config.batch_size}: an epoch then has about {STEPS_PER_EPOCH} steps"
        )
        config = config.model_copy(update={"batch_size": batch_size})
    common.console().print_json(data=config.to_json())
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
                progress=update,
            )
        data = replace(data, prompting=prompting)
        longest = max(map(len, prompting.prompts.values()))
        common.say(
            f"{prompting.captions:.2f} of {config.retrieved} retrieved captions fit into a prompt on average; the "
            f"longest takes {longest} of the language model's {language.model.config.n_positions} positions"
        )
    search = None if base is None else base.search
    checkpoint = find_checkpoint(run.output / LAST if run.resume else run.init_from or run.output)
    terms = None if base is None else base.license
    license = inherit([find_license(checkpoint, terms), find_license(language.folder), find_license(tower.folder)])
    trainer = Trainer(config, language, tower, data, run.output, search=search, license=license)
    end = special_token(language.tokenizer, trainer.text.end, "end")
    for advice in data_advice(records, trainer.records, language.tokenizer, end):
        common.warn(advice)
    trainable = sum(weight.numel() for weight in trainer.weights.values())
    common.say(
        f"{count(data.train)} training photos, {count(data.dev)} dev photos, {trainable / 1e6:.2f}M trainable "
        f"parameters, {trainer.total_steps} steps"
    )
    return trainer


def _train(trainer: Trainer) -> int:
    from ..training.loop import Interrupted

    def stop(_signal: int, _frame: FrameType | None) -> None:
        trainer.stop_requested = True
        # A second Ctrl-C does not wait for the step to end.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    common.on_ending(stop)
    try:
        with TrainingDisplay(trainer) as display:
            progress = trainer.run(display)
    except Interrupted:
        common.say(f"stopped and saved: add --resume to go on ({trainer.output / 'last'})")
        return common.INTERRUPTED
    if not trainer.is_patient:
        common.say(f"stopped early: no better score in {trainer.config.patience} epochs (--patience)")
    best = f", dev CIDEr-D {100 * progress.best_cider:.1f} in epoch {progress.best_epoch + 1}"
    common.say(
        f"done: {trainer.output / 'best'}{best if trainer.data.dev else ''}\n"
        f"next: itune-export {trainer.output / 'best'} --target onnx --precision int8 -o BUNDLE"
    )
    return 0


PROGRAM = Program("itune-train", train)
main = PROGRAM.run

if __name__ == "__main__":
    main()
