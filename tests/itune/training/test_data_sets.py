"""Several data sets in one run, their weights and names, and what the dev evaluation reports."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from itune.cli.data_sets import DataSets
from itune.cli.train import main
from itune.data.features import Features
from itune.data.records import DataError, Record, short_names
from itune.training.advice import bad_endings
from itune.training.batches import TokenizedRecord, epoch_size, epoch_steps, images_per_step, steps_per_epoch
from itune.training.config import TrainConfig
from itune.training.loop import Interrupted
from itune.training.run_folder import fingerprint
from tests.conftest import refused
from tests.itune.training.test_loop import Quiet, live, make_trainer

__all__ = ["live"]
CONFIG = TrainConfig(batch_size=60, images_per_forward=8, flip=True)


def photos_with(captions: int, count: int, weight: float = 1.0, start: int = 0) -> list[TokenizedRecord]:
    rng = np.random.default_rng(start)
    return [
        TokenizedRecord(
            Path(str(start + i)), (0,), tuple((1,) * rng.integers(2, 12) for _ in range(captions)), True, weight
        )
        for i in range(count)
    ]


def drawn(records: list[TokenizedRecord], epoch: int) -> list[str]:
    return [str(image) for step in epoch_steps(records, CONFIG, epoch) for batch in step for image in batch.images]


def test_one_data_set_is_drawn_as_by_earlier_versions() -> None:
    records = photos_with(5, 50)
    steps = [[batch.images for batch in step] for step in epoch_steps(records, CONFIG, 3)]
    rng = np.random.default_rng([CONFIG.seed, 3])
    order, flips = rng.permutation(50), rng.random(50) < 0.5
    longest = {i: max(map(len, record.captions)) for i, record in enumerate(records)}
    expected = []
    for start in range(0, 50, 12):
        chosen = sorted(order[start : start + 12], key=lambda i: (longest[i], i), reverse=True)
        expected.append([tuple(Path(str(i)) for i in chosen[at : at + 8]) for at in range(0, len(chosen), 8)])
    assert steps == expected
    assert [flip for step in epoch_steps(records, CONFIG, 3) for batch in step for flip in batch.flip] == [
        flips[int(image.name)] for step in steps for images in step for image in images
    ]


def test_a_photo_is_drawn_as_often_as_its_weight_says() -> None:
    records = [*photos_with(5, 20, 2.25), *photos_with(1, 40, 0.5, 100), *photos_with(2, 10, 1.0, 200)]
    counts = [Counter(drawn(records, epoch)) for epoch in (0, 1)]
    assert counts[0] == Counter(drawn(records, 0)) != counts[1]
    for count in counts:
        assert Counter(count[str(i)] for i in range(20)) == {2: 15, 3: 5}
        assert Counter(count[str(i)] for i in range(100, 140)) == {0: 20, 1: 20}
        assert {count[str(i)] for i in range(200, 210)} == {1}
        assert count.total() == epoch_size(records) == 45 + 20 + 10
    assert images_per_step(records, 60) == round(60 / (265 / 75))
    assert len(list(epoch_steps(records, CONFIG, 0))) == steps_per_epoch(records, CONFIG) == 5
    assert epoch_size(photos_with(5, 3, 0.01)) == 1


def test_photos_with_one_caption_are_not_padded_to_those_with_ten() -> None:
    records = [*photos_with(10, 60), *photos_with(1, 60, start=100)]
    config = CONFIG.model_copy(update={"batch_size": 330})
    batches = [batch for step in epoch_steps(records, config, 0) for batch in step]
    rows = sum(len(batch.input_ids) for batch in batches)
    captions = sum(int(batch.mask.any(1).sum()) for batch in batches)
    assert captions == 660
    assert rows < 1.3 * captions  # 1,200 rows if each part had photos of both sets


def test_names_tell_files_apart(tmp_path: Path) -> None:
    for folder in ("coco", "own.photos"):
        (tmp_path / folder).mkdir()
    same = [tmp_path / folder / "captions.jsonl" for folder in ("coco", "own.photos")]
    assert short_names([tmp_path / "coco.jsonl", tmp_path / "own.photos"]) == ["coco", "own.photos"]
    assert short_names(same) == ["coco-captions", "own.photos-captions"]
    with refused(DataError, same[0]):
        short_names([*same, same[0]])


def test_the_fingerprint_of_one_set_is_that_of_earlier_versions() -> None:
    train, dev = Record(Path("a"), ("a dog",), "a"), Record(Path("b"), ("a cat",), "b")
    earlier = hashlib.sha256(b'["a", ["a dog"]]\n\n["b", ["a cat"]]\n\n').hexdigest()
    assert fingerprint([train], [dev]) == earlier
    assert fingerprint([Record(Path("a"), ("a dog",), "a", weight=2.0)], [dev]) != earlier


def test_bad_endings_are_counted() -> None:
    captions = ["A man rides a horse.", "a man on a", "A man and .", "a dog on", "", "two dogs"]
    assert bad_endings(captions) == 0.5


def test_patience_ends_a_run_also_when_it_is_resumed(
    language_model_folder: Path, clip_folder: Path, records: list[Record], live: Features, tmp_path: Path
) -> None:
    settings = {"epochs": 9, "patience": 2, "learning_rate": 0.0, "batch_size": 100}

    def run(output: str, reporter: Quiet) -> int:
        trainer = make_trainer(language_model_folder, clip_folder, records, tmp_path / output, live, **settings)
        if (tmp_path / output).exists():
            trainer.resume()
        if reporter.after:
            reporter.stop = trainer
        return trainer.run(reporter).epoch

    assert run("whole", Quiet()) == 3, "the first epoch is the best of equals, and two more are waited for"
    assert run("whole", Quiet()) == 3
    with pytest.raises(Interrupted):
        run("stopped", Quiet(after=2))
    rest = Quiet()
    assert run("stopped", rest) == 3
    assert len(rest.ciders) == 2


# The command line

Run = Callable[..., str]


@pytest.fixture
def run(
    language_model_folder: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run itune-train; returns what it says, with its exit status at the end."""

    def runner(*arguments: object) -> str:
        options = ["--language-model", language_model_folder, "--vision", clip_folder, "--preset", "small-data"]
        options += ["--precision", "fp32", "--num-beams", 1, "--max-new-tokens", 4, "--epochs", 2]
        monkeypatch.setattr("sys.argv", ["itune-train", *map(str, [*options, *arguments])])
        with pytest.raises(SystemExit) as ended:
            main()
        return f"{capsys.readouterr().err} {ended.value.code or 0}"

    return runner


def test_two_data_sets(run: Run, records: list[Record], tmp_path: Path) -> None:
    def write(name: str, chosen: list[Record]) -> Path:
        lines = [{"image": str(r.image), "captions": r.captions, "id": str(i)} for i, r in enumerate(chosen)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        return path

    few, many = write("few", records[:1]), write("many", records[1:2])
    dev1, dev2 = write("d1", records[2:3]), write("d2", records[3:])
    data = ["--data", few, "--data", many]
    command = [*data, "--data-weight", 3, "--data-weight", 0.5, "--dev-data", dev1, "--dev-data", dev2]
    said = run(*command, "--dev-images", 1, "-o", tmp_path / "run")
    assert said.endswith(" 0"), said
    assert "2 (few 1, many 1) training photos, 2 (d1 1, d2 1) dev photos" in " ".join(said.split())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["cider"] == fmean([line["cider_d1"], line["cider_d2"]])
        assert list(line["samples"]) == ["d1/0", "d2/0"]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert {"dev/cider", "dev/cider_d1", "dev/cider_d2", "dev/bad_endings"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["samples/d1/0", "samples/d2/0"]
    assert len(board.Tensors("samples/d1/0/text_summary")) == 3, "before the first step, and after each epoch"

    config = json.loads((tmp_path / "run" / "config.json").read_text())
    earlier = {name: value for name, value in config.items() if name not in ("objective", "scst_samples", "patience")}
    (tmp_path / "run" / "config.json").write_text(json.dumps(earlier))
    assert run(*command, "--dev-images", 1, "-o", tmp_path / "run", "--resume").endswith(" 0")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert len(board.Scalars("dev/cider")) == 2, "resuming keeps the curves"
    both = tmp_path / "both.jsonl"
    rows = [{"image": f"{i}.png", "captions": ["a dog"], "split": split} for i, split in enumerate(("train", "dev"))]
    both.write_text("\n".join(map(json.dumps, rows)))
    for i, record in enumerate(records[:2]):
        (tmp_path / str(i)).mkdir()
        shutil.copy(record.image, tmp_path / str(i) / f"{i}.png")
    sets = DataSets(data=(both,), dev_data=(both,), images=(tmp_path / "0", tmp_path / "1"), skip_missing=True)
    found = [[record.image for record in split[both]] for split in sets.load(0)]
    assert found == [[tmp_path / "0" / "0.png"], [tmp_path / "1" / "1.png"]]
    other = [*data, "--data-weight", 2, "--data-weight", 0.5, *command[8:], "--dev-images", 1]
    said = run(*other, "-o", tmp_path / "run", "--resume")
    assert said.endswith(" 2")
    assert str(tmp_path / "run" / "last") in "".join(said.split())
    for wrong, named in (
        ([*data, "--data-weight", 2], "1 --data-weight for 2 --data"),
        ([*command, "--images", tmp_path, "--images", tmp_path], "2 --images for 4"),
        (["--data", few, "--data-weight", 0], "--data-weight"),
        (["--data", few, "--data-weight", 1e30], "--data-weight"),
        (["--data", few, "--data", few], str(few)),
        (["--data", few, "--dev-data", dev1, "--dev-data", dev1], str(dev1)),
        (["--data", few, "--dev-data", dev1, "--objective", "scst"], "--init-from"),
    ):
        said = run(*wrong, "-o", tmp_path / "wrong")
        assert said.endswith(" 2")
        assert named in " ".join(said.split())
        assert "Traceback" not in said


def test_a_fraction_is_held_out_of_each_set(run: Run, records: list[Record], tmp_path: Path) -> None:
    data: list[object] = []
    for name, chosen in (("a", records[:2]), ("b", records[2:])):
        (tmp_path / f"photos-{name}").mkdir()
        for i, record in enumerate(chosen):  # the same names in both folders
            shutil.copy(record.image, tmp_path / f"photos-{name}" / f"{i}.png")
        lines = [json.dumps({"image": f"{i}.png", "captions": r.captions}) for i, r in enumerate(chosen)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        data += ["--data", tmp_path / f"{name}.jsonl", "--images", tmp_path / f"photos-{name}"]
    said = run(*data, "--dev-fraction", 0.3, "-o", tmp_path / "run")
    assert said.endswith(" 0"), said
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"cider", "cider_a", "cider_b", "bad_endings"} <= line.keys()
