"""How close a bundle comes to the limits of this machine: its memory bandwidth and its peak matrix rate.

    python benchmarks/roofline.py BUNDLE --threads 2

The encoder multiplies matrices: its floor is the time of its operations at the rate that ONNX Runtime reaches on one
large product of the same type. A decoder step reads all its weights for a handful of rows: its floor is the time of
reading their bytes, as stored, at the rate at which NumPy reads an array far larger than any cache. The floors ignore
everything but matrix products, and a step's operations and key/value cache, which are small.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from contestants import search_captions
from latency import make_task, preprocessed
from measuring import machine
from onnx import TensorProto, helper
from rich import box
from rich.console import Console
from rich.table import Table

from itune import Captioner, ItuneError
from itune.cli.common import require
from itune.files import write_json
from itune.runtime.bundle import Bundle
from itune.runtime.cpus import available_cpus
from itune.runtime.engines.onnxruntime import NAME

_INTEGER = {
    "MatMulNBits",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
    "QGemm",
    "ConvInteger",
    "QLinearConv",
}
_FLOAT = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv"}
_LOOKUPS = {"Gather", "GatherBlockQuantized"}
Run = Callable[[], Any]
_ARRAY_BYTES = 512 << 20
_PRODUCT = 1024, 1024, 4096  # larger ones are no faster


@dataclass(frozen=True)
class Machine:
    """The machine's measured limits."""

    gb_per_s: float
    """Reading an array far larger than any cache, on all threads."""
    fp32_gflops: float
    int8_gops: float


@dataclass(frozen=True)
class Stage:
    """The work of a stage and its measured time."""

    name: str
    megabytes: float
    """Weights (and, for a step, the visual keys and values) read once."""
    fp32_gflop: float
    int8_gop: float
    measured_ms: float

    def memory_ms(self, machine: Machine) -> float:
        """The time to read the weights."""
        return self.megabytes / machine.gb_per_s

    def compute_ms(self, machine: Machine) -> float:
        """The time of the matrix products."""
        return 1e3 * (self.fp32_gflop / machine.fp32_gflops + self.int8_gop / machine.int8_gops)

    def floor_ms(self, machine: Machine) -> float:
        """The larger of the two times."""
        return max(self.memory_ms(machine), self.compute_ms(machine))


def machine_runs(threads: int) -> dict[str, tuple[Run, float]]:
    """For each limit, a function to time, and how much it reads (GB) or computes (1e9 operations)."""
    parts = np.array_split(np.ones(_ARRAY_BYTES // 4, np.float32), threads)
    pool = ThreadPoolExecutor(threads)  # NumPy releases the GIL
    rows, inner, columns = _PRODUCT
    rng = np.random.default_rng(0)
    a, b = rng.random((rows, inner), np.float32), rng.random((inner, columns), np.float32)
    operations = 2e-9 * rows * inner * columns
    return {
        "gb_per_s": (lambda: list(pool.map(lambda part: np.dot(part, part), parts)), _ARRAY_BYTES / 1e9),
        "fp32_gflops": (_product(threads, "MatMul", a, b), operations),
        "int8_gops": (
            _product(threads, "MatMulInteger", (a * 255).astype(np.uint8), (b * 254 - 127).astype(np.int8)),
            operations,
        ),
    }


def _product(threads: int, operator: str, a: Any, b: Any) -> Run:
    """One product on ONNX Runtime, with b a constant like weights."""
    kind = TensorProto.INT32 if operator == "MatMulInteger" else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)],
        [helper.make_tensor_value_info("c", kind, (len(a), b.shape[1]))],
        [onnx.numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), _options(threads))
    feeds = {"a": ort.OrtValue.ortvalue_from_numpy(a)}
    return lambda: session.run_with_ort_values(["c"], feeds)


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # it alternates with others
    return options


def weight_bytes(path: Path) -> int:
    """Bytes of the weights that every run of a graph reads: all except tables in which single rows are looked up."""
    graph = onnx.load(path, load_external_data=False).graph
    read = {name for node in graph.node if node.op_type not in _LOOKUPS for name in node.input}
    sizes = {tensor.name: _tensor_bytes(tensor) for tensor in graph.initializer}
    return sum(size for name, size in sizes.items() if name in read)


def _tensor_bytes(tensor: TensorProto) -> int:
    bits = {TensorProto.INT4: 4, TensorProto.UINT4: 4}.get(tensor.data_type)
    bits = bits or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(np.prod(tensor.dims, dtype=np.int64)) * bits // 8


def products(path: Path, feeds: dict[str, Any]) -> tuple[float, float, float]:
    """Multiplications and additions of a graph's matrix products on these inputs, 1e9: in floats, in integers.

    The graph is run once, unoptimised, with the products' operands as outputs, to find their shapes. The third figure
    is the size of the graph's own outputs in MB.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    nodes = [node for node in graph.node if node.op_type in _INTEGER | _FLOAT]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    results = {output.name for output in graph.output}
    wanted = sorted(results | {n for node in nodes for n in (*node.input[:2], node.output[0]) if n in made_by})
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in results)
    options = _options(available_cpus())
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = ort.InferenceSession(model.SerializeToString(), options)
    arrays = feeds | dict(zip(wanted, session.run(wanted, feeds), strict=True))
    shapes |= {name: array.shape for name, array in arrays.items()}
    counted = {True: 0, False: 0}
    for node in nodes:
        a, b = (shapes[name] for name in node.input[:2])
        inner = int(np.prod(b[1:])) if "Conv" in node.op_type else a[-1]
        quantised = all(n in made_by and made_by[n].op_type == "DequantizeLinear" for n in node.input[:2])
        operations = 2 * int(np.prod(shapes[node.output[0]])) * inner
        counted[node.op_type in _INTEGER or quantised] += operations
    megabytes = sum(arrays[name].nbytes for name in results) / 1e6
    return counted[False] / 1e9, counted[True] / 1e9, megabytes


def measure(folder: Path, threads: int, num_beams: int, new_tokens: int, repeats: int) -> tuple[Machine, list[Stage]]:
    """Measure the machine and a bundle in turns: the encoder on one photo, and one decoder step with the search.

    Both are medians, since a busy machine slows both.
    """
    bundle = Bundle.load(folder)
    captioner = Captioner.load(folder, threads=threads)
    pixels = preprocessed(captioner.image, None)[:1]
    vision, decoder = (bundle.path(bundle.graph(role, NAME).file) for role in ("vision", "decoder"))
    name = onnx.load(vision, load_external_data=False).graph.input[0].name
    fp32, int8, visual = products(vision, {name: pixels})
    task = make_task(folder, num_beams, new_tokens)
    samples = []
    runs = machine_runs(threads)
    rates: dict[str, list[float]] = {figure: [] for figure in runs}
    for number in range(repeats + 2):
        sample = search_captions(captioner.engine, pixels, task)
        if number >= 2:  # after a warm-up
            samples.append(sample)
        for figure, (run, amount) in runs.items():
            for _ in range(3):
                start = time.perf_counter()
                run()
                rates[figure].append(amount / (time.perf_counter() - start))
    encode, decode = (float(np.median([getattr(s, part) for s in samples])) for part in ("encode", "decode"))
    weights = [weight_bytes(path) / 1e6 for path in (vision, decoder)]
    return Machine(**{figure: float(np.median(found)) for figure, found in rates.items()}), [
        Stage("encode", weights[0], fp32, int8, encode),
        Stage("step", weights[1] + visual, 0, 0, decode / new_tokens),
    ]


def print_tables(result: dict[str, Any], reached: Machine, stages: list[Stage]) -> None:
    """Print the limits of the machine and the stages of the bundle."""
    out = Console(highlight=False)
    about = result["machine"]
    out.print(
        f"{about['threads']} threads of {about['cpu']}: reads {reached.gb_per_s:.1f} GB/s, multiplies "
        f"{reached.fp32_gflops:.0f} GFLOP/s in fp32, {reached.int8_gops:.0f} GOP/s in int8; milliseconds",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("", "GFLOP", "int8 GOP", "MB", "compute", "memory", "measured", "floor is"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for stage in stages:
        table.add_row(
            stage.name,
            f"{stage.fp32_gflop:.1f}",
            f"{stage.int8_gop:.1f}",
            f"{stage.megabytes:.0f}",
            f"{stage.compute_ms(reached):.1f}",
            f"{stage.memory_ms(reached):.1f}",
            f"{stage.measured_ms:.1f}",
            f"{stage.floor_ms(reached) / stage.measured_ms:.0%}",
        )
    out.print(table)


def main(argv: list[str] | None = None) -> int:
    """Measure the machine, then the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads")
    parser.add_argument("--num-beams", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16, help="forced length of every caption")
    parser.add_argument("--repeats", type=int, default=10, help="timed captions")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args(argv)
    for name in ("threads", "num_beams", "new_tokens", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        require("benchmark", "onnx")
        reached, stages = measure(
            arguments.bundle, arguments.threads, arguments.num_beams, arguments.new_tokens, arguments.repeats
        )
        result = {
            "machine": machine(arguments.threads) | asdict(reached),
            "stages": [asdict(s) | {"floor_ms": s.floor_ms(reached)} for s in stages],
        }
        if arguments.json:
            write_json(arguments.json, result, indent=1)
    except (ItuneError, OSError) as error:
        print(f"roofline: error: {error}", file=sys.stderr)
        return 2
    print_tables(result, reached, stages)
    return 0


if __name__ == "__main__":
    sys.exit(main())
