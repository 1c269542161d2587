"""Runs every command of the README and of the pages in docs/, except the two that install, which `.ci/run` runs."""

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
from tests.test_default_model import GOLDEN

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
NAVIGATION = re.findall(r"\S+\.md$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
PAGES = {name: (REPOSITORY / "docs" / name).read_text(encoding="utf-8") for name in NAVIGATION}
BLOCKS = [
    (place, language, code)
    for place, text in (("README", README), ("site", "".join(PAGES.values())))
    for language, code in re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]
INSTALLING = [code for _, _, code in BLOCKS if "pip install" in code]
COMMANDS = [(place, code) for place, language, code in BLOCKS if language == "bash" and code not in INSTALLING]
QUICK = [(place, code) for place, code in COMMANDS if "benchmarks" not in code]
SLOW = [(place, code) for place, code in COMMANDS if "benchmarks" in code]


@pytest.fixture(scope="module")
def desks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two readers' folders: one follows the README, the other the pages of the site in their order."""
    return {place: make_desk(tmp_path_factory.mktemp(place)) for place in ("README", "site")}


def make_desk(desk: Path) -> Path:
    """The clone's examples and benchmarks, and photos of the reader's own."""
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
    # METEOR takes ten seconds to start, and the metrics have their own tests: one command keeps it.
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


def name(value: str) -> str:
    return value.split("\n")[0][:40]


@pytest.mark.parametrize(("place", "code"), QUICK, ids=name)
def test_commands(place: str, code: str, desks: dict[str, Path]) -> None:
    done = run(code, desks[place])
    if "--preset base" in code:
        # The paper's sizes come from the hub: without a network the command names what it could not load.
        assert done.returncode == 2
        assert re.search(r"error: .*(gpt2|clip-vit)", done.stderr)
    else:
        assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("place", "code"), SLOW, ids=name)
def test_benchmarks(place: str, code: str, desks: dict[str, Path], base_checkpoint: Path) -> None:
    desk = desks[place]
    if not (desk / "restored").exists():  # as the README's command does
        restore_bundle(default_bundle(), desk / "restored")
    if not (desk / "bench").exists():  # a cached model
        (desk / "bench").symlink_to(base_checkpoint.parent)
    done = run(code, desk)
    assert done.returncode == 0, done.stderr


def test_python(desks: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for place, language, code in BLOCKS:
        if language == "python":
            monkeypatch.chdir(desks[place])
            exec(compile(code, place, "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:3] == [GOLDEN["chelsea.jpg"], GOLDEN["coffee.jpg"]]
    assert printed[0].startswith(GOLDEN["astronaut.jpg"])


def test_every_page_is_in_the_navigation() -> None:
    assert sorted(NAVIGATION) == sorted(path.name for path in (REPOSITORY / "docs").glob("*.md"))


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1200


def test_the_readmes_links_exist() -> None:
    """mkdocs checks the links of the pages."""
    targets = [target for target in re.findall(r"\]\(([^)#]+)", README) if "://" not in target]
    assert targets
    assert not [target for target in targets if not (REPOSITORY / target).exists()]


def test_files_that_the_documentation_names_exist() -> None:
    folders = ("itune", "export", "runtime", "benchmarks", "recipes", "docs", "tests")
    files = [path.as_posix() for folder in folders for path in (REPOSITORY / folder).rglob("*.*")]
    contributing = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for place, text in {"README.md": README, "CONTRIBUTING.md": contributing, **PAGES}.items():
        text = text.replace("NAME", "ituning")  # of a method to be added
        for path in re.findall(rf"`((?:{'|'.join(folders)})/[^`\s]*)`", text):
            assert (REPOSITORY / path).exists(), (place, path)
        for name in re.findall(r"`([\w/]+\.(?:py|cpp))`", text):
            assert any(file.endswith(f"/{name}") for file in files), (place, name)


def test_default_model_fits_in_git_and_says_whose_it_is() -> None:
    bundle = default_bundle()
    assert sum(path.stat().st_size for path in bundle.iterdir()) < 30e6
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert "non-commercial" in card
    assert "non-commercial" in README
