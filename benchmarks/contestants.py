"""What the benchmarks compare, each in a process of its own that waits for photos on a pipe.

Separate processes give every contestant its own peak memory and its own threads; a contestant that waits does not
use the CPU.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from itune.export.compare.worker import Worker
from itune.runtime.engines.base import UInt8


class Sample(NamedTuple):
    """One batch of photos: milliseconds, and the tokens that were written for each photo."""

    encode: float | None
    """None: this contestant only decodes."""
    decode: float
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Task:
    """What everybody does alike: beams, a forced length, the tokens before a caption and the one after it."""

    num_beams: int
    new_tokens: int
    prompt: tuple[int, ...]
    end: int


class Contestant(Protocol):
    """Captions preprocessed photos; built from a folder and a number of threads."""

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """Encode photos, uint8 [B, H, W, 3], decode, and the time of each."""
        ...


@dataclass(frozen=True)
class Entry:
    """Who takes part: where its class is, what it is called, what it reads, what it needs."""

    label: str
    implementation: str
    """`module:class`; imported in the contestant's process only."""
    options: dict[str, Any] = field(default_factory=dict)
    reads: Literal["checkpoint", "bundle", "conversion"] = "conversion"
    """The adapter checkpoint, the fp32 bundle, or a folder that the module's `convert` makes of one of the two."""
    source: Literal["checkpoint", "bundle"] = "checkpoint"
    """What `convert` starts from."""
    requires: tuple[str, ...] = ()
    """Modules beside those of itune's own extras."""
    clip_only: bool = False
    """It exports the tower from PyTorch, which an ONNX tower has left already."""
    note: str = ""
    """What its figures leave out."""

    def lacks(self, vision: str) -> str | None:
        """What keeps it from running here with a tower of kind `vision`, as the end of a sentence; None if nothing."""
        if self.clip_only and vision != "clip":
            return "needs a CLIP tower, and this checkpoint's is an ONNX graph already"
        missing = [module for module in self.requires if find_spec(module) is None]
        if missing:
            return f"needs {', '.join(missing)}: pip install 'itune[benchmark]'"
        if self.options.get("device") == "cuda":
            import torch

            if not torch.cuda.is_available():
                return "needs an NVIDIA GPU and a PyTorch for it"
        if self.options.get("compiled") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "needs a C++ compiler when it runs"
        return None


_TORCH, _PLAIN, _OPENVINO = "peers.torch_eager:Eager", "peers.plain_onnx:PlainOnnx", "peers.openvino_graphs:OpenVino"
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
        note="decodes a plain GPT-2, without adapters and image",
    ),
}
"""What a user could take in place of a bundle, by its name on the command line."""

BUNDLE = Entry("itune", "contestants:Bundle")


class Bundle:
    """An exported bundle on its engine, with the project's own search."""

    def __init__(self, folder: Path, threads: int, *, engine: str = "onnxruntime") -> None:
        from itune import Captioner

        self.engine = Captioner.load(folder, engine=engine, threads=threads, retrieve=0).engine

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """See `Contestant.caption`."""
        return search_captions(self.engine, pixels, task)


def search_captions(engine: Any, pixels: UInt8, task: Task) -> Sample:
    """Caption with the project's search over anything that has `encode` and `step` (the engine protocol)."""
    from itune.runtime.search import SearchConfig, search

    config = SearchConfig(num_beams=task.num_beams, min_new_tokens=task.new_tokens, max_new_tokens=task.new_tokens)
    start = time.perf_counter()
    state = engine.encode(pixels)
    encoded = time.perf_counter()
    hypotheses = search(engine, state, [task.prompt] * len(pixels), config, task.end)
    done = time.perf_counter()
    return Sample(1e3 * (encoded - start), 1e3 * (done - encoded), tuple(best[0].tokens for best in hypotheses))


class Contender(Worker):
    """A contestant in its own process, which ends with this one."""

    def __init__(self, entry: Entry, folder: Path, threads: int) -> None:
        self.entry = entry
        super().__init__(entry.label, make_contestant, entry, folder, threads)

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """Have photos captioned, uint8 [B, H, W, 3]."""
        sample: Sample = self.call("caption", pixels, task)
        return sample


def make_contestant(entry: Entry, folder: Path, threads: int) -> Contestant:
    """Import and load a contestant; for its own process."""
    module, name = entry.implementation.split(":")
    contestant: Contestant = getattr(import_module(module), name)(folder, threads, **entry.options)
    return contestant
