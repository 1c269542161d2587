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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--captions", "R"], ["--captions", "--references"]),
        (["BOTH", "--captions", "R", "--captions", "R"], ["--captions", "3"]),
        (["default", "BOTH"], ["CHECKPOINT_OR_BUNDLE", "--captions"]),
        (["BOTH", "--num-beams", "5"], ["--num-beams", "--captions"]),
        (["BOTH", "-o", "x.json"], ["--output", "--captions"]),
        (["default", "--data", "REFS", "--references", "REFS"], ["--references", "--captions"]),
        (["--data", "REFS"], ["CHECKPOINT_OR_BUNDLE"]),
        (["default"], ["--data"]),
        (["default", "--data", "REFS", "--limit", "0"], ["--limit", "'0'"]),
        (["default", "--data", "REFS", "--output", "FOLDER"], ["--output", "FOLDER"]),
        (["BOTH", "--json", "FOLDER"], ["--json", "FOLDER"]),
        (["BOTH", "--per-image", "R/scores.jsonl"], ["--per-image", "R/scores.jsonl"]),
        (["BOTH", "--json", "R"], ["--json", "R", "--captions"]),
        (["BOTH", "--per-image", "R"], ["--per-image", "R", "--captions"]),
        (["BOTH", "--json", "REFS"], ["--json", "REFS", "--references"]),
        (["default", "--data", "REFS", "--output", "REFS"], ["--output", "REFS", "--data"]),
        (
            ["default", "--data", "REFS", "-o", "FOLDER/new", "--json", "FOLDER/./new"],
            ["--output", "--json", "FOLDER/new"],
        ),
        (["BOTH", "--split", "test"], ["REFS", "test"]),
        (["BOTH", "--captions", ""], ["--captions"]),
    ],
)
def test_mistakes(
    arguments: list[str], named: list[str], tmp_path: Path, references: Path, refused: Callable[..., str]
) -> None:
    file = results(tmp_path / "r.json", GOOD)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def put(text: str) -> str:
        return text.replace("REFS", str(references)).replace("FOLDER", str(tmp_path)).replace("R/", f"{file}/")

    line: list[object] = []
    for argument in arguments:
        both = ["--captions", file, "--references", references, "--no-java"]
        line += both if argument == "BOTH" else [file] if argument == "R" else [put(argument)]
    sentence = refused(*line)
    for part in named:
        assert (str(file) if part == "R" else put(part)) in sentence
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_captions_that_do_not_fit_the_references(tmp_path: Path, references: Path, refused: Callable[..., str]) -> None:
    file, other = results(tmp_path / "r.json", GOOD), tmp_path / "other.json"
    results(other, GOOD | {99: "a dog"})
    sentence = refused("--captions", other, "--references", references)
    assert "other.json" in sentence
    assert "'99'" in sentence
    results(other, {k: GOOD[k] for k in range(1, 60)})
    sentence = refused("--captions", file, "--captions", other, "--references", references, "--no-java")
    assert "other.json" in sentence
    assert "'0'" in sentence
    for content in (b'{"7": "a dog"}', b'[{"image_id": 1, "caption": "caf\xe9"}]'):
        other.write_bytes(content)
        assert "other.json" in refused("--captions", other, "--references", references)


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
    assert "'overall'" in refused("--captions", file, "--references", references, "--no-java")


def test_empty_captions_score_nothing(tmp_path: Path, references: Path) -> None:
    file = results(tmp_path / "r.json", dict.fromkeys(TRUTH, ""))
    found = json.loads(run("--captions", file, "--references", references, "--json", "--no-java").stdout)
    assert found["cider"] == found["rouge_l"] == 0
    assert found["bleu4"] == pytest.approx(0, abs=1e-6)


def test_what_is_odd_about_the_scores_is_told(tmp_path: Path) -> None:
    references = write_json(
        tmp_path / "references.json",
        {
            "images": [{"id": 1}, {"id": 2}],
            "annotations": [{"image_id": 1, "caption": "."}, {"image_id": 2, "caption": "a"}],
        },
    )
    done = run(
        "--captions", results(tmp_path / "a.json", {1: "a dog", 2: "a"}), "--references", references, "--no-java"
    )
    assert done.returncode == 0
    assert "1 references" in done.stderr
    alone = run("--captions", results(tmp_path / "b.json", {2: "a"}), "--references", references, "--no-java")
    assert "single image" in alone.stderr
