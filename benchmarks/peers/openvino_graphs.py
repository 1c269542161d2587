"""OpenVINO on our fp32 graphs with our search: another CPU engine for the same merged graphs.

Run as a script, it quantises the graphs of a bundle with NNCF: BUNDLE OUTPUT.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from contestants import Sample, Task, search_captions
from openvino._offline_transformations import apply_make_stateful_transformation

from itune.runtime.bundle import MANIFEST, Manifest
from itune.runtime.engines.base import Candidates, Int64, UInt8

VISION, DECODER = "vision.xml", "decoder.xml"
_PAST, _PRESENT = "past_key_values.", "present."


class OpenVinoState:
    """The images' keys and values, and the rows' mask; the rows' cache is in the request."""

    embedding = None

    def __init__(self, visual: dict[str, Any]) -> None:
        self.visual = visual
        self.mask: Any = None

    @property
    def images(self) -> int:
        """How many images are in the state."""
        return len(next(iter(self.visual.values())))

    def keep(self, images: Int64) -> None:
        """Drop every image but these."""
        self.visual = {name: array[images] for name, array in self.visual.items()}


class OpenVino:
    """Both graphs compiled for latency, behind the engine protocol, the caches as OpenVINO's own variables.

    `folder`: an fp32 bundle or the output of `convert`. `precision`: the type of the products, f32 or bf16; quantised
    products are int8 with both.
    """

    def __init__(self, folder: Path, threads: int, *, precision: str) -> None:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
        files = [folder / name for name in (VISION, DECODER)]
        if not files[0].exists():
            files = graph_files(folder, manifest)
        core = ov.Core()
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
        }
        vision, decoder = map(core.read_model, files)
        caches = [name for tensor in decoder.inputs if (name := tensor.any_name).startswith(_PAST)]
        shape = decoder.input(caches[0]).partial_shape
        self.heads, self.head_dim = shape[1].get_length(), shape[3].get_length()
        apply_make_stateful_transformation(decoder, {name: name.replace(_PAST, _PRESENT) for name in caches})
        self.vision = core.compile_model(vision, "CPU", config).create_infer_request()
        self.decoder = core.compile_model(decoder, "CPU", config).create_infer_request()
        self.most_candidates = manifest.tokens.candidates

    def caption(self, pixels: UInt8, task: Task) -> Sample:
        """Caption photos, uint8 [B, H, W, 3]."""
        return search_captions(self, pixels, task)

    def encode(self, pixels: UInt8) -> OpenVinoState:
        """The keys and values of images, uint8 [B, H, W, 3]."""
        self.vision.infer([pixels], share_inputs=True)
        outputs = self.vision.model_outputs
        return OpenVinoState({output.any_name: self.vision.get_tensor(output).data for output in outputs})

    def step(self, tokens: Int64, parents: Int64, state: OpenVinoState, k: int, *, mask: Any = None) -> Candidates:
        """One step of the engine protocol; all prompts have one length here, so there is no mask."""
        assert mask is None
        real = np.ones(tokens.shape, np.bool_)
        if state.mask is None:
            empty = np.zeros((len(tokens), self.heads, 0, self.head_dim), np.float32)
            for variable in self.decoder.query_state():
                variable.state = ov.Tensor(empty)
        else:
            real = np.concatenate([state.mask[parents], real], axis=1)
        state.mask = real
        inputs = {
            # OpenVINO does not accept long long, NumPy's other 64-bit integer type.
            "tokens": tokens.astype(np.int64),
            "positions": np.ascontiguousarray(real.cumsum(axis=1, dtype=np.int64)[:, -tokens.shape[1] :] - 1),
            "mask": real,
            "parents": parents.astype(np.int64),
            "k": np.array([k], np.int64),
        }
        self.decoder.infer(inputs | state.visual, share_inputs=True)
        return Candidates(*(self.decoder.get_tensor(name).data.copy() for name in Candidates._fields))


def graph_files(folder: Path, manifest: Manifest) -> list[Path]:
    """The vision and the decoder graph of a bundle."""
    files = {graph.role: graph.file for graph in manifest.graphs}
    return [folder / files[role] for role in ("vision", "decoder")]


def convert(source: Path, output: Path) -> None:
    """Quantise an fp32 bundle's graphs to int8: the encoder statically, the decoder's weights alone.

    The encoder is calibrated on random pictures, which costs accuracy but not time. OpenVINO quantises the decoder's
    activations at run time, its default.
    """
    import nncf
    from PIL import Image

    manifest = Manifest.model_validate_json((source / MANIFEST).read_text(encoding="utf-8"))
    vision, decoder = map(ov.Core().read_model, graph_files(source, manifest))
    rng = np.random.default_rng(0)
    height, width = manifest.image.output_size
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)) for _ in range(8)]
    pictures = [np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))[None] for image in coarse]
    vision = nncf.quantize(
        vision, nncf.Dataset(pictures), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(pictures)
    )
    decoder = nncf.compress_weights(decoder, mode=nncf.CompressWeightsMode.INT8_ASYM)
    for name, graph in ((VISION, vision), (DECODER, decoder)):
        ov.save_model(graph, output / name, compress_to_fp16=False)
    shutil.copy(source / MANIFEST, output)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
