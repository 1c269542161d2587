"""What the captioning methods share: a frozen GPT-2 that sees images through new, trainable weights.

Each method is a subclass. It turns visual embeddings into tensors for the language model (`project`), replaces parts of
GPT-2 with modules that read these tensors, and describes itself in `itune.json`. GPT-2 keeps its parameter names and
its own `generate`. Training, evaluation, export and the eager engine use only this interface.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from ..backbones.weight_files import misfit, read_tensors
from ..checkpoint import CONFIG_FILE, CheckpointConfig, CheckpointError
from ..files import atomic_path
from ..runtime.errors import reading
from ..runtime.settings import Method, TextSettings
from ..training.batches import Packing
from ..training.config import TrainConfig

ModelConfig = TrainConfig | CheckpointConfig
"""What describes a model: the settings of a training run, or a checkpoint."""
Visual = dict[str, Tensor]
"""Images as the language model reads them: tensors [images, ...] by name, in exported graphs `visual.NAME`."""


class CaptionModel(nn.Module, ABC):
    """A frozen language model with a method's trainable weights, `adapters`."""

    method: ClassVar[Method]
    weights_prefix: ClassVar[str] = "layers."
    """Prefix of the names of `adapters` in a checkpoint."""
    begins: ClassVar[bool] = True
    """Whether the begin token stands before the prompt."""
    prefix_length: int = 0
    """Number of the image's embeddings before the prompt; their token ids follow the vocabulary's."""

    def __init__(self, language_model: GPT2LMHeadModel, adapters: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model.requires_grad_(False)
        self.adapters = adapters
        self.train(False)

    @classmethod
    @abstractmethod
    def create(cls, config: ModelConfig, language_model: GPT2LMHeadModel, visual: tuple[int, int]) -> Self:
        """A model as `config` describes it, with fresh adapters, for visual embeddings of shape `visual` = (N, d_v)."""

    @classmethod
    def text(cls, config: TrainConfig) -> TextSettings:
        """The text settings of a model to be trained."""
        return TextSettings(
            begin=(config.begin or None) if cls.begins else None,
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
        """The method's own fields of `itune.json`."""

    @abstractmethod
    def project(self, visual: Tensor) -> Visual:
        """Turn visual embeddings [images, N, d_v] into what the language model reads."""

    @abstractmethod
    def looking_at(self, visual: Visual) -> AbstractContextManager[None]:
        """Show these images to the language model within the block; its rows are grouped by image."""

    @contextmanager
    def recording(self, weights: list[Tensor]) -> Iterator[None]:  # noqa: ARG002
        """Append every layer's attention over the image to `weights` within the block; without attention do nothing."""
        yield

    def train(self, mode: bool = True) -> Self:
        """Switch the adapters to training or evaluation; the frozen language model stays in evaluation."""
        super().train(mode)
        self.language_model.train(False)
        return self

    def loss(
        self,
        input_ids: Tensor,
        mask: Tensor,
        visual: Tensor,
        label_smoothing: float = 0.0,
        packing: Packing | None = None,
    ) -> Tensor:
        """Sum of the next-token cross-entropies of the caption and end tokens.

        input_ids [rows, T]: begin [prompt] caption end, right-padded; mask [rows, T]: True at the tokens to predict;
        visual [images, N, d_v], rows grouped by image with equally many rows each; packing: for rows that hold several
        captions.
        """
        logits = self.scored_logits(input_ids, mask, visual, packing)
        return F.cross_entropy(logits, input_ids[mask], label_smoothing=label_smoothing, reduction="sum")

    def scored_logits(self, input_ids: Tensor, mask: Tensor, visual: Tensor, packing: Packing | None = None) -> Tensor:
        """Logits [tokens of `mask`, vocabulary] that predict these tokens, in float32.

        The arguments are those of `loss`.
        """
        with self.looking_at(self.project(visual)):
            hidden = self._hidden(input_ids, packing)
        # The output head is the most expensive product: only scored positions go through it.
        logits: Tensor = self.language_model.lm_head(hidden[_sources(mask, packing)])
        return logits.float()

    def _hidden(self, input_ids: Tensor, packing: Packing | None) -> Tensor:
        packed: dict[str, Tensor] = {}
        if packing is not None:
            packed["position_ids"] = packing.positions[:, :-1]
            packed["attention_mask"] = packing.attention_mask()[..., :-1, :-1]
        hidden: Tensor = self.language_model.transformer(input_ids=input_ids[:, :-1], use_cache=False, **packed)[0]
        return hidden

    def attention_entropy(
        self, input_ids: Tensor, mask: Tensor, visual: Tensor, packing: Packing | None = None
    ) -> float | None:
        """Mean entropy of the attention over the image at scored positions, as a fraction of its maximum log N.

        The arguments are those of `loss`. None if the method's language model does not attend to the image.
        """
        weights: list[Tensor] = []
        with torch.no_grad(), self.looking_at(self.project(visual)), self.recording(weights):
            self._hidden(input_ids, packing)
        if not weights:
            return None
        entropies = torch.stack([torch.special.entr(each).sum(-1).mean(1).flatten(1) for each in weights])
        rows, length = mask.shape[0], mask.shape[1] - 1
        scored = entropies.reshape(len(weights), rows, length)[:, *_sources(mask, packing)]
        return float(scored.mean()) / math.log(visual.shape[1]) if visual.shape[1] > 1 else 0.0

    def language_model_state(self) -> dict[str, Tensor]:
        """GPT-2's own weights under its own names, without a tied output head and without the adapters."""
        state: dict[str, Tensor] = self.language_model.state_dict()
        if self.language_model.lm_head.weight is self.language_model.transformer.wte.weight:
            del state["lm_head.weight"]
        return state

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters' weights under their checkpoint names."""
        return {f"{self.weights_prefix}{name}": weight for name, weight in self.adapters.state_dict().items()}

    def save_adapters(self, path: Path) -> None:
        """Write the adapters to a safetensors file, atomically."""
        write_tensors({name: tensor.detach().float() for name, tensor in self.adapter_state().items()}, path)

    def load_adapters(self, path: Path) -> None:
        """Read the adapters from a safetensors file; names and shapes must match, values must be finite floats.

        Adapters that were created on the `meta` device take up the file's tensors.
        """
        state = self.adapter_state()
        with reading(path, CheckpointError, "copy the checkpoint again"):
            tensors = read_tensors(path)
            if problem := misfit(tensors, {name: tensor.shape for name, tensor in state.items()}):
                raise CheckpointError(f"{path}: {problem}; {CONFIG_FILE} and the frozen models say what is expected")
        # Copied, because the file is mapped.
        loaded = {n.removeprefix(self.weights_prefix): t.to(torch.float32, copy=True) for n, t in tensors.items()}
        self.adapters.load_state_dict(loaded, assign=any(tensor.is_meta for tensor in state.values()))


def _sources(mask: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Rows and positions from which the tokens of `mask` are predicted."""
    rows, columns = mask.nonzero(as_tuple=True)
    return rows, columns - 1 if packing is None else packing.sources[rows, columns]


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, atomically."""
    with reading(path, CheckpointError, "make room"), atomic_path(path) as temporary:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
