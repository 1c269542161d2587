"""llama.cpp's GPT-2 in Q8_0 or Q4_0: the language model alone, without adapters and image, so it only decodes.

The beams are parallel sequences of one batch. Beams that change places share the cells of the cache, which llama.cpp
does not copy. Only its own work is timed: our search, which picks the tokens in NumPy, is not. Run as a script, it
converts a checkpoint's language model: CHECKPOINT OUTPUT.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from contestants import Sample, Task, search_captions

from itune.runtime.engines.base import Candidates, Float32, Int64, UInt8
from peers.plain_onnx import PlainState, best

_SILENT = llama.llama_log_callback(lambda *_: None)
F16, Q4_0, Q8_0 = "f16.gguf", "q4_0.gguf", "q8_0.gguf"


class LlamaCpp:
    """A quantised GPT-2 behind the engine protocol; it ignores the photos."""

    def __init__(self, folder: Path, threads: int, *, file: str) -> None:
        llama.llama_log_set(_SILENT, None)
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(str(folder / file).encode(), llama.llama_model_default_params())
        self.most_candidates = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.threads = threads
        self.context: Any = None
        self.sequences = 0
        self.seconds = 0.0
        self.positions = 0
        self.first = 0  # the first of the sequence ids of the last step's rows

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """Write as many captions as there are photos; only llama.cpp's own time counts."""
        rows = len(pixels) * task.num_beams
        if self.sequences != rows:
            self._open(rows, len(task.prompt) + task.new_tokens)
        self.seconds = 0.0
        sample = search_captions(self, pixels, task)
        return Sample(None, 1e3 * self.seconds, sample.tokens)

    def _open(self, rows: int, length: int) -> None:
        """A context for so many rows. Each row has two sequence ids, so that rows can change places."""
        if self.context is not None:
            llama.llama_batch_free(self.batch)
            llama.llama_free(self.context)
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = 2 * rows * length, 2 * rows, True
        params.n_threads = params.n_threads_batch = self.threads
        self.context = llama.llama_init_from_model(self.model, params)
        self.batch = llama.llama_batch_init(rows * length, 0, 1)
        self.memory = llama.llama_get_memory(self.context)
        self.sequences = rows

    def encode(self, pixels: UInt8) -> PlainState:
        """An empty cache."""
        llama.llama_memory_clear(self.memory, True)
        self.positions, self.first = 0, self.sequences
        return PlainState([np.zeros(len(pixels))])

    def step(self, tokens: Int64, parents: Int64, state: PlainState, k: int, *, mask: Any = None) -> Candidates:  # noqa: ARG002
        """One step of the engine protocol; all prompts have one length here, so there is no mask."""
        assert mask is None
        start = time.perf_counter()
        before, self.first = self.first, self.sequences - self.first
        if self.positions:
            for row, parent in enumerate(parents.tolist()):
                llama.llama_memory_seq_cp(self.memory, before + parent, self.first + row, -1, -1)
            for row in range(self.sequences):
                llama.llama_memory_seq_rm(self.memory, before + row, -1, -1)
        rows, length = tokens.shape
        batch = self.batch
        batch.n_tokens = rows * length
        for i, token in enumerate(tokens.ravel().tolist()):
            row, position = divmod(i, length)
            batch.token[i], batch.pos[i] = token, self.positions + position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, self.first + row
            batch.logits[i] = position == length - 1
        if llama.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.positions += length
        pointers = [llama.llama_get_logits_ith(self.context, row * length + length - 1) for row in range(rows)]
        self.seconds += time.perf_counter() - start
        logits: Float32 = np.stack([np.ctypeslib.as_array(pointer, (self.most_candidates,)) for pointer in pointers])
        return best(logits, k)


def convert(checkpoint: Path, output: Path) -> None:
    """Write the checkpoint's GPT-2 as GGUF in fp16 and let llama.cpp quantise it; its vocabulary has no texts."""
    import ctypes

    import gguf

    from itune.loading import LoadedCheckpoint

    model = LoadedCheckpoint.load(checkpoint).model
    config: Any = model.language_model.config
    writer = gguf.GGUFWriter(output / F16, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for name, tensor in model.language_model_state().items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        array = tensor.detach().float().numpy()
        if array.ndim == 2 and ".h." in name:
            array = array.T  # Conv1D
        writer.add_tensor(found, np.ascontiguousarray(array if array.ndim == 1 else array.astype(np.float16)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for file, kind in ((Q8_0, llama.LLAMA_FTYPE_MOSTLY_Q8_0), (Q4_0, llama.LLAMA_FTYPE_MOSTLY_Q4_0)):
        params = llama.llama_model_quantize_default_params()
        params.ftype = kind
        if llama.llama_model_quantize(str(output / F16).encode(), str(output / file).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp could not write {file}")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
