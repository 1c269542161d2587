"""A captioner in PyTorch behind the engine protocol: the reference that exported graphs are verified against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .backbones import CACHE_ARGUMENT, VisionTower
from .methods.base import CaptionModel, Visual
from .runtime.engines.base import Bool, Candidates, Float32, Int64, UInt8, mask_and_positions

if TYPE_CHECKING:
    from .retrieval.encoder import RetrievalHead


@dataclass
class EagerState:
    """What the language model sees of the images, the rows' cache, and the rows' mask of real tokens."""

    visual: Visual
    embedding: Float32 | None = None
    cache: DynamicCache = field(default_factory=DynamicCache)
    mask: Bool | None = None  # [rows, cached tokens]

    @property
    def images(self) -> int:
        """How many images are still in the state."""
        return len(next(iter(self.visual.values())))

    def keep(self, images: Int64) -> None:
        """Drop every image but `images`."""
        index = torch.from_numpy(images)
        self.visual = {name: tensor[index] for name, tensor in self.visual.items()}


class EagerEngine:
    """The PyTorch model behind the engine protocol of `runtime.engines.base`."""

    def __init__(
        self,
        model: CaptionModel,
        tower: VisionTower,
        vocabulary: Int64 | None = None,
        head: RetrievalHead | None = None,
    ) -> None:
        """`vocabulary`: ascending ids of the only tokens to write (None: all). `head`: gives states an embedding."""
        self.model, self.tower, self.vocabulary, self.head = model.train(False), tower, vocabulary, head

    @property
    def most_candidates(self) -> int:
        """The number of different tokens that the model can write."""
        return len(self.vocabulary) if self.vocabulary is not None else self.model.language_model.config.vocab_size

    @torch.inference_mode()
    def encode(self, pixels: UInt8) -> EagerState:
        """Encode images, uint8 [B, H, W, 3]."""
        return self.encode_features(self.tower.embed(pixels))

    @torch.inference_mode()
    def encode_features(self, visual: Tensor) -> EagerState:
        """Encode images whose visual embeddings [B, N, d_v] were computed before."""
        embedding = None if self.head is None else self.head.pool(visual).cpu().numpy()
        dtype = next(self.model.adapters.parameters()).dtype
        return EagerState(self.model.project(visual.to(self._device, dtype)), embedding)

    @torch.inference_mode()
    def step(self, tokens: Int64, parents: Int64, state: EagerState, k: int, *, mask: Bool | None = None) -> Candidates:
        """Feed `tokens` [rows, T] to the language model and return the k best continuations of each row."""
        rows: Any
        real, positions = mask_and_positions(state.mask, tokens, parents, mask)
        input_ids, rows, attention_mask, position_ids = (
            torch.from_numpy(array).to(self._device, torch.int64) for array in (tokens, parents, real, positions)
        )
        if state.mask is not None:
            state.cache.reorder_cache(rows)
        state.mask = real
        with self.model.looking_at(state.visual):
            logits: Any = self.model.language_model(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=True,
                logits_to_keep=1,
                **{CACHE_ARGUMENT: state.cache},
            ).logits
        logits = logits[:, -1].float()
        if self.vocabulary is None:
            return self.candidates(logits, k)
        found = self.candidates(logits[:, self.vocabulary], k)
        return found._replace(token_ids=self.vocabulary[found.token_ids])

    def candidates(self, logits: Tensor, k: int) -> Candidates:
        """The candidates of rows of logits [rows, vocabulary]."""
        return candidates(logits, k)

    @property
    def _device(self) -> torch.device:
        return self.model.language_model.device


def candidates(logits: Tensor, k: int) -> Candidates:
    """The k largest of logits [rows, vocabulary] with their log-sum-exp; ties in order of the token id."""
    k = min(k, logits.shape[1])
    best = logits.topk(k)
    if ((logits >= best.values[:, -1:]).sum(1) > k).any():
        # topk chooses freely among equals at the threshold; a stable sort takes the lowest ids.
        values, ids = (t[:, :k] for t in logits.sort(dim=1, descending=True, stable=True))
    else:
        ascending = best.indices.sort(dim=1).values
        values, order = logits.gather(1, ascending).sort(dim=1, descending=True, stable=True)
        ids = ascending.gather(1, order)
    return Candidates(values.cpu().numpy(), ids.cpu().numpy(), logits.logsumexp(1).cpu().numpy())
