"""What the latency benchmark compares, each in a process of its own that waits for photos on a pipe.

Separate processes give every contestant its own peak memory and its own threads; a contestant that waits does not
use the CPU.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from itune import ItuneError
from itune.runtime.engines.base import UInt8


class Sample(NamedTuple):
    """One caption: milliseconds, and the tokens that were written."""

    encode: float
    decode: float
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """What everybody does alike: beams, a forced length, threads."""

    num_beams: int
    new_tokens: int
    threads: int


class Contestant(Protocol):
    """Captions one preprocessed photo, uint8 [1, H, W, 3]."""

    def caption(self, pixels: UInt8) -> Sample:
        """Encode, decode, and the time of each."""
        ...


class Eager:
    """PyTorch with its KV cache: the tower, then `transformers.generate` over the language model with adapters."""

    def __init__(self, checkpoint: Path, task: Task) -> None:
        import torch
        from transformers import GenerationConfig

        from itune.evaluate import eager_captioner
        from itune.model import LoadedCheckpoint

        torch.set_num_threads(task.threads)
        self.loaded = LoadedCheckpoint.load(checkpoint)
        self.tokens = eager_captioner(self.loaded).tokens
        self.gpt2: Any = self.loaded.language.model
        # In place of the checkpoint's own, whose penalties `generate` would go on applying.
        self.gpt2.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            num_beams=task.num_beams,
            min_new_tokens=task.new_tokens,
            max_new_tokens=task.new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.tokens.end,
            pad_token_id=self.tokens.end,
        )

    def caption(self, pixels: UInt8) -> Sample:
        """See `Contestant.caption`."""
        import torch

        model, prompt = self.loaded.model, [self.tokens.begin, *self.tokens.prompt]
        with torch.inference_mode():
            start = time.perf_counter()
            visual = model.project(self.loaded.tower.embed(pixels))
            encoded = time.perf_counter()
            with model.looking_at(visual):
                output = self.gpt2.generate(
                    torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long)
                )
            done = time.perf_counter()
        written = output[0, len(prompt) :].tolist()
        return Sample(1e3 * (encoded - start), 1e3 * (done - encoded), tuple(written))


class Bundle:
    """An exported bundle on its engine, with the project's own search."""

    def __init__(self, bundle: Path, task: Task) -> None:
        from itune import Captioner
        from itune.runtime.search import SearchConfig

        self.captioner = Captioner.load(bundle, threads=task.threads)
        self.config = SearchConfig(
            num_beams=task.num_beams, min_new_tokens=task.new_tokens, max_new_tokens=task.new_tokens
        )

    def caption(self, pixels: UInt8) -> Sample:
        """See `Contestant.caption`."""
        from itune.runtime.search import search

        engine, tokens = self.captioner.engine, self.captioner.tokens
        start = time.perf_counter()
        state = engine.encode(pixels)
        encoded = time.perf_counter()
        hypotheses = search(engine, state, [[tokens.begin, *tokens.prompt]], self.config, tokens.end)
        done = time.perf_counter()
        return Sample(1e3 * (encoded - start), 1e3 * (done - encoded), hypotheses[0][0].tokens)


KINDS: dict[str, Any] = {"eager": Eager, "bundle": Bundle}


class Worker:
    """A contestant in its own process, which ends with this one."""

    def __init__(self, kind: str, folder: Path, task: Task) -> None:
        context = get_context("spawn")
        self.kind = kind
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, kind, folder, task), daemon=True)
        # Inherited: Ctrl-C is for this process, which then ends the others.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        theirs.close()
        self._exchange()  # loaded

    def caption(self, pixels: UInt8) -> Sample:
        """Have one photo captioned, uint8 [1, H, W, 3]."""
        sample: Sample = self._exchange(pixels)
        return sample

    def close(self) -> float:
        """End the process; returns its peak resident memory in MB."""
        peak: float = self._exchange(None)
        self.process.join()
        return peak

    def _exchange(self, *messages: UInt8 | None) -> Any:
        try:
            for message in messages:
                self.pipe.send(message)
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            status = self.process.exitcode
            raise ItuneError(f"the {self.kind} process died with status {status}, perhaps for want of memory") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe: Connection, kind: str, folder: Path, task: Task) -> None:
    try:
        contestant: Contestant = KINDS[kind](folder, task)
        pipe.send(None)
        while (pixels := pipe.recv()) is not None:
            pipe.send(contestant.caption(np.asarray(pixels)))
        pipe.send(_peak_memory())
    except (EOFError, ConnectionError):
        pass  # the parent is gone
    except ItuneError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


def _peak_memory() -> float:
    """The largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage would count what the parent had when it started this process
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
