"""Train a captioner's adapters: next-token cross-entropy on the captions, AdamW, best checkpoint by dev CIDEr-D.

The output folder holds `best/` and `last/` (adapter checkpoints), `config.json`, `metrics.jsonl` and
TensorBoard events. `last/` also carries the optimiser, so that a run can be stopped anywhere and resumed; a
resumed run repeats the order, the mirroring and the dropout that the uninterrupted one would have had.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..backbones import LanguageModel, VisionTower
from ..checkpoint import (
    WEIGHTS_FILE,
    CheckpointError,
    Source,
    VisionSource,
    find_checkpoint,
    relative_source,
    save_config,
)
from ..data.features import Features
from ..data.records import Record
from ..eager import EagerEngine
from ..evaluate import caption_features
from ..files import atomic_folder, atomic_path
from ..methods.base import write_tensors
from ..methods.registry import MODELS
from ..methods.schemas import CHECKPOINTS
from ..metrics import CiderD
from ..runtime.search import SearchConfig
from ..runtime.settings import RetrievalSettings, SearchDefaults
from .averaging import WeightAverage
from .batches import Batch, TokenizedRecord, caption_head, epoch_steps, steps_per_epoch, tokenize
from .config import ConfigError, TrainConfig
from .prompting import Prompting
from .reporting import Interrupted, Progress, Reporter
from .run_folder import BEST, fingerprint, holds_run, log_epoch

_STATE, _PROGRESS = "trainer.safetensors", "trainer.json"
_SAVE_SECONDS = 300.0  # a killed run loses at most this much


class Trainer:
    """One training run; `run` may raise `Interrupted` after `stop_requested` was set."""

    def __init__(
        self,
        config: TrainConfig,
        language: LanguageModel,
        tower: VisionTower,
        features: Features,
        train: Sequence[Record],
        dev: Sequence[Record],
        output: Path,
        device: torch.device | None = None,
        prompting: Prompting | None = None,
        search: SearchDefaults | None = None,
    ) -> None:
        """`prompting`: the retrieved captions, prepared for both splits.

        `search`: of the checkpoint that the run goes on from; the configuration decides beams and length.
        """
        self.config, self.language, self.tower, self.features = config, language, tower, features
        self.output, self.dev = output, list(dev)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.text = MODELS[config.method].text(config)
        self.prompting = prompting
        self.heads = None if prompting is None else prompting.heads
        self.search = (search or SearchDefaults()).model_copy(
            update={"num_beams": config.num_beams, "max_new_tokens": config.max_new_tokens}
        )
        if self.device.type == "cpu":
            # The fused kernel's bf16 backward is several times slower on CPUs at the length of captions.
            language.model.set_attn_implementation("eager")
        torch.manual_seed(config.seed)
        self.model = (
            MODELS[config.method].create(config, language.model, features.tokens, features.width).to(self.device)
        )
        self._check_room()
        self._search = SearchConfig(**self.search.model_dump())
        self._data = fingerprint(train, dev)
        self.records = tokenize(
            train,
            language.tokenizer,
            self.text,
            config.max_caption_tokens,
            self.model.prefix_ids,
            heads=self.heads,
            positions=language.model.config.n_positions,
        )
        self._check_vocabulary()
        self.weights = {name: w for name, w in self.model.adapters.named_parameters() if w.requires_grad}
        self.average = WeightAverage(self.weights, config.ema_decay)
        matrices = [w for w in self.weights.values() if w.ndim > 1]
        vectors = [w for w in self.weights.values() if w.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
        )
        self.steps_per_epoch = steps_per_epoch(self.records, config)
        self.progress = Progress()
        self.stop_requested = False
        self.cider = CiderD({record.id: record.captions for record in self.dev}) if self.dev else None
        self._saved = time.monotonic()

    def _check_room(self) -> None:
        """Retrieved prompts were fitted to what there is; other heads are alike for all photos."""
        positions: int = self.language.model.config.n_positions
        head = 0 if self.heads else len(caption_head(self.language.tokenizer, self.text, self.model.prefix_ids))
        room = positions - head + 1  # the last token of a caption is not read
        if self.config.max_new_tokens > room:
            raise ConfigError(
                f"--max-new-tokens {self.config.max_new_tokens}: the language model has {positions} positions, and "
                f"{head} stand before a caption: give at most {max(room, 0)}, or a shorter --prompt or --prefix-length"
            )

    def _check_vocabulary(self) -> None:
        largest = max((max(caption) for record in self.records for caption in record.captions), default=0)
        size: int = self.language.model.config.vocab_size
        if largest >= size:
            raise ConfigError(
                f"{self.config.language_model}: its tokenizer writes token {largest}, and its vocabulary has {size}: "
                "the two belong to different models"
            )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.config.epochs

    def init_from(self, checkpoint: Path) -> None:
        """Start from another checkpoint's adapters instead of from the untouched language model."""
        self.model.load_adapters(find_checkpoint(checkpoint) / WEIGHTS_FILE)
        self.average.restart()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = max(1, round(self.config.warmup * self.total_steps))
        if step < warmup:
            return self.config.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.total_steps - warmup)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def run(self, reporter: Reporter) -> Progress:
        """Train from where `progress` stands to the last epoch."""
        self._write_json(self.output / "config.json", self.config.to_json())
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.output / "tensorboard"), purge_step=self.progress.step) as board:
            while self.progress.epoch < self.config.epochs:
                self._epoch(reporter, board)
                self.save_last()
                metrics = self.evaluate(reporter)
                self._end_epoch(metrics, reporter, board)
        return self.progress

    def _epoch(self, reporter: Reporter, board: Any) -> None:
        self.model.train(True)
        # A prompt of retrieved captions is several times as long as a caption.
        pack = self.prompting is not None
        steps = epoch_steps(self.records, self.config, self.progress.epoch, pack=pack)
        with ThreadPoolExecutor(1) as pool:
            for number, batches in enumerate(steps):
                if number < self.progress.step_in_epoch:
                    continue
                metrics = self._step(batches, pool)
                self.progress.step += 1
                self.progress.step_in_epoch += 1
                for name, value in metrics.items():
                    board.add_scalar(f"train/{name}", value, self.progress.step)
                reporter.step(self.progress, metrics, sum(len(batch.images) for batch in batches))
                if self.stop_requested:
                    self.save_last()
                    raise Interrupted
                if time.monotonic() - self._saved > _SAVE_SECONDS:
                    self.save_last()

    def _step(self, batches: list[Batch], pool: ThreadPoolExecutor) -> dict[str, float]:
        # Seeded by the step's number, so that a resumed run draws the same dropout.
        torch.manual_seed(self.config.seed * 1_000_003 + self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.progress.step)
        targets = sum(batch.targets for batch in batches)
        total = 0.0
        entropy: float | None = None
        reading = pool.submit(self.features.read, batches[0].images, batches[0].flip)
        for i, batch in enumerate(batches):
            visual = reading.result().to(self.device)
            if i + 1 < len(batches):
                reading = pool.submit(self.features.read, batches[i + 1].images, batches[i + 1].flip)
            visual = self._drop_visual(visual)
            input_ids, mask = batch.input_ids.to(self.device), batch.mask.to(self.device)
            packed = {} if batch.packing is None else {"packing": batch.packing.to(self.device)}
            if i == 0 and self.progress.step % 50 == 0:
                # Apart, since older releases of torch keep casts of weights within a block, and these have no gradient.
                with self._autocast():
                    entropy = self.model.attention_entropy(input_ids, mask, visual, **packed)
            with self._autocast():
                loss = self.model.loss(input_ids, mask, visual, self.config.label_smoothing, **packed) / targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), self.config.max_grad_norm or math.inf))
        if not (math.isfinite(total) and math.isfinite(norm)):
            last = self.output / "last"
            again = f"from {last} with --init-from" if last.exists() else "from the beginning"
            raise CheckpointError(
                f"the loss is no longer a number at step {self.progress.step}: lower --learning-rate or --lambda"
                f" and start again {again}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.progress.step)
        metrics = {"loss": total, "learning_rate": self.learning_rate(self.progress.step), "grad_norm": norm}
        return metrics if entropy is None else metrics | {"attention_entropy": entropy}

    def _autocast(self) -> Any:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _drop_visual(self, visual: Tensor) -> Tensor:
        kept = round(visual.shape[1] * (1 - self.config.visual_dropout))
        if kept == visual.shape[1]:
            return visual
        return visual[:, torch.randperm(visual.shape[1])[: max(1, kept)]]

    def evaluate(self, reporter: Reporter) -> dict[str, float]:
        """CIDEr-D of the dev split with the averaged weights; empty without one. Raises Interrupted, as `run`."""
        if self.cider is None:
            return {}

        def told(done: int, images: int) -> None:
            reporter.evaluating(done, images)
            if self.stop_requested:
                raise Interrupted

        with self.average.in_place():
            captions = caption_features(
                EagerEngine(self.model, self.tower),
                self.features,
                [record.image for record in self.dev],
                self.language.tokenizer,
                self.text,
                self._search,
                heads=self.heads,
                progress=told,
            )
        return {"cider": self.cider.score(dict(zip((r.id for r in self.dev), captions, strict=True)))}

    def _end_epoch(self, metrics: dict[str, float], reporter: Reporter, board: Any) -> None:
        for name, value in metrics.items():
            board.add_scalar(f"dev/{name}", value, self.progress.step)
        is_best = metrics.get("cider", math.inf) > self.progress.best_cider
        if is_best:
            self.progress.best_cider = metrics.get("cider", -1.0)
            self.progress.best_epoch = self.progress.epoch
            with atomic_folder(self.output / "best") as folder:
                self._write_checkpoint(folder, self.output / "best", metrics)
        self.progress.epoch += 1
        self.progress.step_in_epoch = 0
        log_epoch(self.output, self.progress.epoch, {"step": self.progress.step, **metrics})
        self.save_last()
        reporter.epoch(self.progress, metrics, is_best)

    # Saving and resuming

    def save_last(self) -> None:
        """Write `last/`: a checkpoint of the averaged weights, and what resuming needs."""
        state: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            state[f"weight.{name}"] = weight.detach()
            state[f"average.{name}"] = self.average.values[name]
            for key, value in self.optimizer.state.get(weight, {}).items():
                state[f"{key}.{name}"] = value
        with atomic_folder(self.output / "last") as folder:
            self._write_checkpoint(folder, self.output / "last", {})
            write_tensors(state, folder / _STATE)
            self._write_json(folder / _PROGRESS, vars(self.progress) | {"data": self._data})
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Go on from `last/` of the output folder."""
        folder = self.output / "last"
        if not folder.exists() and holds_run(self.output):
            raise CheckpointError(
                f"{folder} is missing, which a run goes on from: train into a new folder with --init-from "
                f"{self.output / BEST}"
            )
        if not folder.exists():
            raise CheckpointError(f"{self.output} was stopped before anything was saved: start again without --resume")
        try:
            state = load_file(folder / _STATE)
            saved = json.loads((folder / _PROGRESS).read_bytes())
            data = saved.pop("data", self._data)
            self.progress = Progress.parse(saved)
            for name, weight in self.weights.items():
                weight.data.copy_(state[f"weight.{name}"])
                self.average.values[name].copy_(state[f"average.{name}"])
                self.optimizer.state[weight] = {
                    key: state[f"{key}.{name}"].to(weight.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{folder} cannot be resumed ({type(error).__name__}: {reason}): train into a new folder with "
                f"--init-from {self.output / 'best'}"
            ) from None
        if data != self._data:
            raise CheckpointError(
                f"{folder}: its training and dev photos or captions were others: resume with the same --data, or train "
                f"into a new folder with --init-from {self.output / 'best'}"
            )

    def _write_checkpoint(self, folder: Path, home: Path, metrics: dict[str, float]) -> None:
        with self.average.in_place():
            self.model.save_adapters(folder / WEIGHTS_FILE)
        config = self.config
        save_config(
            CHECKPOINTS[config.method](
                language_model=Source.of_language_model(self.language, config.language_model, home),
                vision=VisionSource.of_tower(self.tower, config.vision, home),
                image=self.tower.image,
                text=self.text,
                retrieval=self._retrieval(home),
                search=self.search,
                training={
                    # The frozen parts stand above, as paths that hold wherever the folders are moved together.
                    **{k: v for k, v in config.to_json().items() if k not in ("language_model", "vision", "datastore")},
                    **({} if self.prompting is None else {"datastore": self.prompting.datastore}),
                    # How many were begun.
                    "epoch": self.progress.epoch + (self.progress.step_in_epoch > 0),
                    "step": self.progress.step,
                    **{f"dev_{name}": value for name, value in metrics.items()},
                },
                **self.model.describe(),
            ),
            folder,
        )

    def _retrieval(self, home: Path) -> RetrievalSettings | None:
        if self.prompting is None:
            return None
        settings = self.prompting.settings
        source = relative_source(self.config.vision, home)
        return settings.model_copy(update={"encoder": settings.encoder.model_copy(update={"source": source})})

    @staticmethod
    def _write_json(path: Path, values: dict[str, Any]) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def left_out(records: Sequence[Record], unreadable: dict[Path, str]) -> list[Record]:
    """The records whose photo can be read."""
    return [record for record in records if record.image not in unreadable]


__all__ = ["Interrupted", "Progress", "Reporter", "TokenizedRecord", "Trainer", "left_out"]
