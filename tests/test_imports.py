"""The walls of the house: who may import whom, and what a plain import must not drag in."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = {"itune": "itune", "export": "itune.export", "runtime": "itune.runtime"}
RUNTIME_LIBRARIES = {
    "numpy",
    "onnxruntime",
    "PIL",
    "pillow_heif",
    "pydantic",
    "pydantic_core",
    "rich",
    "tokenizers",
    "_itune_native",
    "faiss",  # for datastores that are too large for NumPy
}


def imported(path: Path) -> set[str]:
    """Every module that a file of ours imports, anywhere in it, with relative names resolved."""
    folder, *rest = path.relative_to(REPOSITORY).with_suffix("").parts
    package = [*PACKAGES[folder].split("."), *rest][:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[Path]:
    found = sorted((REPOSITORY / folder).rglob("*.py"))
    assert found
    return found


def inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def test_names_are_resolved() -> None:
    names = imported(REPOSITORY / "runtime" / "engines" / "onnxruntime.py")
    assert "itune.runtime.bundle.Bundle" in names
    assert "itune.runtime.engines.base.Candidates" in names
    assert "itune.runtime.Captioner" in imported(REPOSITORY / "itune" / "__init__.py")
    assert "itune.cli.common" in imported(REPOSITORY / "itune" / "cli" / "run.py")


@pytest.mark.parametrize("path", files("runtime"), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_runtime_imports_nothing_of_ours_and_few_libraries(path: Path) -> None:
    for name in imported(path):
        top = name.split(".")[0]
        assert inside(name, "itune.runtime") or top in RUNTIME_LIBRARIES | sys.stdlib_module_names, name


@pytest.mark.parametrize("path", files("itune"), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_only_commands_import_export(path: Path) -> None:
    if path.relative_to(REPOSITORY / "itune").as_posix() not in ("cli/export.py", "cli/compare.py", "cli/train.py"):
        assert [name for name in imported(path) if inside(name, "itune.export")] == []


@pytest.mark.parametrize("path", files("itune/serve"), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_service_imports_no_training(path: Path) -> None:
    allowed = ("itune.serve", "itune.runtime", "itune.caption_json", "itune.__version__")
    for name in imported(path):
        assert not inside(name, "itune") or any(inside(name, each) for each in allowed), name


def modules_after(code: str) -> set[str]:
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_captions_needs_no_training_library() -> None:
    modules = modules_after("import itune\nfrom itune import Captioner")
    assert "itune.runtime.captioner" in modules
    assert not modules & {"torch", "transformers", "onnx", "accelerate", "safetensors"}


def test_captioning_needs_no_training_library(bundle: Path) -> None:
    modules = modules_after(
        "import numpy\nfrom itune import Captioner\n"
        f"caption = Captioner.load({str(bundle)!r}).caption(numpy.zeros((9, 9, 3), numpy.uint8)).caption\n"
        "assert caption"
    )
    assert "onnxruntime" in modules
    assert not modules & {"torch", "transformers", "onnx", "cyclopts", "rich"}
    assert not modules & {"cuda.bindings.runtime", "tensorrt", "tensorrt_rtx", "itune.runtime.engines.tensorrt"}


def test_help_and_a_plain_import_are_quick() -> None:
    slow = {"numpy", "onnxruntime", "PIL", "tokenizers", "torch", "transformers", "onnx"}
    assert not modules_after("import itune") & (slow | {"pydantic", "cyclopts"})


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        *((program, ["--help"]) for program in ("run", "train", "evaluate", "export", "datastore", "serve")),
        ("export", ["--compare", "--help"]),
        ("datastore", ["build", "--help"]),
    ],
)
def test_help_needs_no_numpy(program: str, arguments: list[str]) -> None:
    modules = modules_after(
        f"import contextlib, io\nfrom itune.cli.{program} import main\nsys.argv[1:] = {arguments!r}\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n    main()\n"
        "assert 'Examples' in out.getvalue()"
    )
    assert "cyclopts" in modules
    assert not modules & {"numpy", "onnxruntime", "PIL", "tokenizers", "torch", "transformers", "onnx", "starlette"}


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {module_name(path): path for folder in PACKAGES for path in files(folder) if "__init__" not in path.name}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = imported(path)
        graph[module] = {other for other in modules if other != module and any(inside(name, other) for name in names)}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join([PACKAGES[folder], *rest])
