"""Any ONNX graph as a vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..files import hash_files
from ..runtime.engines.base import UInt8
from ..runtime.errors import reading
from ..runtime.settings import ImageSettings
from .preprocessing import normalize, read_image_settings
from .sources import BackboneError


class OnnxTower:
    """An ONNX graph from normalized pixels, float32 [B, 3, H, W], to embeddings [B, N, d_v]."""

    kind: Literal["clip", "onnx"] = "onnx"

    def __init__(self, file: Path, image: ImageSettings | None = None) -> None:
        import onnxruntime as ort

        self.file = file
        self.folder = file.parent
        self.image = image or read_image_settings(self.folder)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        # Otherwise its idle threads spin for 50 ms after a run and slow PyTorch's down.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with reading(file, BackboneError, "give an ONNX graph as the vision tower"):
            self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        height, width = self.image.output_size
        shape = inputs[0].shape if len(inputs) == 1 and inputs[0].type == "tensor(float)" else []
        # A dimension that is not a number may be anything.
        if len(shape) != 4 or any(
            isinstance(n, int) and n != m for n, m in zip(shape[1:], (3, height, width), strict=True)
        ):
            found = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
            raise BackboneError(
                f"{file}: the inputs are {found}; a vision tower has one, float32 pixels [B, 3, {height}, {width}]"
            )
        named = [o for o in outputs if o.name == "last_hidden_state"] or outputs
        self._output = named[0].name
        self._one_at_a_time = isinstance(shape[0], int)
        probe = self.embed(np.zeros((1, height, width, 3), np.uint8))
        if probe.ndim != 3:
            raise BackboneError(
                f"{file}: output {self._output} has shape {list(probe.shape)}; embeddings are [B, N, width]"
            )
        self.tokens, self.width = probe.shape[1:]
        external = sorted(self.folder.glob(f"{file.name}.data*"))
        self.sha256 = hash_files([file, *external])

    def embed(self, pixels: UInt8) -> Tensor:
        """Visual embeddings float32 [B, tokens, width] of uint8 pixels [B, H, W, 3]."""
        x = normalize(pixels, self.image)
        name = self.session.get_inputs()[0].name
        batches = np.split(x, len(x)) if self._one_at_a_time else [x]
        return torch.from_numpy(np.concatenate([self.session.run([self._output], {name: b})[0] for b in batches]))
