"""Train a captioner's adapters: the steps of an objective, AdamW, best checkpoint by dev CIDEr-D.

The output folder gets `best/` and `last/` (adapter checkpoints), `config.json`, `metrics.jsonl` and TensorBoard events.
`last/` also has the optimizer's state, so a run can stop anywhere and resume: order, mirroring, dropout and drawn
captions are then the same as in an uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from ..backbones import LanguageModel, VisionTower
from ..checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    ModelSource,
    VisionSource,
    find_checkpoint,
    relative_source,
    save_config,
)
from ..eager import EagerEngine
from ..evaluate import caption_features
from ..files import atomic_folder, write_json
from ..license import LICENSE_FILE, License
from ..methods.base import write_tensors
from ..methods.registry import MODELS
from ..methods.schemas import CHECKPOINTS
from ..runtime.errors import SearchError, reading
from ..runtime.search import SearchConfig
from ..runtime.settings import SearchDefaults
from .advice import caption_advice
from .batches import (
    Batch,
    TokenizedRecord,
    epoch_size,
    epoch_steps,
    prompt_tokens,
    special_token,
    steps_per_epoch,
    tokenize,
)
from .config import ConfigError, TrainConfig
from .evaluation import DevResult, DevSets
from .objectives.base import Objective
from .objectives.cross_entropy import CrossEntropy
from .objectives.rewards import RewardsLostError
from .objectives.scst import SelfCritical
from .prompting import TrainingData
from .run_folder import BEST, LAST, fingerprint, holds_run, log_epoch

_Count = Annotated[int, Field(ge=0)]
_STATE, _PROGRESS = "trainer.safetensors", "trainer.json"
_FILES = (CONFIG_FILE, WEIGHTS_FILE, LICENSE_FILE, _STATE, _PROGRESS)
_OBJECT = TypeAdapter(dict[str, Any])
_SAVE_SECONDS = 300.0  # a killed run loses at most this much


@dataclass(config=ConfigDict(extra="forbid", strict=True))
class Progress:
    """How far a run has come, as saved in `trainer.json`."""

    epoch: _Count = 0
    step_in_epoch: _Count = 0
    step: _Count = 0
    best_cider: Annotated[float, Field(ge=-1)] = -1.0
    best_epoch: Annotated[int, Field(ge=-1)] = -1


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop; everything is saved in `last/`."""


class Reporter(Protocol):
    """Callbacks of a run; the command line displays them."""

    def step(self, progress: Progress, metrics: dict[str, float], images: int) -> None:
        """An optimizer step over so many images is done."""

    def evaluating(self, done: int, images: int) -> None:
        """So many images of the dev split have been captioned."""

    def untrained(self, metrics: dict[str, float]) -> None:
        """The dev split was captioned before the first step."""

    def warn(self, message: str) -> None:
        """There is something about the dev captions that the user should know."""

    def epoch(self, progress: Progress, metrics: dict[str, float], is_best: bool) -> None:
        """An epoch is done and evaluated."""


class Trainer:
    """One training run; setting `stop_requested` makes `run` raise `Interrupted`."""

    def __init__(
        self,
        config: TrainConfig,
        language: LanguageModel,
        tower: VisionTower,
        data: TrainingData,
        output: Path,
        *,
        search: SearchDefaults | None = None,
        license: License | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`search`: the options of the checkpoint that the run starts from; `config` overrides beams and length.

        `license`: the terms of the weights that the run starts from.
        """
        self.config, self.language, self.tower, self.data, self.output = config, language, tower, data, output
        self.license = license
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.text = MODELS[config.method].text(config)
        self.prompts = None if data.prompting is None else data.prompting.prompts
        self.search = (search or SearchDefaults()).model_copy(
            update={"num_beams": config.num_beams, "max_new_tokens": config.max_new_tokens}
        )
        if self.device.type == "cpu":
            # The fused kernel's bf16 backward is several times slower on CPUs for sequences as short as captions.
            language.model.set_attn_implementation("eager")
        torch.manual_seed(config.seed)
        visual = data.features.tokens, data.features.width
        self.model = MODELS[config.method].create(config, language.model, visual).to(self.device)
        self.train = [record for records in data.train.values() for record in records]
        self.records = self._tokenize()
        self.objective: Objective = CrossEntropy(config, self.model)
        if config.objective == "scst":
            end = special_token(language.tokenizer, self.text.end, "end")
            self.objective = SelfCritical(config, self.model, tower, language.tokenizer, end, self.train)
        self.weights = {name: w for name, w in self.model.adapters.named_parameters() if w.requires_grad}
        self.average = moving_average(self.model.adapters, config.ema_decay)
        matrices = {"params": [w for w in self.weights.values() if w.ndim > 1], "weight_decay": config.weight_decay}
        vectors = {"params": [w for w in self.weights.values() if w.ndim < 2], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([matrices, vectors], lr=1.0)  # the schedule multiplies it by `learning_rate`
        self.photos_per_epoch = epoch_size(self.records)
        self.steps_per_epoch = steps_per_epoch(self.records, config)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.schedule = LambdaLR(self.optimizer, self.learning_rate)
        self.progress = Progress()
        self.stop_requested = False
        self.dev = DevSets(data.dev) if data.dev else None
        self._fingerprint = fingerprint(self.train, *(data.dev.values() or [()]))
        self._saved = time.monotonic()

    def _tokenize(self) -> list[TokenizedRecord]:
        """The training captions as token ids that fit the language model's positions and vocabulary."""
        tokenizer, gpt2, prefix = self.language.tokenizer, self.language.model.config, self.model.prefix_ids
        # Retrieved prompts leave room for captions; the other prompt is the same for all photos.
        prompt = [] if self.prompts else prompt_tokens(tokenizer, self.text, prefix)
        room = max(0, gpt2.n_positions - len(prompt) + 1)  # the model does not read the last token of a caption
        if self.config.max_new_tokens > room:
            raise ConfigError(
                f"--max-new-tokens {self.config.max_new_tokens}: the language model has {gpt2.n_positions} positions, "
                f"{len(prompt)} of them before a caption: set at most {room}, or shorten --prompt or --prefix-length"
            )
        longest, positions = self.config.max_caption_tokens, gpt2.n_positions
        records = tokenize(self.train, tokenizer, self.text, longest, prefix, prompts=self.prompts, positions=positions)
        largest = max((max(caption) for record in records for caption in record.captions), default=0)
        if largest >= gpt2.vocab_size:
            raise ConfigError(
                f"{self.config.language_model}: the tokenizer writes token {largest}, but the model's vocabulary has "
                f"{gpt2.vocab_size}: use the tokenizer of the same model"
            )
        return records

    def init_from(self, checkpoint: Path) -> None:
        """Start from another checkpoint's adapters instead of from the untouched language model."""
        self.model.load_adapters(find_checkpoint(checkpoint) / WEIGHTS_FILE)
        self.average.module.load_state_dict(self.model.adapters.state_dict())

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = max(1, round(self.config.warmup * self.total_steps))
        if step < warmup:
            return self.config.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.total_steps - warmup)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def run(self, reporter: Reporter) -> Progress:
        """Train from `progress` to the last epoch, or until `is_patient` is False."""
        write_json(self.output / "config.json", self.config.to_json())
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.output / "tensorboard"), purge_step=self.progress.step + 1) as board:
            if self.progress.step == 0 and self.dev is not None:
                self.save_last()  # in case it is interrupted
                untrained = self.evaluate(reporter)
                self._show_samples(untrained, board)
                reporter.untrained(untrained.metrics)
            while self.progress.epoch < self.config.epochs and self.is_patient:
                self._epoch(reporter, board)
                self.save_last()
                self._end_epoch(self.evaluate(reporter), reporter, board)
        return self.progress

    @property
    def is_patient(self) -> bool:
        """Whether the last `config.patience` evaluations have a best one among them."""
        since_best = self.progress.epoch - 1 - self.progress.best_epoch
        return self.config.patience is None or since_best < self.config.patience

    def _epoch(self, reporter: Reporter, board: Any) -> None:
        # A prompt of retrieved captions is several times as long as a caption.
        steps = epoch_steps(self.records, self.config, self.progress.epoch, pack=self.prompts is not None)
        with ThreadPoolExecutor(1) as pool:
            for number, batches in enumerate(steps):
                if number < self.progress.step_in_epoch:
                    continue
                try:
                    metrics = self._step(batches, pool)
                except RewardsLostError:
                    self.save_last()  # the step changed nothing
                    raise
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
        # Seeded by the step's number, so that a resumed run draws the same dropout and captions.
        torch.manual_seed(self.config.seed * 1_000_003 + self.progress.step)
        metrics = {"learning_rate": float(self.schedule.get_last_lr()[0])}
        try:
            metrics |= self.objective.backward(self.progress.step, batches, self._visuals(batches, pool))
        except SearchError as error:  # the search has no other reason here
            raise self._diverged("score of the next token") from error
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), self.config.max_grad_norm or math.inf))
        metrics["grad_norm"] = norm
        if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
            raise self._diverged("gradient" if math.isfinite(metrics["loss"]) else "loss")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.average.update_parameters(self.model.adapters)
        return metrics

    def _diverged(self, what: str) -> CheckpointError:
        last = self.output / LAST
        again = f"start again from {last} with --init-from" if self.progress.step and last.exists() else "start again"
        return CheckpointError(
            f"the {what} at step {self.progress.step} is not finite: lower --learning-rate or --lambda and {again}"
        )

    def _visuals(self, batches: Sequence[Batch], pool: ThreadPoolExecutor) -> Iterator[Tensor]:
        """The embeddings of each batch, while the next ones are read."""
        ahead = pool.submit(self.data.features.read, batches[0].images, batches[0].flip)
        for following in [*batches[1:], None]:
            visual = ahead.result().to(self.device)
            if following is not None:
                ahead = pool.submit(self.data.features.read, following.images, following.flip)
            yield visual

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Give the model the averaged weights within the block."""
        weights = deepcopy(self.model.adapters.state_dict())
        self.model.adapters.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            self.model.adapters.load_state_dict(weights)

    def evaluate(self, reporter: Reporter) -> DevResult:
        """Caption the dev sets with the averaged weights; empty without dev sets. May raise `Interrupted`."""
        if self.dev is None:
            return DevResult({}, {})

        def report(done: int, images: int) -> None:
            reporter.evaluating(done, images)
            if self.stop_requested:
                raise Interrupted

        with self._averaged():
            engine, images = EagerEngine(self.model, self.tower), self.dev.images
            settings = self.language.tokenizer, self.text, SearchConfig(**self.search.model_dump())
            try:
                captions = caption_features(
                    engine, self.data.features, images, *settings, prompts=self.prompts, progress=report
                )
            except SearchError as error:  # the search has no other reason here
                raise self._diverged("score of the next token") from error
        for advice in caption_advice(captions):
            reporter.warn(advice)
        return self.dev.result(captions)

    def _show_samples(self, result: DevResult, board: Any) -> None:
        for name, caption in result.samples.items():
            if self.dev is not None and self.progress.step == 0:
                pixels = self.data.features.pixels(self.dev.samples[name])
                board.add_image(f"samples/{name}", pixels, 0, dataformats="HWC")
            board.add_text(f"samples/{name}", caption, self.progress.step)

    def _end_epoch(self, result: DevResult, reporter: Reporter, board: Any) -> None:
        metrics = result.metrics
        for name, value in metrics.items():
            board.add_scalar(f"dev/{name}", value, self.progress.step)
        self._show_samples(result, board)
        is_best = metrics.get("cider", math.inf) > self.progress.best_cider
        if is_best:
            self.progress.best_cider = metrics.get("cider", -1.0)
            self.progress.best_epoch = self.progress.epoch
            with atomic_folder(self.output / BEST, _FILES) as folder:
                self._write_checkpoint(folder, self.output / BEST, metrics)
        self.progress.epoch += 1
        self.progress.step_in_epoch = 0
        log_epoch(self.output, self.progress.epoch, {"step": self.progress.step, **metrics, "samples": result.samples})
        self.save_last()
        reporter.epoch(self.progress, metrics, is_best)

    # Saving and resuming

    def save_last(self) -> None:
        """Write `last/`: a checkpoint of the averaged weights, and the state to resume from."""
        state: dict[str, Tensor] = {}
        averages = self.average.module.state_dict()
        for name, weight in self.weights.items():
            state[f"weight.{name}"] = weight.detach()
            state[f"average.{name}"] = averages[name]
            for key, value in self.optimizer.state.get(weight, {}).items():
                state[f"{key}.{name}"] = value
        with atomic_folder(self.output / LAST, _FILES) as folder:
            self._write_checkpoint(folder, self.output / LAST, {})
            write_tensors(state, folder / _STATE)
            write_json(folder / _PROGRESS, asdict(self.progress) | {"data": self._fingerprint})
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Continue from `last/` of the output folder."""
        folder = self.output / LAST
        instead = f"train into a new folder with --init-from {self.output / BEST}"
        if not folder.exists():
            raise CheckpointError(
                f"{folder} is missing, so the run cannot be resumed: "
                + (instead if holds_run(self.output) else "start again without --resume, since nothing was saved")
            )
        with reading(folder / _PROGRESS, CheckpointError, instead):
            saved = _OBJECT.validate_json((folder / _PROGRESS).read_bytes())
            same_data = saved.pop("data", self._fingerprint) == self._fingerprint
            self.progress = Progress(**saved)
            done = self.progress.epoch * self.steps_per_epoch + self.progress.step_in_epoch
            if same_data and not self.progress.step == done <= self.total_steps:
                raise ValueError(f"step {self.progress.step} does not belong to epoch {self.progress.epoch}")
        with reading(folder / _STATE, CheckpointError, instead):
            state = load_file(folder / _STATE)
            averages = self.average.module.state_dict()
            for name, weight in self.weights.items():
                weight.data.copy_(state[f"weight.{name}"])
                averages[name].copy_(state[f"average.{name}"])
                if self.progress.step:  # before the first step, the optimizer has no state
                    self.optimizer.state[weight] = {
                        key: state[f"{key}.{name}"].to(weight.device if key != "step" else "cpu")
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
        if not same_data:
            raise CheckpointError(
                f"{folder}: the training or dev photos or captions changed: resume with the same data, or {instead}"
            )
        self.average.n_averaged.fill_(self.progress.step + 1)
        self.schedule = LambdaLR(self.optimizer, self.learning_rate, last_epoch=self.progress.step - 1)

    def _write_checkpoint(self, folder: Path, home: Path, metrics: dict[str, float]) -> None:
        """Write the averaged weights to `folder`, which will take the place of `home`."""
        if self.license is not None:
            (folder / LICENSE_FILE).write_text(self.license.text, encoding="utf-8")
        with self._averaged():
            self.model.save_adapters(folder / WEIGHTS_FILE)
        config, prompting = self.config, self.data.prompting
        # The frozen parts are fields of their own, as relative paths: the folders can be moved together.
        training = {k: v for k, v in config.to_json().items() if k not in ("language_model", "vision", "datastore")}
        retrieval = None
        if prompting is not None:
            training["datastore"] = prompting.datastore
            encoder = prompting.settings.encoder.model_copy(update={"source": relative_source(config.vision, home)})
            retrieval = prompting.settings.model_copy(update={"encoder": encoder})
        training |= {
            "epoch": self.progress.epoch + (self.progress.step_in_epoch > 0),  # epochs begun
            "step": self.progress.step,
            **{f"dev_{name}": value for name, value in metrics.items()},
        }
        save_config(
            CHECKPOINTS[config.method](
                language_model=ModelSource.of_language_model(self.language, config.language_model, home),
                vision=VisionSource.of_tower(self.tower, config.vision, home),
                image=self.tower.image,
                text=self.text,
                retrieval=retrieval,
                search=self.search,
                training=training,
                license=None if self.license is None else self.license.terms,
                **self.model.describe(),
            ),
            folder,
        )


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of a module that follows its weights; call `update_parameters(module)` after every optimizer step.

    The n-th update keeps the share min(decay, n / (9 + n)) of the average: without this ramp it would remember the
    initialization for hundreds of steps. A decay of 0 makes the average equal to the weights.
    """

    @torch.no_grad()
    def update(averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        kept = min(decay, n / (9 + n))
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1 - kept)

    average = AveragedModel(module, multi_avg_fn=update)
    average.n_averaged.fill_(1)  # at 0 the first update would copy the weights
    return average
