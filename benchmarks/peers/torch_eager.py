"""PyTorch with `transformers.generate`: eager, in bfloat16, compiled, on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants import Sample, Task
from torch import Tensor
from transformers import GenerationConfig

from itune.backbones import ClipTower
from itune.loading import LoadedCheckpoint
from itune.runtime.engines.base import UInt8


class Eager:
    """The tower, then `generate` with its KV cache on the language model with adapters.

    `compiled`: torch.compile compiles the tower, the adapters' keys and values, and the language model's forward pass,
    the last with dynamic shapes because its cache grows; the beam search is `generate`'s. A static cache and Inductor's
    freezing were slower or did not compile within minutes. A call that triggers a compilation is repeated until nothing
    more is compiled, and only then counts.
    """

    def __init__(
        self, checkpoint: Path, threads: int, *, dtype: str = "float32", compiled: bool = False, device: str = "cpu"
    ) -> None:
        torch.set_num_threads(threads)
        loaded = LoadedCheckpoint.load(checkpoint)
        self.model, self.tower = loaded.model, loaded.tower
        self.gpt2: Any = loaded.language.model
        self.dtype = getattr(torch, dtype)
        self.compiled = compiled
        self.warm: set[tuple[Any, ...]] = set()
        self.device = torch.device(device)
        self.model.to(self.device, self.dtype)
        self.project: Callable[[Tensor], Any] = self.model.project
        if isinstance(self.tower, ClipTower):
            self.tower.model.to(self.device, self.dtype)
        if compiled:
            self.gpt2.forward = torch.compile(self.gpt2.forward, dynamic=True)
            self.project = torch.compile(self.project, dynamic=False)
            if isinstance(self.tower, ClipTower):
                self.tower.model.forward = torch.compile(self.tower.model.forward, dynamic=False)

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """Caption photos, uint8 [B, H, W, 3]."""
        # Replaces the checkpoint's own configuration, whose penalties `generate` would apply.
        self.gpt2.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            num_beams=task.num_beams,
            min_new_tokens=task.new_tokens,
            max_new_tokens=task.new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=task.end,
            pad_token_id=task.end,
        )
        case = (len(pixels), task)
        while self.compiled and case not in self.warm:
            before = _compilations()
            self._caption(pixels, task)
            if _compilations() == before:
                self.warm.add(case)
        return self._caption(pixels, task)

    @torch.inference_mode()
    def _caption(self, pixels: UInt8, task: Task) -> Sample:
        prompts = torch.tensor([task.prompt] * len(pixels), device=self.device)
        start = time.perf_counter()
        visual = self.project(self.tower.embed(pixels).to(self.device, self.dtype))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        encoded = time.perf_counter()
        with self.model.looking_at(visual):
            output = self.gpt2.generate(prompts, attention_mask=torch.ones_like(prompts))
        written = output[:, len(task.prompt) :].tolist()
        done = time.perf_counter()
        return Sample(1e3 * (encoded - start), 1e3 * (done - encoded), tuple(map(tuple, written)))


def _compilations() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
