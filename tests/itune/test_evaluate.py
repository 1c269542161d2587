"""itune-eval on a checkpoint and on its bundle, and the results that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from itune.cli.evaluate import main
from itune.data.features import Features
from itune.data.records import Record
from itune.eager import EagerEngine
from itune.evaluate import caption_features, caption_records, score_captions, write_results
from itune.loading import LoadedCheckpoint, load_captioner
from itune.runtime.search import SearchConfig
from tests.conftest import CAPTIONS


@pytest.fixture
def records(photos: list[Path]) -> list[Record]:
    return [Record(path, tuple(CAPTIONS[i : i + 2]), str(i)) for i, path in enumerate(photos[:5])]


def test_captions_from_photos_and_from_their_embeddings_are_the_same(
    checkpoint_folder: Path, records: list[Record]
) -> None:
    captions, failed = caption_records(load_captioner(checkpoint_folder), records, num_beams=3, max_new_tokens=6)
    assert not failed
    loaded = LoadedCheckpoint.load(checkpoint_folder)
    features = Features(loaded.tower)
    from_features = caption_features(
        EagerEngine(loaded.model, loaded.tower),
        features,
        [record.image for record in records],
        loaded.language.tokenizer,
        loaded.config.text,
        SearchConfig(num_beams=3, max_new_tokens=6),
    )
    assert list(captions.values()) == from_features
    assert len(set(from_features)) > 1


def test_a_bad_photo_is_left_out_and_named(checkpoint_folder: Path, records: list[Record], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not a photo")
    captioner = load_captioner(checkpoint_folder)
    captions, failed = caption_records(
        captioner, [records[0], Record(bad, ("x",), "bad"), records[1]], num_beams=1, max_new_tokens=3
    )
    assert list(captions) == ["0", "1"]
    assert list(failed) == [bad]
    assert "bad.jpg" in failed[bad]


def test_scores_are_those_of_the_references(records: list[Record]) -> None:
    perfect = {record.id: record.captions[0] for record in records}
    scores = score_captions(perfect, records)
    assert scores["bleu4"] == pytest.approx(1.0)
    swapped = dict(zip(perfect, reversed(perfect.values()), strict=True))
    assert score_captions(swapped, records)["cider"] < scores["cider"]


def test_results_are_in_cocos_format(tmp_path: Path) -> None:
    write_results({"12": "a dog", "photo_a": "ein Straßenhund"}, tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results == [{"image_id": 12, "caption": "a dog"}, {"image_id": "photo_a", "caption": "ein Straßenhund"}]
    write_results({"007": "a dog", "7": "a cat"}, tmp_path / "results.json")
    assert [r["image_id"] for r in json.loads((tmp_path / "results.json").read_text())] == ["007", 7]


def test_command_line(checkpoint_folder: Path, records: list[Record], tmp_path: Path) -> None:
    data = tmp_path / "dev.jsonl"
    lines = [{"image": str(r.image), "captions": r.captions, "split": "dev", "id": r.id} for r in records]
    data.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "itune.cli.evaluate", checkpoint_folder, "--data", data, "--split", "dev"]
    options = ["--num-beams", "2", "--max-new-tokens", "5", "--no-java", "-o", tmp_path / "out.json"]
    run = subprocess.run(list(map(str, [*command, *options, "--json"])), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    scores = json.loads(run.stdout)
    numbers = {"cider", "bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "spice"}
    assert scores.keys() == numbers | {"images", "failed", "uncaptioned", "missing", "intervals"}
    assert scores["images"] == 5
    assert len(json.loads((tmp_path / "out.json").read_text())) == 5
    refused = subprocess.run(
        list(map(str, [*command, "--num-beams", "0"])), capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_a_split_without_references(
    checkpoint_folder: Path,
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """NoCaps' test split: the file that EvalAI takes, and nothing to score."""
    info = tmp_path / "nocaps_test_image_info.json"
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no photo")
    images = [{"id": 10 + i, "file_name": str(path)} for i, path in enumerate([*photos[:3], bad])]
    info.write_text(json.dumps({"images": images}), encoding="utf-8")
    output = tmp_path / "evalai.json"
    command = ["itune-eval", checkpoint_folder, "--data", info, "--split", "test", "--max-new-tokens", "5"]

    def run(*options: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", list(map(str, [*command, "--num-beams", 1, *options])))
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert captured.out == ""
        return end.value.code, " ".join(captured.err.split())

    assert run("-o", output)[0] in (0, None)
    results = json.loads(output.read_text(encoding="utf-8"))
    assert [result["image_id"] for result in results] == [10, 11, 12]
    assert all(result.keys() == {"image_id", "caption"} for result in results)
    _, said = run("-o", output)
    assert "3 captions" in said
    assert "1 could not be read" in said
    status, said = run()
    assert status == 2
    assert str(info) in said
    assert "--output" in said
    assert run("-o", output, "--json")[0] == 2
