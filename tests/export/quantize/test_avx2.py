"""int8 products on a processor with AVX2 but without VNNI, where they are known to saturate if done carelessly.

`maddubs` adds two products of 8-bit numbers in 16 bits, which 255 * 127 twice does not fit. An emulated Haswell
runs the worst cases; it needs QEMU's user-mode emulator (Debian's qemu-user).
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest

from itune.export.graph.builder import Graph
from itune.export.quantize.integer_matmul import Blocks, Rows, Scheme
from itune.export.quantize.rewrite import quantize_graph

QEMU = shutil.which("qemu-x86_64")
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from numpy._core._multiarray_umath import __cpu_features__ as features
from itune.runtime.engines import onnxruntime
onnxruntime.has_vnni = lambda: False  # /proc/cpuinfo is the real processor's
session = onnxruntime.open_session(Path(sys.argv[1]), 1)
x = np.load(sys.argv[2])
np.save(sys.argv[3], np.concatenate([session.run(None, {"x": rows})[0] for rows in (x, x[:1], x[:2])]))
print(json.dumps({name: bool(features[name]) for name in ("AVX2", "AVX512F")}))
"""


@pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (Debian: apt-get install qemu-user)")
@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="emulates x86-64 Linux programs only"
)
@pytest.mark.parametrize("scheme", [Blocks(), Rows()], ids=str)
@pytest.mark.parametrize(("k", "n"), [(64, 33), (768, 64)])
def test_products_do_not_saturate(k: int, n: int, scheme: Scheme, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.choice(np.float32([-1, 1]), (k, n))
    weight[:, : n // 4], weight[:, n // 4 : n // 2] = 1, -1  # codes +127 throughout, -127 throughout
    x = rng.choice(np.float32([-1, 1]), (7, k))
    x[0], x[1] = 1, -1
    x *= np.float32([[1], [1], [1], [1e-3], [1e3], [1], [1]])  # every row has a scale of its own

    graph = Graph("product")
    graph.op("MatMul", graph.input("x", np.float32, ["rows", k]), graph.initializer("weight", weight), name="y")
    graph.output("y", np.float32, ["rows", n])
    graph.save(tmp_path / "fp32.onnx")
    (path,) = quantize_graph(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", scheme)
    np.save(tmp_path / "x.npy", x)
    # The emulated interpreter looks for its packages where this one found them.
    command = [QEMU, "-cpu", "Haswell", sys.executable, "-c", SCRIPT]
    command += [str(path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"AVX2": True, "AVX512F": False}

    expected = x @ weight  # all values are on the grids, so the product is exact but for rounding
    size = np.abs(x).max(axis=1, keepdims=True) * k
    rows = [*range(7), 0, 0, 1]
    assert (np.abs(np.load(tmp_path / "y.npy") - expected[rows]) <= 1e-6 * size[rows]).all()
