"""optimum's ORTModelForVision2Seq: a ViT and a GPT-2 with cross-attention, the architecture that optimum exports.

It has the geometry of the checkpoint and random weights of its own, so its captions are not compared. optimum needs
an older transformers than itune: the environment variable `ITUNE_OPTIMUM_PYTHON` names the Python of an environment of
its own. Run as a script, it makes the model: CHECKPOINT OUTPUT.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
from contestants import Sample, Task

from itune.runtime.engines.base import UInt8

PYTHON = "ITUNE_OPTIMUM_PYTHON"
GPT2 = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "bos_token_id", "eos_token_id")
VISION = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
)
PROCESS = Path(__file__).with_name("optimum_process.py")


class Optimum:
    """A process in optimum's environment; its memory is not counted."""

    def __init__(self, folder: Path, threads: int) -> None:
        command = [os.environ[PYTHON], str(PROCESS), str(folder), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """Caption photos, uint8 [B, H, W, 3]; normalising them is not timed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        normalized = (pixels.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
        generate = {"num_beams": task.num_beams, "min_new_tokens": task.new_tokens, "max_new_tokens": task.new_tokens}
        pickle.dump((normalized, generate), self.process.stdin)
        self.process.stdin.flush()
        encode, decode, tokens = pickle.load(self.process.stdout)
        return Sample(encode, decode, tuple(map(tuple, tokens)))


def _environment() -> dict[str, str]:
    """The environment variables without `PYTHONPATH`, whose packages are for another Python."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def convert(checkpoint: Path, output: Path) -> None:
    """Let optimum make and export a model of the checkpoint's geometry."""
    from itune.loading import LoadedCheckpoint

    loaded = LoadedCheckpoint.load(checkpoint)
    gpt2, clip = loaded.model.language_model.config, loaded.tower.model.config
    geometry = {"gpt2": {name: getattr(gpt2, name) for name in GPT2}, "vision": {n: getattr(clip, n) for n in VISION}}
    command = [os.environ[PYTHON], str(PROCESS), str(output), json.dumps(geometry)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment())


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
