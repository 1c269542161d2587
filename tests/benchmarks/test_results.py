"""The comparison of methods end to end on tiny models, and the page that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from itune.runtime.errors import ItuneError
from tests.conftest import CAPTIONS, REPOSITORY, random_photo

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with a smaller budget."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import method_runs
    import results

    monkeypatch.setitem(method_runs.BUDGET, "--epochs", "1")
    monkeypatch.setitem(method_runs.BUDGET, "--num-beams", "1")
    monkeypatch.setattr(results, "_PHOTOS", 2)
    return results


@pytest.fixture
def work(tmp_path: Path, language_model_folder: Path, clip_folder: Path) -> Path:
    """A work folder like the recipe's, with four photos."""
    (tmp_path / "language-model").symlink_to(language_model_folder)
    (tmp_path / "vision").symlink_to(clip_folder)
    lines = []
    for i in range(4):
        random_photo(i).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "captions": [CAPTIONS[i], CAPTIONS[i + 1]]}))
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.slow
def test_methods_are_trained_scored_timed_and_written(results: ModuleType, work: Path) -> None:
    output = work / "docs" / "results.md"
    options = ["--work-dir", str(work), "--methods", "i-tuning,clipcap,smallcap", "--no-java", "--output", str(output)]
    with pytest.raises(ItuneError) as error:
        results.main(["write", *options])
    assert "scores.json" in str(error.value)
    for stage in ("train", "score", "latency", "write"):
        results.main([stage, *options])
    names = [row["name"] for row in json.loads(output.with_suffix(".json").read_text())["rows"]]
    assert names == ["i-tuning", "clipcap", "smallcap", "smallcap-retrieve-0"]
    page = output.read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[2:6]] == [
        "| I-Tuning", "| ClipCap, transformer mapper", "| SmallCap", "| SmallCap, empty datastore"
    ]  # fmt: skip
    assert "\n4 photos of Flickr8k for 1 epochs" in page
    assert output.with_suffix(".png").read_bytes().startswith(PNG)
    before = {path: path.stat().st_mtime_ns for path in (work / "methods").rglob("*.safetensors")}
    results.main(["train", *options])
    assert {path: path.stat().st_mtime_ns for path in (work / "methods").rglob("*.safetensors")} == before


def test_a_difference_that_is_noise_is_not_shown(results: ModuleType, tmp_path: Path) -> None:
    from results_tables import write_results

    def row(name: str, significant: bool | None) -> dict[str, object]:
        interval = {score: [0.1, 0.3] for score in ("cider", "bleu4")}
        scores = {"cider": 0.2, "bleu4": 0.2, "meteor": None, "images": 7, "intervals": interval}
        against = {"cider": {"difference": 0.05, "significant": significant}}
        return {
            "name": name,
            "title": name.upper(),
            "trainable": 5e6,
            "resources": {"cpu_seconds": 600.0, "peak_mib": 2048.0},
            "scores": scores,
            "against": None if significant is None else against,
        }

    ms = {name: {"p10": 1.0, "median": 2.0, "p90": 3.0} for name in ("a", "b")}
    machine = {"threads": 2, "cpu": "a CPU", "date": "2026-11-26T00:00:00"}
    write_results(
        {
            "budget": {"photos": 9, "epochs": 2, "num_beams": 5, "retrieve": 4, "flags": {"--dev-images": "300"}},
            "rows": [row("a", None), row("b", True), row("c", False)],
            "latency": {
                "ms": ms,
                "machine": machine,
                "photos": 4,
                "num_beams": 5,
                "precision": "int8",
                "retrieved": {"b": 1.74},
            },
        },
        tmp_path / "results.md",
    )
    lines = {line.split(" | ")[0]: line for line in (tmp_path / "results.md").read_text().splitlines()}
    assert "| A |  | 5.00M | 10 min | 2.0 GiB | 20.0 (10.0-30.0) |  | " in lines["| A"]
    assert " | +5.0 | " in lines["| B"]
    assert lines["| B"].startswith("| B | 1.7 | ")
    assert " | within noise | " in lines["| C"]
    assert " | not measured | " in lines["| C"]


def test_mistakes_are_one_sentence(results: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ItuneError) as error:
        results.main(["score", "--work-dir", str(tmp_path)])
    assert str(tmp_path) in str(error.value)
    assert "train.jsonl" in str(error.value)
    with pytest.raises(ItuneError) as error:
        results.main(["score", "--work-dir", str(tmp_path), "--methods", "prefix"])
    assert "'prefix'" in str(error.value)
    assert "i-tuning" in str(error.value)
