"""Every command of the README and of the pages in docs/ is run: here, or (the two that install) by `.ci/run`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from itune.export.restore import restore_bundle
from itune.runtime.bundle import default_bundle
from tests.conftest import CAPTIONS, REPOSITORY, random_photo

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# The pages go on where the README's reader stands: with the folders that its commands have made.
PAGES = [README, *(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md")))]
BLOCKS = [
    block for page in PAGES for block in re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
]
INSTALLING = [code for _, code in BLOCKS if "pip install" in code]
COMMANDS = [code for language, code in BLOCKS if language == "bash" and code not in INSTALLING]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the one that the README's reader stands in, with photos of their own."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(REPOSITORY / "examples", desk / "examples")
    shutil.copytree(REPOSITORY / "benchmarks", desk / "benchmarks")
    photos = desk / "photos"
    photos.mkdir()
    lines = []
    for i in range(10):
        random_photo(i, (120, 90)).save(photos / f"{i}.jpg")
        lines.append(json.dumps({"image": f"{i}.jpg", "captions": [CAPTIONS[i % 6], CAPTIONS[(i + 1) % 6]]}))
    (photos / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (desk / "FLICKR8K").mkdir()
    dev = [json.loads(line) for line in lines]
    dev = [json.dumps(line | {"image": str(photos / line["image"]), "split": "dev"}) for line in dev]
    (desk / "FLICKR8K" / "dev.jsonl").write_text("\n".join(dev), encoding="utf-8")
    (desk / "coco").mkdir()
    for i in range(2):
        random_photo(i).save(desk / "coco" / f"{i}.jpg")
    sentence = {"raw": CAPTIONS[0]}
    images = [
        {"filename": f"{i}.jpg", "split": split, "imgid": i, "sentences": [sentence]}
        for i, split in enumerate(["train", "val"])
    ]
    annotations = [{"image_id": i, "caption": text} for i in range(6) for text in (CAPTIONS[i], CAPTIONS[i - 1])]
    document = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(6)], "annotations": annotations}
    (desk / "refs.json").write_text(json.dumps(document), encoding="utf-8")
    for name, shift in (("results", 0), ("other", 2)):
        results = [{"image_id": i, "caption": CAPTIONS[(i + shift) % 6]} for i in range(6)]
        (desk / f"{name}.json").write_text(json.dumps(results), encoding="utf-8")
    (desk / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}), encoding="utf-8")
    return desk


def run(code: str, desk: Path) -> subprocess.CompletedProcess[str]:
    # Each METEOR takes ten seconds to start, and the metrics have tests of their own: one command has it.
    code = re.sub("^(itune-eval .*(?<!scores.json))$", r"\1 --no-java", code, flags=re.MULTILINE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        ["bash", "-e", "-c", code], cwd=desk, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def test_ci_runs_what_installs() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    patterns = re.findall(r"readme_command '(.*?)'\)", script)
    assert len(INSTALLING) == len(patterns) == 2
    for code, pattern in zip(INSTALLING, patterns, strict=True):
        assert re.search(rf"^python3 -m venv \.venv .*{pattern}$", code.strip())


@pytest.mark.parametrize("code", [c for c in COMMANDS if "benchmarks" not in c], ids=lambda c: c.split("\n")[0][:40])
def test_commands(code: str, desk: Path) -> None:
    done = run(code, desk)
    if "--preset base" in code:
        # The paper's sizes come from the hub: without a network there must be one sentence that helps.
        assert done.returncode == 2
        assert re.search(r"error: .*give the path of its folder instead", done.stderr)
    else:
        assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("code", [c for c in COMMANDS if "benchmarks" in c], ids=lambda c: c.split("\n")[0][:40])
def test_benchmarks(code: str, desk: Path, base_checkpoint: Path) -> None:
    if not (desk / "restored").exists():  # by the command above them in the README
        restore_bundle(default_bundle(), desk / "restored")
    if not (desk / "bench").exists():  # where an earlier run left the model
        (desk / "bench").symlink_to(base_checkpoint.parent)
    done = run(code, desk)
    assert done.returncode == 0, done.stderr


def test_python(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(desk)
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_default_model_fits_in_git_and_says_whose_it_is() -> None:
    bundle = default_bundle()
    assert sum(path.stat().st_size for path in bundle.iterdir()) < 30e6
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert "non-commercial" in card
    assert "non-commercial" in README
