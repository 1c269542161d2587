"""itune-eval --captions: captions from anywhere, domains, comparisons, without torch; and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from itune.cli.evaluate import main
from itune.metrics import evaluate
from tests.conftest import CAPTIONS

NO_TORCH = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors", "onnx", "onnxruntime"):
            raise ImportError(f"{name} is behind the wall")
sys.meta_path.insert(0, Wall())
from itune.cli.evaluate import main
main()
"""
SCORES = ("cider", "bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "spice")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NO_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one sentence that the command has for these arguments."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["itune-eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert end.value.code == 2
        assert captured.out == ""
        assert captured.err.startswith("itune-eval: error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return call


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def results(path: Path, captions: dict[int, str]) -> Path:
    return write_json(path, [{"image_id": key, "caption": text} for key, text in captions.items()])


TRUTH = {i: [CAPTIONS[i % 6], CAPTIONS[(i + 1) % 6]] for i in range(60)}
GOOD = {i: CAPTIONS[i % 6].replace("the", "a") for i in TRUTH}
WORSE = {i: CAPTIONS[i % 6] if i % 3 == 1 else "A dog sits on a table ." for i in TRUTH}


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """NoCaps' format: ids 0 to 9 in domain, 10 to 29 near it, the others out of it."""
    domains = {i: "in-domain" if i < 10 else "near-domain" if i < 30 else "out-domain" for i in TRUTH}
    images = [{"id": i, "file_name": f"{i}.jpg", "domain": domains[i]} for i in TRUTH]
    annotations = [{"image_id": i, "caption": text} for i, texts in TRUTH.items() for text in texts]
    return write_json(tmp_path / "nocaps_val.json", {"images": images, "annotations": annotations})


def test_scores_of_a_file(tmp_path: Path, references: Path) -> None:
    file, scores, each = results(tmp_path / "r.json", GOOD), tmp_path / "new" / "scores.json", tmp_path / "each.jsonl"
    done = run("--captions", file, "--references", references, "--json", scores, "--per-image", each, "--no-java")
    assert done.returncode == 0, done.stderr
    found = json.loads(scores.read_text(encoding="utf-8"))
    expected = evaluate({str(k): v for k, v in GOOD.items()}, {str(k): v for k, v in TRUTH.items()}, java=False)
    assert {name: found[name] for name in expected.names} == pytest.approx(expected.scores())
    assert found["meteor"] is found["spice"] is None
    assert found["missing"] == dict.fromkeys(("meteor", "spice"), "left out, as it needs Java")
    assert (found["images"], found["failed"], found["uncaptioned"]) == (60, 0, 0)
    assert {n: v["images"] for n, v in found["domains"].items()} == {
        "in-domain": 10,
        "near-domain": 20,
        "out-domain": 30,
    }
    for group in (found, *found["domains"].values()):
        for name, (low, high) in group["intervals"].items():
            assert low <= group[name] + 1e-9, name
            assert group[name] <= high + 1e-9, name
    inside = evaluate({str(k): GOOD[k] for k in range(10)}, {str(k): TRUTH[k] for k in range(10)}, java=False)
    assert found["domains"]["in-domain"]["cider"] == pytest.approx(inside.scores()["cider"])

    lines = [json.loads(line) for line in each.read_text(encoding="utf-8").splitlines()]
    assert [line["image_id"] for line in lines] == [str(i) for i in TRUTH]
    assert lines[3] == pytest.approx(
        {"image_id": "3", "caption": GOOD[3], "domain": "in-domain"}
        | {name: values[3] for name, values in expected.per_image().items()}
    )

    for word in ("CIDEr-D", "BLEU-4", "ROUGE-L", "in-domain (10)", "overall (60)", f"{100 * found['cider']:.2f}"):
        assert word in done.stdout
    assert "METEOR" not in done.stdout
    assert "METEOR: left out, as it needs Java" in done.stderr
    assert "SPICE: left out, as it needs Java" in done.stderr


def test_json_alone_is_printed(tmp_path: Path, references: Path) -> None:
    file = results(tmp_path / "r.json", GOOD)
    done = run("--captions", file, "--json", "--no-java", "--references", references)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 60
    for flag in (["--json"], ["--json", "-"]):
        assert run("--captions", file, "--no-java", "--references", references, *flag).stdout == done.stdout


def compared(tmp_path: Path, references: Path, one: dict[int, str], two: dict[int, str]) -> tuple[dict[str, Any], str]:
    files = [results(tmp_path / name, captions) for name, captions in (("one.json", one), ("two.json", two))]
    options = ["--captions", files[0], "--captions", files[1], "--references", references, "--no-java"]
    done = run(*options, "--json", tmp_path / "scores.json", "--per-image", tmp_path / "each.jsonl")
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "scores.json").read_text()), done.stdout


def test_a_difference_is_shown(tmp_path: Path, references: Path) -> None:
    found, table = compared(tmp_path, references, WORSE, dict(reversed(GOOD.items())))
    difference = found["comparison"]["overall"]["cider"]
    assert difference["difference"] == pytest.approx(found["against"]["cider"] - found["cider"])
    assert difference["significant"] is True
    assert difference["p"] <= difference["p_holm"] < 0.05
    assert difference["interval"][0] > 0
    assert f"{100 * difference['difference']:+.2f}" in table
    assert "one.json against two.json" in table
    assert "correction for 24 scores" in " ".join(table.split())
    assert found["comparison"].keys() == {"in-domain", "near-domain", "out-domain", "overall"}
    lines = [json.loads(line) for line in (tmp_path / "each.jsonl").read_text().splitlines()]
    assert {(Path(line["captions"]).name, line["image_id"]) for line in lines} == {
        (name, str(i)) for name in ("one.json", "two.json") for i in TRUTH
    }


def test_noise_is_not(tmp_path: Path, references: Path) -> None:
    """One caption of 60 is better: a difference, but chance would make one as large."""
    found, table = compared(tmp_path, references, WORSE, WORSE | {2: GOOD[2]})
    difference = found["comparison"]["overall"]["cider"]["difference"]
    assert difference > 0
    assert not any(value["significant"] for group in found["comparison"].values() for value in group.values())
    assert f"{100 * difference:+.2f}" not in table
    assert "+" not in table


def test_images_without_a_caption_are_told(tmp_path: Path, references: Path) -> None:
    file = results(tmp_path / "r.json", {k: GOOD[k] for k in range(40)})
    done = run("--captions", file, "--references", references, "--json", "--no-java")
    assert json.loads(done.stdout)["uncaptioned"] == 20
    assert "20 of 60 images have no caption and do not count" in " ".join(done.stderr.split())


def test_karpathys_split_is_chosen(tmp_path: Path) -> None:
    images = [
        {"filename": f"{i}.jpg", "cocoid": i, "split": "test" if i < 4 else "val", "sentences": [{"raw": CAPTIONS[i]}]}
        for i in range(6)
    ]
    references = write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    file = results(tmp_path / "r.json", {i: CAPTIONS[i] for i in range(4)})
    done = run("--captions", file, "--references", references, "--split", "test", "--json", "--no-java")
    found = json.loads(done.stdout)
    assert (found["images"], found["uncaptioned"]) == (4, 0)
    assert found["bleu4"] == pytest.approx(1)
    assert "domains" not in found


def test_mistakes(tmp_path: Path, references: Path, refused: Callable[..., str]) -> None:
    file = results(tmp_path / "r.json", GOOD)
    both = ["--captions", file, "--references", references, "--no-java"]
    assert "--captions needs --references" in refused("--captions", file)
    assert "--captions is there 3 times" in refused(*both, "--captions", file, "--captions", file)
    assert "CHECKPOINT_OR_BUNDLE contradicts --captions" in refused("default", *both)
    assert "--num-beams contradicts --captions" in refused(*both, "--num-beams", "5")
    assert "--output contradicts --captions" in refused(*both, "-o", "x.json")
    assert "--references is for --captions" in refused("default", "--data", references, "--references", references)
    assert "CHECKPOINT_OR_BUNDLE is missing" in refused("--data", references)
    assert "--data is missing" in refused("default")
    assert f"error: --json {tmp_path} is no file: name one" in refused(*both, "--json", tmp_path)
    sentence = refused("default", "--data", references, "--output", tmp_path)
    assert f"error: --output {tmp_path} is no file: name one" in sentence
    sentence = refused(*both, "--per-image", file / "scores.jsonl")
    assert f"--per-image {file / 'scores.jsonl'}: {file} is no folder: name another" in sentence
    before = file.read_bytes(), references.read_bytes()
    for option in ("--json", "--per-image"):
        assert f"error: {option} would replace the captions {file}: name" in refused(*both, option, file)
        assert f"error: {option} would replace the references {references}" in refused(*both, option, references)
    sentence = refused("default", "--data", references, "--output", references)
    assert f"error: --output would replace the captions of --data {references}: name another place" in sentence
    twice = tmp_path / "new.json"
    sentence = refused("default", "--data", references, "--output", twice, "--json", tmp_path / "." / "new.json")
    assert f"error: --output and --json would both be written to {twice}: name another place" in sentence
    assert (file.read_bytes(), references.read_bytes(), twice.exists()) == (*before, False)
    assert "split test" in refused(*both, "--split", "test")
    other = results(tmp_path / "other.json", GOOD | {99: "a dog"})
    sentence = refused("--captions", other, "--references", references)
    assert "other.json: 1 of its 61 images have no reference captions (the first: '99')" in sentence
    fewer = results(tmp_path / "fewer.json", {k: GOOD[k] for k in range(1, 60)})
    sentence = refused(*both, "--captions", fewer)
    assert "fewer.json: has no caption of 1 images of" in sentence
    assert "only captions of the same images can be compared" in sentence
    write_json(fewer, {"7": "a dog"})
    assert "fewer.json" in refused("--captions", fewer, "--references", references)
    fewer.write_bytes(b'[{"image_id": 1, "caption": "caf\xe9"}]')
    sentence = refused("--captions", fewer, "--references", references)
    assert all(value in sentence for value in ("fewer.json", "0xe9", "position 32"))


@pytest.mark.parametrize("domain", ["[/x]", "[indoor]"])
def test_names_are_no_markup(tmp_path: Path, domain: str) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg", "domain": domain} for i in TRUTH]
    annotations = [{"image_id": i, "caption": text} for i, texts in TRUTH.items() for text in texts]
    references = write_json(tmp_path / "refs.json", {"images": images, "annotations": annotations})
    file = results(tmp_path / "run[v2].json", GOOD)
    done = run("--captions", file, "--references", references, "--no-java")
    assert done.returncode == 0, done.stderr
    assert f"{domain} (60)" in done.stdout
    assert "run[v2].json" in done.stdout


def test_no_domain_is_called_as_the_whole(tmp_path: Path, refused: Callable[..., str]) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg", "domain": "overall"} for i in TRUTH]
    annotations = [{"image_id": i, "caption": text} for i, texts in TRUTH.items() for text in texts]
    references = write_json(tmp_path / "refs.json", {"images": images, "annotations": annotations})
    file = results(tmp_path / "r.json", GOOD)
    assert "is called 'overall'" in refused("--captions", file, "--references", references, "--no-java")


def test_empty_captions_score_nothing(tmp_path: Path, references: Path) -> None:
    file = results(tmp_path / "r.json", dict.fromkeys(TRUTH, ""))
    found = json.loads(run("--captions", file, "--references", references, "--json", "--no-java").stdout)
    assert found["cider"] == found["rouge_l"] == 0
    assert found["bleu4"] == pytest.approx(0, abs=1e-6)
