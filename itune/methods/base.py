"""What the captioning methods share: a frozen GPT-2 that sees images through new, trainable weights.

A method is a subclass: it says what the language model is given of an image (`project`), hangs its weights on the
language model by forward hooks, so that GPT-2 keeps its own parameter names and its own `generate`, and describes
itself in `itune.json`. Training, evaluation, export and the engine see no more than this class.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from ..checkpoint import CheckpointConfig, CheckpointError
from ..files import atomic_path
from ..runtime.settings import Method, TextSettings
from ..training.batches import Packing
from ..training.config import TrainConfig

Visual = dict[str, Tensor]
"""What the language model is given of some images: tensors [images, ...] by name, the exported graphs' inputs
`visual.NAME`."""


class CaptionModel(nn.Module, ABC):
    """A frozen language model with a method's trainable weights, `adapters`."""

    method: ClassVar[Method]
    weights_prefix: ClassVar[str] = "layers."
    """What the names of `adapters` begin with in a checkpoint."""
    prefix_length: int = 0
    """How many embeddings of the image stand before the caption's head; their token ids follow the vocabulary's."""

    def __init__(self, language_model: GPT2LMHeadModel, adapters: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model.requires_grad_(False)
        self.adapters = adapters
        self.visual: Visual | None = None
        self.train(False)

    @classmethod
    @abstractmethod
    def create(cls, config: TrainConfig, language_model: GPT2LMHeadModel, tokens: int, width: int) -> Self:
        """A model to be trained, on visual embeddings [images, tokens, width]."""

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, config: CheckpointConfig, language_model: GPT2LMHeadModel) -> Self:
        """The model that a checkpoint describes, its adapters not loaded yet."""

    @classmethod
    def text(cls, config: TrainConfig) -> TextSettings:
        """How the captions of a model to be trained are written."""
        return TextSettings(
            begin=config.begin or None,
            prompt=config.prompt,
            lower=config.lower,
            strip_period=config.strip_period,
            end=config.end,
        )

    @property
    def prefix_ids(self) -> range:
        """The token ids that stand for the image's `prefix_length` embeddings."""
        vocab_size: int = self.language_model.config.vocab_size
        return range(vocab_size, vocab_size + self.prefix_length)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The fields of `itune.json` that are the method's own."""

    @abstractmethod
    def project(self, visual: Tensor) -> Visual:
        """What the language model is given of images, from their embeddings [images, N, d_v]."""

    def train(self, mode: bool = True) -> Self:
        """Training mode is the adapters'; the frozen language model never drops anything."""
        super().train(mode)
        self.language_model.train(False)
        return self

    @contextmanager
    def looking_at(self, visual: Visual) -> Iterator[None]:
        """Within the block the language model sees these images; its rows are grouped by image."""
        self.visual = visual
        try:
            yield
        finally:
            self.visual = None

    def seen(self) -> Visual:
        """The images that the language model is looking at."""
        if self.visual is None:
            raise RuntimeError("call the language model within `looking_at(...)`: it has no image to see")
        return self.visual

    def loss(
        self,
        input_ids: Tensor,
        mask: Tensor,
        visual: Tensor,
        label_smoothing: float = 0.0,
        packing: Packing | None = None,
    ) -> Tensor:
        """Sum of the next-token cross-entropies of the caption and end tokens.

        input_ids [rows, T]: begin [prompt] caption end, right-padded; mask [rows, T]: True at tokens that are
        to be predicted; visual [images, N, d_v], rows grouped by image with equally many rows each; packing: where a
        row holds several captions.
        """
        with self.looking_at(self.project(visual)):
            hidden = self._hidden(input_ids, packing)
        # The head is the dearest product: only positions that are scored go through it.
        logits = self.language_model.lm_head(hidden[_sources(mask, packing)])
        return F.cross_entropy(logits.float(), input_ids[mask], label_smoothing=label_smoothing, reduction="sum")

    def _hidden(self, input_ids: Tensor, packing: Packing | None) -> Tensor:
        given: dict[str, Tensor] = {}
        if packing is not None:
            given = {
                "position_ids": packing.positions[:, :-1],
                "attention_mask": packing.attention_mask()[..., :-1, :-1],
            }
        hidden: Tensor = self.language_model.transformer(input_ids=input_ids[:, :-1], use_cache=False, **given)[0]
        return hidden

    def attention_entropy(
        self, input_ids: Tensor, mask: Tensor, visual: Tensor, packing: Packing | None = None
    ) -> float | None:
        """Mean entropy of the attention over the image at scored positions, as a fraction of its maximum log N.

        The arguments are those of `loss`. None for a method whose language model attends to no image.
        """
        weights: list[Tensor] = []
        with torch.no_grad(), self.looking_at(self.project(visual)), self.watched(weights):
            self._hidden(input_ids, packing)
        if not weights:
            return None
        entropies = torch.stack([torch.special.entr(each).sum(-1).mean(1).flatten(1) for each in weights])
        rows, length = mask.shape[0], mask.shape[1] - 1
        scored = entropies.reshape(len(weights), rows, length)[:, *_sources(mask, packing)]
        return float(scored.mean()) / math.log(visual.shape[1]) if visual.shape[1] > 1 else 0.0

    @contextmanager
    def watched(self, weights: list[Tensor]) -> Iterator[None]:  # noqa: ARG002 - what a method without any needs
        """Within the block every layer's attention over the image [images, heads, queries, N] is appended."""
        yield

    def language_model_state(self) -> dict[str, Tensor]:
        """The frozen language model's weights under GPT-2's own names; a tied head is left out."""
        state: dict[str, Tensor] = self.language_model.state_dict()
        if self.language_model.lm_head.weight is self.language_model.transformer.wte.weight:
            del state["lm_head.weight"]
        return state

    def adapter_state(self) -> dict[str, Tensor]:
        """The trainable weights under their checkpoint names."""
        return {f"{self.weights_prefix}{name}": weight for name, weight in self.adapters.state_dict().items()}

    def save_adapters(self, path: Path) -> None:
        """Write the trainable weights to a safetensors file, atomically."""
        tensors = {name: t.detach().float() for name, t in self.adapter_state().items()}
        write_tensors(tensors, path)

    def load_adapters(self, path: Path) -> None:
        """Read the trainable weights; a missing, surplus or misshapen tensor is named."""
        self.load_adapter_state(read_adapters(path), path)

    def load_adapter_state(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Put tensors under their checkpoint names into the adapters; `path` is what an error names."""
        expected = self.adapter_state()
        odd = sorted(expected.keys() ^ tensors.keys())
        if odd:
            state = "lacks" if odd[0] in expected else "has an unexpected"
            raise CheckpointError(f"{path} {state} tensor {odd[0]}: it does not fit the checkpoint's itune.json")
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(tensor.shape)}, itune.json asks for "
                    f"{list(expected[name].shape)}"
                )
        self.adapters.load_state_dict({name.removeprefix(self.weights_prefix): t for name, t in tensors.items()})


def _sources(mask: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Rows and positions that the tokens of `mask` are predicted from."""
    rows, columns = mask.nonzero(as_tuple=True)
    return rows, columns - 1 if packing is None else packing.sources[rows, columns]


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file atomically. Raises CheckpointError where there is no room for it, say."""
    try:
        with atomic_path(path) as temporary:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}): make room; a training goes on by --resume"
        ) from None


def read_adapters(path: Path) -> dict[str, Tensor]:
    """The tensors of an `adapters.safetensors`."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy the checkpoint again") from None
