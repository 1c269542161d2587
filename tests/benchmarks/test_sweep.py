"""The sweep end to end on tiny models: it measures every point once, resumes, and draws."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from itune.export.bundle import export_bundle
from itune.export.options import ExportOptions
from tests.conftest import REPOSITORY

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with the checkpoints and bundles in it, as an earlier sweep leaves them."""
    work = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        from random_init import build_checkpoint
    for name, size in sizes().items():
        export_bundle(build_checkpoint(size, work / name), work / name / "bundle-fp32", ExportOptions(verify=False))
    return work


def sizes() -> dict[str, Any]:
    """Two tiny geometries; their module is there already."""
    import random_init

    tiny: dict[str, Any] = {
        "heads": 4,
        "vocab_size": 600,
        "positions": 64,
        "vision_width": 48,
        "vision_layers": 2,
        "vision_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return {name: random_init.Geometry(width=64, layers=layers, **tiny) for name, layers in (("one", 1), ("two", 2))}


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with fewer sweeps and sizes."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import random_init
    import sweep

    monkeypatch.setattr(random_init, "GEOMETRIES", sizes())
    monkeypatch.setattr(sweep, "SWEEPS", {"beams": ("num_beams", (2, 5)), "batch": ("batch_size", (1, 3))})
    return sweep


def run(sweep: ModuleType, work: Path, *options: str) -> dict[str, Any]:
    command = ["--work-dir", work, "--json", work / "sweep.json", "--plots", work, "--precisions", "fp32"]
    command += ["--threads", 1, "--repeats", 2, *options]
    assert sweep.main([str(part) for part in command]) == 0
    content: dict[str, Any] = json.loads((work / "sweep.json").read_text())
    return content


def test_points(sweep: ModuleType) -> None:
    found = sweep.points(["beams", "batch", "sizes"], ["one", "two"])
    usual = sweep.Point("one")
    assert found[0] == usual
    assert set(found) == {
        usual,
        sweep.Point("one", num_beams=2),
        sweep.Point("one", batch_size=3),
        sweep.Point("two"),
    }
    assert [point.size for point in found] == ["one", "one", "one", "two"], "a size is loaded once"


def test_interrupted_and_continued(sweep: ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    measure = sweep.measure_point

    def counted(point: Any, *rest: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(point)
        return measure(point, *rest)

    monkeypatch.setattr(sweep, "measure_point", counted)
    command = ["--work-dir", work, "--json", work / "sweep.json", "--precisions", "fp32", "--threads", 1]
    assert sweep.main([str(part) for part in [*command, "--repeats", 2]]) == 130
    assert len(json.loads((work / "sweep.json").read_text())["points"]) == 2

    monkeypatch.setattr(sweep, "measure_point", lambda *a: (measured.append(a[0]), measure(*a))[1])
    content = run(sweep, work)
    assert len(measured) == len(set(measured)) == len(content["points"]) == 4, "nothing twice"
    for entry in content["points"]:
        assert entry["summary"].keys() == {"eager", "itune fp32"}
        assert entry["summary"]["itune fp32"]["total"]["median_ms"] > 0
        batch = entry["point"]["batch_size"]
        row = entry["summary"]["eager"]
        assert row["images_per_s"] == pytest.approx(1e3 * batch / row["total"]["median_ms"])

    run(sweep, work)
    assert len(measured) == 4
    results, point = sweep.Results(work / "sweep.json", 1), sweep.Point("one", num_beams=2)
    entry = next(entry for entry in content["points"] if entry["point"] == asdict(point))
    names = set(entry["summary"])
    assert results.has(point, entry["bundles"], names)
    assert not results.has(point, entry["bundles"], names | {"eager-bf16"}), "other contestants are measured again"
    assert not results.has(point, {"fp32": "others"}, names), "other weights are measured again"
    assert not results.has(sweep.Point("one", num_beams=3), entry["bundles"], names)


def test_plots(sweep: ModuleType, work: Path) -> None:
    run(sweep, work)  # nothing, where the test before has measured it
    for name in ("beams", "batch", "sizes", "precisions"):
        path = work / f"sweep-{name}.png"
        assert path.read_bytes().startswith(PNG)
        path.unlink()
    run(sweep, work, "--plots-only")
    assert {path.name for path in work.glob("*.png")} == {
        f"sweep-{name}.png" for name in ("beams", "batch", "sizes", "precisions")
    }


def test_another_machine_is_not_mixed_in(
    sweep: ModuleType, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"machine": {"cpu": "Z80", "threads": 1, "versions": {}}, "points": []}
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    options = ["--work-dir", str(work), "--json", str(tmp_path / "sweep.json")]
    assert sweep.main(options) == 2
    assert "Z80" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sweeps", "beams,moons", "'moons'"),
        ("--sizes", "huge", "'huge'"),
        ("--repeats", "0", "--repeats"),
        ("--plots", "/nowhere", "--plots: /nowhere"),
    ],
)
def test_usage_errors(
    option: str, value: str, message: str, sweep: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep.main(["--work-dir", str(tmp_path), "--json", str(tmp_path / "s.json"), option, value])
    assert message in capsys.readouterr().err
