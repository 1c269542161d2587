"""The throughput benchmark end to end on a tiny model: its report, not its speed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from itune.export.bundle import export_bundle
from itune.export.options import ExportOptions
from tests.conftest import REPOSITORY

THROUGHPUT = REPOSITORY / "benchmarks" / "throughput.py"


def throughput(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(THROUGHPUT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def bundle(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("throughput") / "bundle"
    export_bundle(checkpoint_folder, folder, ExportOptions(precision="fp32", verify=False))
    return folder


def test_report(bundle: Path, photos: list[Path], tmp_path: Path) -> None:
    options = ("--bundle", bundle, "--threads", 1, "--workers", 2, "--json", tmp_path / "out.json")
    done = throughput(
        *options, "--images", photos[0].parent, "--count", 50, "--window", 20, "--plot", tmp_path / "out.png"
    )
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert result.keys() == {"machine", "settings", "summary", "windows"}
    assert result["settings"]["images"] == "6 photos"
    assert [window["images"] for window in result["windows"]] == [0, 20, 40, 50]
    seconds = [window["seconds"] for window in result["windows"]]
    assert seconds == sorted(seconds)
    low, median, high = result["summary"]["images_per_s_p10_p50_p90"]
    assert 0 < low <= median <= high
    assert result["summary"]["images_per_s"] == pytest.approx(50 / seconds[-1])
    rss = result["summary"]["rss_mb"]
    windows = [window["rss_mb"] for window in result["windows"]]
    assert 20 < rss["loaded"] == windows[0] < 2000
    assert rss["most_in_first_half"] == max(windows[:2])
    assert rss["most_in_second_half"] == max(windows[2:])
    assert rss["end"] == windows[-1]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (960, 600)


def test_without_a_folder_photos_are_synthetic(bundle: Path, tmp_path: Path) -> None:
    options = ("--count", 8, "--window", 4, "--num-beams", 1, "--json", tmp_path / "out.json")
    done = throughput("--bundle", bundle, "--threads", 1, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["settings"]["images"] == "200 synthetic"


def test_errors_are_one_sentence(
    bundle: Path,
    status_of: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(THROUGHPUT.parent))
    import throughput as command

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "1.jpg").write_text("no photo")
    for arguments, message in (
        (("--bundle", tmp_path), "bundle.json"),
        (("--images", tmp_path / "absent"), f"--images {tmp_path / 'absent'}"),
        (("--bundle", bundle, "--images", broken, "--count", 4, "--window", 2), "4 of 4"),
        (("--count", 10, "--window", 9), "--count"),
        (("--json", tmp_path / "no" / "out.json"), f"--json: {tmp_path / 'no'}"),
    ):
        assert status_of(command.main, *arguments) == 2
        assert message in capsys.readouterr().err
