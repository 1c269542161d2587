"""The contestants of the benchmarks, each in a process of its own that waits for photos on a pipe.

Separate processes give every contestant its own peak memory and its own threads; a waiting contestant uses
no CPU.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from itune.export.compare.worker import Worker
from itune.runtime.engines.base import UInt8


class Sample(NamedTuple):
    """The result for one batch of photos: milliseconds, and each photo's caption tokens."""

    encode: float | None
    """None for a contestant that only decodes."""
    decode: float
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Task:
    """The task of all contestants: beams, a forced length, the prompt tokens and the end token."""

    num_beams: int
    new_tokens: int
    prompt: tuple[int, ...]
    end: int


class Contestant(Protocol):
    """Captions preprocessed photos; built from a folder and a number of threads."""

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """Caption photos, uint8 [B, H, W, 3], and time encoding and decoding."""
        ...


@dataclass(frozen=True)
class Entry:
    """How to build a contestant: its class, label, inputs and requirements."""

    label: str
    implementation: str
    """`module:class`; imported only in the contestant's process."""
    options: dict[str, Any] = field(default_factory=dict)
    reads: Literal["checkpoint", "bundle", "conversion"] = "conversion"
    """The adapter checkpoint, the fp32 bundle, or the folder that the module's `convert` writes from one of the two."""
    source: Literal["checkpoint", "bundle"] = "checkpoint"
    """The input of `convert`."""
    requires: tuple[str, ...] = ()
    """Modules that itune's other extras do not install."""
    install: str = "'itune-captioner[benchmark]'"
    """What pip installs for them."""
    python: str = ""
    """The environment variable that names the Python of the contestant's own environment."""
    clip_only: bool = False
    """It exports the tower from PyTorch, so an ONNX tower will not do."""
    note: str = ""
    """The part of the work that it does not do."""

    def lacks(self, vision: str) -> str | None:
        """Why it cannot run here with a tower of kind `vision` ("needs ..."), or None."""
        if self.clip_only and vision != "clip":
            return "needs a CLIP tower, but this checkpoint's tower is an ONNX graph"
        missing = [module for module in self.requires if find_spec(module) is None]
        if missing:
            return f"needs {', '.join(missing)}: pip install {self.install}"
        if self.python and self.python not in os.environ:
            return f"needs {self.python}, the Python of an environment of its own: see docs/benchmarks.md"
        if self.options.get("device") == "cuda":
            import torch

            if not torch.cuda.is_available():
                return "needs an NVIDIA GPU and PyTorch with CUDA"
        if self.options.get("compiled") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "needs a C++ compiler"
        return None


_TORCH, _PLAIN, _OPENVINO = "peers.torch_eager:Eager", "peers.plain_onnx:PlainOnnx", "peers.openvino_graphs:OpenVino"
_LLAMA, _PLAIN_GPT2 = "peers.llama:LlamaCpp", "decodes a plain GPT-2, without adapters and image"
_LLAMA_CPP: dict[str, Any] = {
    "requires": ("llama_cpp", "gguf"),
    "install": "llama-cpp-python gguf",  # not in the extra, because it takes minutes to compile
    "note": f"{_PLAIN_GPT2}; the search is not timed",
}
PEERS = {
    "eager": Entry("eager", _TORCH, reads="checkpoint"),
    "eager-bf16": Entry("eager bf16", _TORCH, {"dtype": "bfloat16"}, reads="checkpoint"),
    "compile": Entry("torch.compile", _TORCH, {"compiled": True}, reads="checkpoint"),
    "compile-bf16": Entry("torch.compile bf16", _TORCH, {"compiled": True, "dtype": "bfloat16"}, reads="checkpoint"),
    "eager-cuda": Entry("eager CUDA", _TORCH, {"device": "cuda"}, reads="checkpoint"),
    "eager-cuda-fp16": Entry("eager CUDA fp16", _TORCH, {"device": "cuda", "dtype": "float16"}, reads="checkpoint"),
    "onnx-plain": Entry("ONNX, plain export", _PLAIN, requires=("onnxscript",), clip_only=True),
    "onnx-plain-int8": Entry(
        "ONNX, plain int8", _PLAIN, {"precision": "int8"}, requires=("onnxscript",), clip_only=True
    ),
    "openvino-f32": Entry("OpenVINO f32", _OPENVINO, {"precision": "f32"}, reads="bundle", requires=("openvino",)),
    "openvino-bf16": Entry("OpenVINO bf16", _OPENVINO, {"precision": "bf16"}, reads="bundle", requires=("openvino",)),
    "openvino-int8": Entry(
        "OpenVINO int8", _OPENVINO, {"precision": "f32"}, source="bundle", requires=("openvino", "nncf")
    ),
    "ctranslate2-int8": Entry(
        "CTranslate2 int8",
        "peers.ctranslate:CTranslate2",
        requires=("ctranslate2",),
        note=_PLAIN_GPT2,
    ),
    "llama-q8": Entry("llama.cpp Q8_0", _LLAMA, {"file": "q8_0.gguf"}, **_LLAMA_CPP),
    "llama-q4": Entry("llama.cpp Q4_0", _LLAMA, {"file": "q4_0.gguf"}, **_LLAMA_CPP),
    "optimum": Entry(
        "optimum, ViT + GPT-2",
        "peers.optimum_onnx:Optimum",
        clip_only=True,
        python="ITUNE_OPTIMUM_PYTHON",
        note="another model of the same size, with cross-attention and random weights; its memory is not counted",
    ),
}
"""The alternatives to a bundle, by their names on the command line."""

BUNDLE = Entry("itune", "contestants:Bundle")


class Bundle:
    """An exported bundle on its engine, with itune's search."""

    def __init__(self, folder: Path, threads: int, *, engine: str = "native") -> None:
        from itune import Captioner

        self.engine = Captioner.load(folder, engine=engine, threads=threads, retrieve=0).engine

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """Caption photos, uint8 [B, H, W, 3]."""
        return search_captions(self.engine, pixels, task)


def search_captions(engine: Any, pixels: UInt8, task: Task) -> Sample:
    """Caption with itune's search on any engine (an object with `encode` and `step`)."""
    from itune.runtime.search import SearchConfig
    from itune.runtime.search.loop import search

    config = SearchConfig(num_beams=task.num_beams, min_new_tokens=task.new_tokens, max_new_tokens=task.new_tokens)
    start = time.perf_counter()
    state = engine.encode(pixels)
    encoded = time.perf_counter()
    hypotheses = search(engine, state, [task.prompt] * len(pixels), config, task.end)
    done = time.perf_counter()
    return Sample(1e3 * (encoded - start), 1e3 * (done - encoded), tuple(best[0].tokens for best in hypotheses))


class ContestantProcess(Worker):
    """A contestant in its own process, which ends when this one does."""

    def __init__(self, entry: Entry, folder: Path, threads: int) -> None:
        self.entry = entry
        super().__init__(entry.label, _Loaded, entry, folder, threads)

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """Caption photos, uint8 [B, H, W, 3], in the contestant's process."""
        sample: Sample = self.call("caption", pixels, task)
        return sample

    def close(self) -> float:
        """End the process; returns its peak resident memory in MB."""
        peak: float = self.call("peak_memory")
        self.kill()
        return peak


class _Loaded:
    """A contestant in its own process, and the memory of that process."""

    def __init__(self, entry: Entry, folder: Path, threads: int) -> None:
        module, name = entry.implementation.split(":")
        contestant: Contestant = getattr(import_module(module), name)(folder, threads, **entry.options)
        self.caption = contestant.caption

    def peak_memory(self) -> float:
        """The peak resident memory in MB."""
        status = Path("/proc/self/status")
        if status.exists():  # on Linux, getrusage would count what the parent had when it started this process
            lines = status.read_text(encoding="ascii").splitlines()
            return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
