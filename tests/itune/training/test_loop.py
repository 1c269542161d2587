"""Training: resuming, cached features, accumulation, and itune-train as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from itune.backbones import load_language_model, load_vision_tower
from itune.checkpoint import CheckpointError, resolve_source, save_config
from itune.data.features import FeatureCache, Features
from itune.data.records import Record
from itune.loading import LoadedCheckpoint
from itune.methods.schemas import load_config
from itune.runtime.settings import SearchDefaults, TextSettings
from itune.training.advice import caption_advice, data_advice, fitting_batch_size
from itune.training.batches import TokenizedRecord, epoch_steps, steps_per_epoch, tokenize
from itune.training.config import PRESETS, ConfigError, TrainConfig, flag, resolve
from itune.training.loop import Interrupted, Progress, Trainer, moving_average
from itune.training.prompting import TrainingData
from tests.conftest import CAPTIONS, make_clip, make_language_model, refused


class Quiet:
    """A reporter that records losses, and stops the run after some steps."""

    def __init__(self, stop: Trainer | None = None, after: int = 0) -> None:
        self.losses: list[float] = []
        self.ciders: list[float] = []
        self.stop, self.after = stop, after

    def step(self, progress: Progress, metrics: dict[str, float], images: int) -> None:
        self.losses.append(metrics["loss"])
        if self.stop and progress.step == self.after:
            self.stop.stop_requested = True

    def evaluating(self, done: int, images: int) -> None:
        pass

    def untrained(self, metrics: dict[str, float]) -> None:
        pass

    def warn(self, message: str) -> None:
        pass

    def epoch(self, progress: Progress, metrics: dict[str, float], is_best: bool) -> None:
        self.ciders.append(metrics["cider"])


@pytest.fixture(scope="module")
def records(photos: list[Path]) -> list[Record]:
    """Six photos with one, two or three captions."""
    return [
        Record(path, tuple(CAPTIONS[(i + j) % 6] for j in range(1 + i % 3)), path.stem) for i, path in enumerate(photos)
    ]


def make_trainer(
    language_model: Path, vision: Path, records: list[Record], output: Path, features: Features, **settings: object
) -> Trainer:
    values = {
        "epochs": 2,
        "batch_size": 6,
        "images_per_forward": 2,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "num_beams": 2,
        "max_new_tokens": 6,
    }
    config = resolve("small-data", language_model=str(language_model), vision=str(vision), **({**values, **settings}))
    language, tower = load_language_model(str(language_model)), load_vision_tower(str(vision))
    data = TrainingData({"train": records[:5]}, {"dev": records[4:]}, features)
    return Trainer(config, language, tower, data, output, device=torch.device("cpu"))


@pytest.fixture
def live(clip_folder: Path) -> Features:
    return Features(load_vision_tower(str(clip_folder)))


def test_a_run_that_was_stopped_anywhere_ends_as_if_it_had_not_been(
    language_model_folder: Path, clip_folder: Path, records: list[Record], live: Features, tmp_path: Path
) -> None:
    def trainer(output: str) -> Trainer:
        return make_trainer(language_model_folder, clip_folder, records, tmp_path / output, live)

    whole, unbroken = trainer("whole"), Quiet()
    whole.run(unbroken)
    steps = len(unbroken.losses)
    for after in (1, steps // 2, steps - 1):
        first = trainer(f"stopped{after}")
        before = Quiet(first, after)
        with pytest.raises(Interrupted):
            first.run(before)
        second, rest = trainer(f"stopped{after}"), Quiet()
        second.resume()
        second.run(rest)
        assert before.losses + rest.losses == unbroken.losses
        expected = load_file(tmp_path / "whole" / "last" / "adapters.safetensors")
        found = load_file(tmp_path / f"stopped{after}" / "last" / "adapters.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert unbroken.losses[-1] < unbroken.losses[0]
    assert not list(tmp_path.rglob(".*")), "temporary files are left"


def test_cached_features_give_the_same_losses_within_half_precision(
    language_model_folder: Path, clip_folder: Path, records: list[Record], live: Features, tmp_path: Path
) -> None:
    cache = FeatureCache(tmp_path / "cache", live.tower)
    assert cache.prepare([record.image for record in records], flip=True) == {}
    losses = []
    for name, features in (("live", live), ("cache", cache)):
        reporter = Quiet()
        make_trainer(language_model_folder, clip_folder, records, tmp_path / name, features).run(reporter)
        losses.append(reporter.losses)
    # The documentation states this tolerance: fp16 has 11 significant bits.
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)


def test_accumulation_does_not_change_the_step(
    language_model_folder: Path, clip_folder: Path, records: list[Record], live: Features, tmp_path: Path
) -> None:
    losses = []
    for size in (1, 5):
        reporter = Quiet()
        make_trainer(
            language_model_folder,
            clip_folder,
            records,
            tmp_path / str(size),
            live,
            images_per_forward=size,
            batch_size=100,
            dropout=0.0,
            visual_dropout=0.0,
            epochs=3,
        ).run(reporter)
        losses.append(reporter.losses)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_epoch_covers_every_caption_once(language_model_folder: Path, records: list[Record]) -> None:
    tokenizer, text = load_language_model(str(language_model_folder)).tokenizer, TextSettings(prompt="a photo of")
    tokenized = tokenize(records, tokenizer, text, max_caption_tokens=12)
    config = resolve("small-data", batch_size=5, images_per_forward=2)
    seen: list[tuple[int, ...]] = []
    for epoch in (0, 1):
        rows = [
            tuple(row[scored].tolist())
            for step in epoch_steps(tokenized, config, epoch)
            for batch in step
            for row, scored in zip(batch.input_ids, batch.mask, strict=True)
            if scored.any()
        ]
        assert sorted(rows) == sorted(caption for record in tokenized for caption in record.captions)
        seen.append(rows[0])
    assert tokenizer.decode(list(seen[0])).startswith(" "), "after a prompt a caption begins with a space"
    sided = ["left" in " ".join(record.captions) for record in records]
    assert [not record.mirrorable for record in tokenized] == sided
    assert any(sided)
    cut = [c for record in tokenized for c in record.captions if len(c) == 12]
    assert cut
    assert all(c[-1] != 0 for c in cut), "a caption that was cut does not end"


def test_a_stop_while_evaluating_loses_nothing(
    language_model_folder: Path, clip_folder: Path, records: list[Record], live: Features, tmp_path: Path
) -> None:
    class Impatient(Quiet):
        def evaluating(self, done: int, images: int) -> None:
            assert self.stop
            self.stop.stop_requested = True

    def trainer(output: str) -> Trainer:
        return make_trainer(language_model_folder, clip_folder, records, tmp_path / output, live)

    whole, unbroken = trainer("whole"), Quiet()
    whole.run(unbroken)
    first = trainer("stopped")
    before = Impatient(first)
    with pytest.raises(Interrupted):
        first.run(before)
    assert before.ciders == []
    second, rest = trainer("stopped"), Quiet()
    second.resume()
    second.run(rest)
    assert before.losses + rest.losses == unbroken.losses
    assert rest.ciders == unbroken.ciders
    with refused(CheckpointError, tmp_path / "never" / "last", "without --resume"):
        trainer("never").resume()


def test_captions_are_cut_to_the_language_models_positions(
    language_model_folder: Path, clip_folder: Path, records: list[Record], live: Features, tmp_path: Path
) -> None:
    long = [replace(record, captions=(" ".join(["dog"] * 200),)) for record in records]
    settings: dict[str, Any] = {"max_caption_tokens": 500, "epochs": 1, "prompt": "A photo of"}
    trainer = make_trainer(language_model_folder, clip_folder, long, tmp_path / "run", live, **settings)
    trainer.run(Quiet())  # a position beyond the last would raise in torch
    positions = trainer.language.model.config.n_positions
    assert {len(record.prompt) + len(caption) for record in trainer.records for caption in record.captions} == {
        positions
    }
    settings["max_new_tokens"] = positions
    with refused(ConfigError, f"--max-new-tokens {positions}", "--prompt"):
        make_trainer(language_model_folder, clip_folder, long, tmp_path / "other", live, **settings)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_the_average_follows_the_weights(decay: float) -> None:
    module = nn.Linear(3, 2)
    average = moving_average(module, decay)
    expected = [weight.detach().double() for weight in module.parameters()]
    for step in range(20):
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(torch.randn(weight.shape))
        average.update_parameters(module)
        kept = min(decay, (1 + step) / (10 + step))
        pairs = zip(expected, module.parameters(), strict=True)
        expected = [kept * old + (1 - kept) * weight.detach().double() for old, weight in pairs]
        for found, value in zip(average.module.parameters(), expected, strict=True):
            torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-5)


def test_presets_are_the_papers() -> None:
    for name in ("base", "medium", "large", "large-drop18"):
        assert (PRESETS[name].batch_size, PRESETS[name].epochs, PRESETS[name].num_beams) == (4096, 30, 5)
    assert PRESETS["large-drop18"].first_adapter_layer == 18
    assert TrainConfig() == PRESETS["base"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("dropout", 1.0),
        ("warmup", -0.1),
        ("precision", "fp8"),
        ("lambda_", 0.0),
        ("score_scale", 0.0),
        ("bottleneck", 0),
        ("bottleneck", 10**20),
        ("seed", -1),
        ("seed", 10**20),
        ("epochs", 10**20),
        ("num_beams", 1025),
    ],
)
def test_settings_out_of_range_are_named_by_their_flag(field: str, value: object) -> None:
    with refused(ConfigError, flag(field), str(value)):
        resolve("base", **{field: value})


# The command line


def itune_train(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "itune.cli.train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.fixture
def arguments(language_model_folder: Path, clip_folder: Path, records: list[Record], tmp_path: Path) -> list[object]:
    lines = [json.dumps({"image": str(r.image), "captions": r.captions}) for r in records]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return [
        *("--preset", "small-data", "--data", tmp_path / "captions.jsonl", "--dev-fraction", "0.3"),
        *("--language-model", language_model_folder, "--vision", clip_folder),
        *("--precision", "fp32", "--batch-size", "6", "--num-beams", "1", "--max-new-tokens", "4"),
    ]


def test_ctrl_c_saves_and_resume_goes_on(arguments: list[object], tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "itune.cli.train", *map(str, arguments), "-o", str(output), "--epochs", "2000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (output / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    stopped = json.loads((output / "last" / "trainer.json").read_text())
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"epochs": stopped["epoch"] + 1}))
    changed = itune_train(*arguments, "-o", output, "--resume", "--heads", "2")
    assert changed.returncode == 2
    assert "--heads" in changed.stderr
    resumed = itune_train(*arguments, "-o", output, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((output / "last" / "trainer.json").read_text())["epoch"] == stopped["epoch"] + 1
    assert load_config(output / "last").training["epoch"] == stopped["epoch"] + 1
    loaded = LoadedCheckpoint.load(output)
    assert loaded.config.training["preset"] == "small-data"
    assert str(tmp_path) not in (output / "best" / "itune.json").read_text(), "a path of this machine is in the model"
    assert any((output / "tensorboard").iterdir())
    saved = (output / "config.json").read_text()
    (output / "config.json").write_text("[]")
    assert str(output / "config.json") in itune_train(*arguments, "-o", output, "--resume").stderr
    (output / "config.json").write_text(saved)
    state = output / "last" / "trainer.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    damaged = itune_train(*arguments, "-o", output, "--resume")
    assert damaged.returncode == 2
    assert str(output / "last") in damaged.stderr
    assert "Traceback" not in damaged.stderr


def test_init_from_takes_shape_and_frozen_parts_over(
    arguments: list[object], checkpoint_folder: Path, tmp_path: Path
) -> None:
    searching = shutil.copytree(checkpoint_folder, tmp_path.with_name(f"{tmp_path.name}-checkpoint"))
    config = load_config(checkpoint_folder)
    sources = {
        part: getattr(config, part).model_copy(update={"source": resolve_source(source, checkpoint_folder)})
        for part, source in (("language_model", config.language_model.source), ("vision", config.vision.source))
    }
    search = SearchDefaults(length_penalty=0.5, early_stopping=True, num_beams=9)
    save_config(config.model_copy(update={**sources, "search": search}), searching)
    data = ["--data", tmp_path / "captions.jsonl", "--dev-fraction", "0.3", "--preset", "small-data"]
    done = itune_train(
        *data, "--init-from", searching, "--epochs", "1", "--learning-rate", "1e-9", "-o", tmp_path / "run",
        "--num-beams", "2", "--max-new-tokens", "7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    own = {"num_beams": 2, "max_new_tokens": 7}
    assert load_config(tmp_path / "run" / "best").search == search.model_copy(update=own)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved | {"epochs": 2}))
    done = itune_train(*data, "--resume", "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert load_config(tmp_path / "run" / "last").search == search.model_copy(update=own)
    before, after = (load_file(f / "adapters.safetensors") for f in (checkpoint_folder, tmp_path / "run" / "last"))
    assert all(torch.allclose(after[name], tensor, atol=1e-5) for name, tensor in before.items())
    changed = itune_train(*data, "--init-from", checkpoint_folder, "--heads", "4", "-o", tmp_path / "other")
    assert changed.returncode == 2
    assert "--heads 4" in changed.stderr
    assert str(checkpoint_folder) in changed.stderr


def test_conflicts_and_missing_things_are_one_sentence(arguments: list[object], tmp_path: Path) -> None:
    def expect(named: object, *extra: object) -> None:
        done = itune_train(*arguments, "-o", tmp_path / "x", *extra, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 2, done.stderr
        assert str(named) in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr

    expect("--resume", "--resume")
    expect("somebody/gpt2", "--language-model", "somebody/gpt2")
    expect("absent.jsonl", "--data", tmp_path / "absent.jsonl")
    expect("--dev-fraction", "--dev-data", arguments[3])
    (tmp_path / "damaged.png").write_bytes(b"")
    (tmp_path / "dev.jsonl").write_text(json.dumps({"image": "damaged.png", "captions": ["a dog"]}))
    fraction = arguments.index("--dev-fraction")
    arguments = [*arguments[:fraction], *arguments[fraction + 2 :]]
    expect("dev.jsonl: ", "--dev-data", tmp_path / "dev.jsonl")  # or the last epoch would count as the best


def test_the_mends_that_messages_name_exist(arguments: list[object], tmp_path: Path) -> None:
    fraction = arguments.index("--dev-fraction")
    without_dev = [*arguments[:fraction], *arguments[fraction + 2 :]]
    refused = itune_train(*without_dev, "-o", tmp_path / "run")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1, "no configuration comes before an error in the data"
    assert "--dev-fraction 0.1" in refused.stderr
    done = itune_train(*without_dev, "--dev-fraction", "0.3", "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "before the first step: dev CIDEr-D" in done.stderr
    assert "training photos are few" in done.stderr
    more = itune_train(*arguments, "--epochs", "9", "--resume", "-o", tmp_path / "run")
    assert more.returncode == 2
    assert f"--init-from {tmp_path / 'run'}" in more.stderr
    again = itune_train(*arguments, "--epochs", "9", "--init-from", tmp_path / "run", "-o", tmp_path / "more")
    assert again.returncode == 0, again.stderr
    abbreviated = itune_train(*arguments, "--lr", "1", "-o", tmp_path / "run")
    assert "Did you mean --learning-rate?" in abbreviated.stderr
    other = itune_train(*arguments, "--resume", "--preset", "medium", "-o", tmp_path / "run")
    assert other.returncode == 2
    assert "--preset medium" in other.stderr
    saved = json.loads((tmp_path / "run" / "last" / "trainer.json").read_text())
    for wrong in ({"epoch": 99}, {"step_in_epoch": 99}, {"step": 10**30}, {"epoch": 0.5}):
        (tmp_path / "run" / "last" / "trainer.json").write_text(json.dumps(saved | wrong))
        believed = itune_train(*arguments, "--resume", "-o", tmp_path / "run")
        assert believed.returncode == 2
        assert str(tmp_path / "run" / "last" / "trainer.json") in believed.stderr
        assert believed.stderr.splitlines()[-1].startswith("itune-train: error: ")
    (tmp_path / "run" / "last" / "trainer.json").unlink()
    lost = itune_train(*arguments, "--resume", "-o", tmp_path / "run")
    assert lost.returncode == 2
    assert str(tmp_path / "run" / "last" / "trainer.json") in lost.stderr


def test_what_cannot_be_exported_is_not_trained(arguments: list[object], tmp_path: Path) -> None:
    for option, folder, field in (
        ("--language-model", make_language_model(tmp_path / "lm", activation_function="tanh"), "activation_function"),
        ("--vision", make_clip(tmp_path / "clip", hidden_act="tanh"), "hidden_act"),
    ):
        done = itune_train(*arguments, option, folder, "-o", tmp_path / "run")
        assert done.returncode == 2
        assert f"{folder / 'config.json'}: {field} 'tanh'" in done.stderr
        assert not (tmp_path / "run").exists()


def test_license_of_the_weights_that_a_run_starts_from(arguments: list[object], tmp_path: Path) -> None:
    model = Path(str(arguments[arguments.index("--language-model") + 1]))
    licensed = shutil.copytree(model, tmp_path / "licensed")
    (licensed / "LICENSE.md").write_text("For research only.")
    done = itune_train(*arguments, "--language-model", licensed, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for part in ("best", "last"):
        assert load_config(tmp_path / "run" / part).license is not None
        assert (tmp_path / "run" / part / "LICENSE.md").read_text() == "For research only."
    tower = shutil.copytree(Path(str(arguments[arguments.index("--vision") + 1])), tmp_path / "tower")
    (tower / "LICENSE.md").write_text("Name us.")
    both = itune_train(*arguments, "--language-model", licensed, "--vision", tower, "-o", tmp_path / "both")
    assert both.returncode == 0, both.stderr
    assert (tmp_path / "both" / "best" / "LICENSE.md").read_text() == "For research only.\n\nName us."
    done = itune_train(*arguments, "--init-from", tmp_path / "run", "-o", tmp_path / "next")
    assert done.returncode == 0, done.stderr
    assert load_config(tmp_path / "next" / "best").license == load_config(tmp_path / "run" / "best").license


def test_batches_follow_the_size_of_the_data() -> None:
    config = PRESETS["small-data"]
    for photos in (3, 60, 1280, 6000):
        train = [Record(Path(f"{i}.jpg"), ("a", "b", "c", "d", "e"), str(i)) for i in range(photos)]
        tokenized = [TokenizedRecord(record.image, (0,), ((1, 0),) * 5, True) for record in train]
        fitting = config.model_copy(update={"batch_size": fitting_batch_size(config, train)})
        assert steps_per_epoch(tokenized, fitting) >= min(20, photos)
        assert fitting.batch_size == config.batch_size or photos < 1280


def test_advice_about_captions(language_model_folder: Path) -> None:
    tokenizer = load_language_model(str(language_model_folder)).tokenizer

    def advice(caption: str, longest: int) -> str:
        train = [Record(Path("a.jpg"), (caption,), "a")] * 1000
        records = tokenize(train, tokenizer, TextSettings(), longest)
        return " ".join(data_advice(train, records, tokenizer, tokenizer.token_to_id("<|endoftext|>")))

    assert advice("a", 64) == ""
    assert "1000 of 1000" in advice("dogs on grass", 2)
    assert "tokens a word" in advice("犬が草の上を走る", 64)
    assert "a cat" in " ".join(caption_advice(["a dog", *["a cat"] * 19]))
    assert "'5 dogs on a'" in " ".join(caption_advice([f"{i} dogs{' on a' * (i == 5)}" for i in range(19)]))
    assert caption_advice([f"{i} dogs" for i in range(20)]) == []


def test_numbers_that_are_not_finite_before_the_first_step_name_their_cause(
    arguments: list[object], tmp_path: Path
) -> None:
    done = itune_train(*arguments, "--lambda", "1e40", "-o", tmp_path / "run")
    assert done.returncode == 2
    assert "--lambda" in done.stderr.splitlines()[-1]
