"""A plain `torch.onnx.export` of the model on ONNX Runtime, without merged adapters and in-graph top-k.

Two graphs wrap the calls of eager PyTorch: normalised pixels to the adapters' keys and values, and one step of the
language model with adapters. The host gets whole rows of logits, picks the best ones and reorders the cache, as other
exporters' generation code does. Run as a script, it exports a checkpoint: CHECKPOINT OUTPUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
from contestants import Sample, Task, search_captions
from numpy.typing import NDArray

from itune.runtime.engines.base import Candidates, Float32, Int64, UInt8
from itune.runtime.engines.onnxruntime import has_vnni
from itune.runtime.errors import ItuneError
from itune.runtime.settings import ImageSettings

ENCODER, DECODER, IMAGE = "encoder.onnx", "decoder.onnx", "image.json"
_INT8 = "int8-"
Array = NDArray[Any]


class PlainState:
    """The images' keys and values, and the rows' cache from the last step."""

    embedding = None

    def __init__(self, visual: list[Array]) -> None:
        self.visual = visual
        self.past: list[Array] = []
        self.mask: Int64 | None = None

    @property
    def images(self) -> int:
        """How many images are in the state."""
        return len(self.visual[0])

    def keep(self, images: Int64) -> None:
        """Drop every image but these."""
        self.visual = [array[images] for array in self.visual]


class PlainOnnx:
    """Both graphs behind the engine protocol; `precision` int8 uses ONNX Runtime's dynamic quantisation."""

    def __init__(self, folder: Path, threads: int, *, precision: str = "fp32") -> None:
        prefix = _INT8 if precision == "int8" else ""
        self.encoder, self.decoder = (_open(folder / f"{prefix}{name}", threads) for name in (ENCODER, DECODER))
        self.image = ImageSettings.model_validate_json((folder / IMAGE).read_text(encoding="utf-8"))
        inputs = self.decoder.get_inputs()
        self.visual = [i.name for i in inputs if i.name.startswith("visual.")]
        self.past = {i.name: (i.shape[1], i.shape[3]) for i in inputs if i.name.startswith("past.")}
        self.most_candidates = int(self.decoder.get_outputs()[0].shape[1])

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """Caption photos, uint8 [B, H, W, 3]."""
        return search_captions(self, pixels, task)

    def encode(self, pixels: UInt8) -> PlainState:
        """Normalise and encode images, uint8 [B, H, W, 3]."""
        scale = np.float32(1 / (255 * np.array(self.image.std)))
        shift = np.float32(-np.array(self.image.mean) / np.array(self.image.std))
        normalized = np.ascontiguousarray((pixels * scale + shift).transpose(0, 3, 1, 2))
        return PlainState(self.encoder.run(None, {"pixel_values": normalized}))

    def step(self, tokens: Int64, parents: Int64, state: PlainState, k: int, *, mask: Any = None) -> Candidates:
        """One step of the engine protocol; all prompts have one length here, so there is no mask."""
        assert mask is None
        real = np.ones_like(tokens)
        if state.mask is None:
            state.past = [np.zeros((len(tokens), h, 0, d), np.float32) for h, d in self.past.values()]
        else:
            real = np.concatenate([state.mask[parents], real], axis=1)
            state.past = [array[parents] for array in state.past]
        state.mask = real
        inputs = {
            "input_ids": tokens,
            "attention_mask": real,
            "position_ids": np.ascontiguousarray(real.cumsum(axis=1)[:, -tokens.shape[1] :] - 1),
        }
        inputs |= dict(zip(self.past, state.past, strict=True)) | dict(zip(self.visual, state.visual, strict=True))
        logits, *state.past = self.decoder.run(None, inputs)
        return best(logits, min(k, self.most_candidates))


def best(logits: Float32, k: int) -> Candidates:
    """The k largest of logits [rows, vocabulary], ties in order of the token id, and the log-sum-exp of all."""
    largest = logits.max(axis=1, keepdims=True)
    logsumexp = np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0]
    ids = np.sort(np.argpartition(logits, -k, axis=1)[:, -k:], axis=1)
    values = np.take_along_axis(logits, ids, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return Candidates(np.take_along_axis(values, order, axis=1), np.take_along_axis(ids, order, axis=1), logsumexp)


def _open(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # As in our own sessions: otherwise one session's waiting threads take the CPUs from the other's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def convert(checkpoint: Path, output: Path) -> None:
    """Export a checkpoint, and write int8 versions of both graphs as well."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from torch import Tensor, nn
    from torch.export import Dim
    from transformers import DynamicCache

    from itune.backbones import CACHE_ARGUMENT, ClipTower
    from itune.loading import LoadedCheckpoint

    loaded = LoadedCheckpoint.load(checkpoint)
    model, tower = loaded.model, loaded.tower
    if not isinstance(tower, ClipTower):
        raise ItuneError(f"{checkpoint}: its tower is an ONNX graph, which cannot be exported again")
    config: Any = model.language_model.config
    clip: nn.Module = tower.model

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.adapters = clip, model.adapters

        def forward(self, pixel_values: Tensor) -> list[Tensor]:
            visual = self.tower(pixel_values=pixel_values).last_hidden_state
            return list(model.project(visual).values())

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: Tensor, mask: Tensor, positions: Tensor, past: list[Tensor], visual: list[Tensor]
        ) -> list[Tensor]:
            cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            with model.looking_at(dict(zip(names, visual, strict=True))):
                out: Any = model.language_model(
                    input_ids,
                    attention_mask=mask,
                    position_ids=positions,
                    logits_to_keep=1,
                    **{CACHE_ARGUMENT: cache},
                )
            layers = cache.layers
            return [out.logits[:, -1], *(part for layer in layers for part in (layer.keys, layer.values))]

    # Example sizes: dimensions that vary must be at least 2, or the exporter takes them for constants.
    images, rows, new, cached = 2, 4, 2, 3
    height, width = tower.image.output_size
    projected = model.project(torch.zeros(images, tower.tokens, tower.width))
    names, visual = list(projected), [tensor.detach() for tensor in projected.values()]
    visual_names = [f"visual.{name}" for name in names]
    past = [torch.zeros(rows, config.n_head, cached, config.n_embd // config.n_head) for _ in range(2 * config.n_layer)]
    cache_names = [f"{i}.{part}" for i in range(config.n_layer) for part in ("key", "value")]
    tokens = torch.zeros(rows, new, dtype=torch.long)
    inputs, free = ("input_ids", "attention_mask", "position_ids"), Dim.DYNAMIC
    with torch.no_grad():
        torch.onnx.export(
            Encoder().eval(),
            (torch.zeros(images, 3, height, width),),
            output / ENCODER,
            dynamo=True,
            external_data=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=visual_names,
            dynamic_shapes=({0: free},),
        )
        torch.onnx.export(
            Step().eval(),
            (tokens, torch.ones(rows, cached + new, dtype=torch.long), tokens + cached, past, visual),
            output / DECODER,
            dynamo=True,
            external_data=True,
            verbose=False,
            input_names=[
                *inputs,
                *(f"past.{n}" for n in cache_names),
                *visual_names,
            ],
            output_names=["logits", *(f"present.{n}" for n in cache_names)],
            dynamic_shapes=(
                *({0: free, 1: free} for _ in range(3)),
                [{0: free, 2: free}] * len(past),
                [{0: free}] * len(visual),
            ),
        )
    with TemporaryDirectory() as folded:
        for name in (ENCODER, DECODER):
            # Constant folding comes first: the head is a transposed embedding, which would not be quantised otherwise.
            quant_pre_process(
                output / name,
                Path(folded) / name,
                skip_onnx_shape=True,
                skip_symbolic_shape=True,
                save_as_external_data=True,
                all_tensors_to_one_file=True,
            )
            quantize_dynamic(
                Path(folded) / name,
                output / f"{_INT8}{name}",
                # Convolutions stay in fp32, because their integer kernel is slower.
                op_types_to_quantize=["MatMul", "Gemm"],
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=not has_vnni(),  # ONNX Runtime's advice for CPUs whose 8-bit products saturate
                use_external_data_format=True,
            )
    (output / IMAGE).write_text(tower.image.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
