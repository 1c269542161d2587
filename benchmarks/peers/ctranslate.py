"""CTranslate2's int8 GPT-2: the language model alone, without adapters and image, so it only decodes.

Run as a script, it converts a checkpoint's language model: CHECKPOINT OUTPUT.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2
from contestants import Sample, Task

from itune.runtime.engines.base import UInt8


class CTranslate2:
    """Beam search inside CTranslate2, with the number of threads that is fastest.

    On CPUs for which it has no batched product (all but Intel's), attention becomes many small products with a barrier
    each, and one thread is faster than two. The first call tries both.
    """

    def __init__(self, model: Path, threads: int) -> None:
        self.model, self.threads = model, threads
        self.generator: Any = None

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """Write as many captions as there are photos; the photos themselves are ignored."""
        if self.generator is None:
            seconds = {threads: self._try(threads, len(pixels), task) for threads in {1, self.threads}}
            self._load(min(seconds, key=lambda threads: seconds[threads]))
        start = time.perf_counter()
        written = self._generate(len(pixels), task)
        return Sample(None, 1e3 * (time.perf_counter() - start), written)

    def _try(self, threads: int, batch: int, task: Task) -> float:
        self._load(threads)
        self._generate(batch, task)
        start = time.perf_counter()
        for _ in range(2):
            self._generate(batch, task)
        return time.perf_counter() - start

    def _load(self, threads: int) -> None:
        self.generator = None  # frees the old one first
        self.generator = ctranslate2.Generator(str(self.model), compute_type="int8", intra_threads=threads)

    def _generate(self, batch: int, task: Task) -> tuple[tuple[int, ...], ...]:
        results = self.generator.generate_batch(
            [[str(token) for token in task.prompt]] * batch,
            beam_size=task.num_beams,
            min_length=task.new_tokens,
            max_length=task.new_tokens,
            include_prompt_in_result=False,
        )
        return tuple(tuple(result.sequences_ids[0]) for result in results)


def convert(checkpoint: Path, output: Path) -> None:
    """Write the checkpoint's GPT-2 in int8; its vocabulary is the token ids, so it needs no tokenizer."""
    from ctranslate2.converters.transformers import GPT2Loader

    from itune.loading import LoadedCheckpoint

    gpt2 = LoadedCheckpoint.load(checkpoint).language.model
    spec = GPT2Loader().get_model_spec(gpt2)
    spec.register_vocabulary([str(token) for token in range(gpt2.config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = str(gpt2.config.eos_token_id)
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(str(output))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
