"""`check.cpp` under sanitizers, and under emulators of processors that this machine is not."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

NATIVE = REPOSITORY / "runtime" / "native"
FLAGS = ["-std=c++20", "-O1", "-g", "-ffp-contract=off", "-pthread", f"-I{NATIVE}"]
X86, ARM64 = "ITUNE_X86", "ITUNE_ARM64"
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
pytestmark = pytest.mark.slow


def kernel_files(target: str) -> dict[str, list[str]]:
    """The files of kernels for a target and their options, as CMakeLists.txt has them."""
    cmake = (REPOSITORY / "CMakeLists.txt").read_text()
    branch = re.search(rf"PRIVATE {target}\)\n(.*?)\n(?:elseif|endif)", cmake, re.DOTALL)
    assert branch
    return {name: options.split() for name, options in re.findall(r"add_kernels\((\w+)([^)]*)\)", branch[1])}


def build(folder: Path, compiler: str, target: str, *options: str) -> Path:
    """Compile the check for a target."""
    files = {NATIVE / "kernels" / f"{name}.cpp": extra for name, extra in kernel_files(target).items()}
    files |= {NATIVE / "kernels" / "kernels.cpp": [], NATIVE / "kernels" / "portable.cpp": []}
    files[Path(__file__).with_name("check.cpp")] = []
    assert set(kernel_files(X86)) | set(kernel_files(ARM64)) | {"kernels", "portable"} == {
        path.stem for path in (NATIVE / "kernels").glob("*.cpp")
    }

    def compile_file(item: tuple[Path, list[str]]) -> Path:
        path, extra = item
        output = folder / f"{path.stem}.o"
        command = [compiler, *FLAGS, f"-D{target}", *options, *extra, "-c", str(path), "-o", str(output)]
        subprocess.run(command, check=True, timeout=600)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_file, files.items()))
    program = folder / "check"
    subprocess.run([compiler, *FLAGS, *options, *map(str, objects), "-o", str(program)], check=True, timeout=600)
    return program


def kernels_that_ran(*command: str | Path) -> list[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.split()


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")


def needs(program: str, package: str) -> pytest.MarkDecorator:
    reason = f"needs {program} (Debian: apt-get install {package})"
    return pytest.mark.skipif(shutil.which(program) is None, reason=reason)


@needs_x86
@needs("g++", "g++")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    ran = kernels_that_ran(build(tmp_path, "g++", X86, *SANITIZERS[sanitizer]))
    assert ran[-1] == "portable"


@needs_x86
@needs("g++", "g++")
@needs("qemu-x86_64", "qemu-user")
@pytest.mark.parametrize(("processor", "expected"), [("Nehalem", ["portable"]), ("Haswell", ["avx2", "portable"])])
def test_older_processors(processor: str, expected: list[str], tmp_path: Path) -> None:
    program = build(tmp_path, "g++", X86, "-static")
    assert kernels_that_ran("qemu-x86_64", "-cpu", processor, program) == expected


@needs("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
@needs("qemu-aarch64", "qemu-user")
def test_arm(tmp_path: Path) -> None:
    program = build(tmp_path, "aarch64-linux-gnu-g++", ARM64, "-static")
    assert kernels_that_ran("qemu-aarch64", "-cpu", "max", program) == ["neon-dot", "neon", "portable"]
    assert kernels_that_ran("qemu-aarch64", "-cpu", "cortex-a53", program) == ["neon", "portable"]
