"""The process of `optimum_onnx.py`, in optimum's own environment: nothing of itune is imported here.

With a folder and a number of threads it captions what comes through the pipe; with a folder and JSON it makes a model
of that geometry: a ViT and a GPT-2 with cross-attention in every layer, random weights.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForVision2Seq


def make(folder: Path, geometry: dict[str, dict[str, Any]]) -> None:
    """Build the model and export it to ONNX, as optimum's own command does."""
    from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    gpt2 = GPT2Config(**geometry["gpt2"], add_cross_attention=True, is_decoder=True)
    encoder = ViTModel(ViTConfig(**geometry["vision"]), add_pooling_layer=False)
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=GPT2LMHeadModel(gpt2))
    model.config.decoder_start_token_id = model.config.pad_token_id = gpt2.eos_token_id
    model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = gpt2.eos_token_id
    model.save_pretrained(folder / "pytorch")
    ORTModelForVision2Seq.from_pretrained(folder / "pytorch", export=True).save_pretrained(folder / "onnx")


def serve(folder: Path, threads: int) -> None:
    """Answer (pixels [B, 3, H, W], options of generate) with (ms of encoding, ms of decoding, tokens, peak MB)."""
    import onnxruntime

    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = ORTModelForVision2Seq.from_pretrained(folder / "onnx", session_options=options)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            pixels, generate = pickle.load(requests)
        except EOFError:
            return
        with torch.inference_mode():
            start = time.perf_counter()
            encoded = model.encoder(pixel_values=torch.from_numpy(pixels))
            middle = time.perf_counter()
            tokens = model.generate(encoder_outputs=encoded, **generate)[:, 1:].tolist()
            end = time.perf_counter()
        pickle.dump((1e3 * (middle - start), 1e3 * (end - middle), tokens), answers)
        answers.flush()


if __name__ == "__main__":
    if sys.argv[2].isdecimal():
        serve(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        make(Path(sys.argv[1]), json.loads(sys.argv[2]))
