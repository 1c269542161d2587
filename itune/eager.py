"""A captioner in PyTorch behind the engine protocol: the reference that exported graphs are verified against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from .backbones import CACHE_ARGUMENT, VisionTower
from .methods.base import CaptionModel, Visual
from .runtime.engines.base import Bool, Candidates, Int64, UInt8
from .runtime.search import NATIVE, top_k


class EagerState:
    """What is given of the images, the rows' cache, and the rows' mask of real tokens."""

    def __init__(self, visual: Visual) -> None:
        self.visual = visual
        self.cache = DynamicCache()
        self.mask: Tensor | None = None  # [rows, cached tokens]

    @property
    def images(self) -> int:
        """How many images are still in the state."""
        return len(next(iter(self.visual.values())))

    def keep(self, images: Int64) -> None:
        """Drop every image but these (see `State.keep`)."""
        index = torch.from_numpy(images)
        self.visual = {name: tensor[index] for name, tensor in self.visual.items()}


class EagerEngine:
    """The PyTorch model behind the engine protocol of `runtime.engines.base`."""

    def __init__(self, model: CaptionModel, tower: VisionTower, vocabulary: Int64 | None = None) -> None:
        """`vocabulary`: the ascending ids of the only tokens that may be written; None is all."""
        self.model, self.tower, self.vocabulary = model.train(False), tower, vocabulary

    @property
    def most_candidates(self) -> int:
        """See `Engine.most_candidates`."""
        return len(self.vocabulary) if self.vocabulary is not None else self.model.language_model.config.vocab_size

    @torch.inference_mode()
    def encode(self, pixels: UInt8) -> EagerState:
        """Images, uint8 [B, H, W, 3], to what the language model is given of them."""
        return self.encode_features(self.tower.embed(pixels))

    @torch.inference_mode()
    def encode_features(self, visual: Tensor) -> EagerState:
        """Visual embeddings [B, N, d_v] (computed before) to what the language model is given of them."""
        return EagerState(self.model.project(visual.to(self._device, self._dtype)))

    @torch.inference_mode()
    def step(self, tokens: Int64, parents: Int64, state: EagerState, k: int, *, mask: Bool | None = None) -> Candidates:
        """One step of the language model (see `Engine.step`)."""
        input_ids = torch.from_numpy(tokens).to(self._device)
        rows: Any = torch.from_numpy(parents).to(self._device)
        real = torch.ones_like(input_ids) if mask is None else torch.from_numpy(mask).to(input_ids)
        if state.mask is not None:
            state.cache.reorder_cache(rows)
            real = torch.cat([state.mask[rows], real], dim=1)
        state.mask = real
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        with self.model.looking_at(state.visual):
            logits: Any = self.model.language_model(
                input_ids,
                attention_mask=real,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{CACHE_ARGUMENT: state.cache},
            ).logits
        logits = logits[:, -1].float()
        if self.vocabulary is None:
            return candidates(logits, k)
        found = candidates(logits[:, self.vocabulary], k)
        return found._replace(token_ids=self.vocabulary[found.token_ids])

    @property
    def _device(self) -> torch.device:
        return self.model.language_model.device

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.adapters.parameters()).dtype


def candidates(logits: Tensor, k: int) -> Candidates:
    """The k largest of logits [rows, vocabulary] with their log-sum-exp; ties in order of the token id."""
    if NATIVE and logits.is_cpu:  # the same in a quarter of the time
        return top_k(logits.numpy(), k)
    k = min(k, logits.shape[1])
    values, ids = logits.topk(k)
    threshold = values[:, -1:]
    if ((logits == threshold).sum(1) > (values == threshold).sum(1)).any():
        # topk chose freely among equals at the threshold; a stable sort takes the lowest ids.
        values, ids = (t[:, :k] for t in logits.sort(dim=1, descending=True, stable=True))
    order = np.lexsort((ids.cpu().numpy(), -values.cpu().numpy()), axis=1)
    take = torch.from_numpy(order).to(values.device)
    return Candidates(
        values.gather(1, take).cpu().numpy(),
        ids.gather(1, take).cpu().numpy(),
        logits.logsumexp(1).cpu().numpy(),
    )
