"""ClipCap: Mokady et al., "ClipCap: CLIP Prefix for Image Captioning" (https://arxiv.org/abs/2111.09734).

A mapper turns one embedding of the image into `prefix_length` embeddings, which a frozen GPT-2 reads in place of tokens
before the caption:

    p_1 ... p_k = mapper(pool(V))            GPT-2 reads p_1 ... p_k c_1 ... c_l, the loss covers c_1 ... c_l

Modules have the names of the authors' code, so their checkpoints load unchanged. In `input_ids` the ids after the
vocabulary's stand for the prefix, so batching, masks and search need not know about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from ...backbones import ClipProjection, load_clip_projection, vision_kind
from ...runtime.errors import ItuneError
from ...runtime.settings import Method
from ...training.config import ConfigError, TrainConfig
from ..base import CaptionModel, ModelConfig, Visual
from .settings import TRANSFORMER_FIELDS, ClipCapCheckpoint

Pooling = Literal["projected", "cls", "mean"]


@dataclass(frozen=True)
class ClipCapConfig:
    """Shape of a mapper and of its input."""

    hidden_size: int  # width d of the language model
    visual_width: int  # width d_v of the visual embeddings
    mapper: Literal["transformer", "mlp"] = "transformer"
    prefix_length: int = 10  # embeddings before the caption: the paper's k
    clip_length: int = 10  # transformer mapper: vectors of width d that the image's embedding becomes
    mapper_layers: int = 8
    mapper_heads: int = 8
    pooling: Pooling = "cls"
    """Image embedding that the mapper reads: `cls` position 0, `mean` the mean of all, `projected` position 0 after
    CLIP's projection."""
    projected_width: int | None = None  # of CLIP's projection; only with `pooling` projected
    layer_norm_eps: float = 1e-5  # of the layer norm before the projection
    normalize: bool = False  # scale the embedding to length 1
    dropout: float = 0.0  # in the mapper's feed-forward blocks, while training

    def __post_init__(self) -> None:
        if self.mapper == "transformer" and self.hidden_size % self.mapper_heads:
            raise ItuneError(
                f"--mapper-heads {self.mapper_heads} does not divide the language model's width {self.hidden_size}"
            )

    @property
    def input_width(self) -> int:
        """Width of the embedding that the mapper reads."""
        return self.projected_width or self.visual_width


class Attention(nn.Module):
    """Self-attention of the mapper; only the output has a bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [images, n, d] to the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [images, heads, n, d / heads]
            for part in (self.to_queries(x), *self.to_keys_values(x).chunk(2, dim=-1))
        )
        output: Tensor = self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return output


class FeedForward(nn.Module):
    """Two layers with a ReLU between them."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [images, n, d] to the same."""
        output: Tensor = self.dropout(self.fc2(self.dropout(self.fc1(x).relu())))
        return output


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, config.mapper_heads)
        self.mlp = FeedForward(width, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [images, n, d] to the same."""
        x = x + self.attn(self.norm1(x))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class TransformerMapper(nn.Module):
    """A transformer over the image's vectors and learned constants; its outputs at the constants are the prefix."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        self.clip_length = config.clip_length
        layers = nn.Sequential(*(Layer(config) for _ in range(config.mapper_layers)))
        self.transformer = nn.ModuleDict({"layers": layers})
        self.linear = nn.Linear(config.input_width, config.clip_length * config.hidden_size)
        self.prefix_const = nn.Parameter(torch.randn(config.prefix_length, config.hidden_size))

    def forward(self, embedding: Tensor) -> Tensor:
        """Prefix [images, prefix_length, d] from the images' embeddings [images, width]."""
        image = self.linear(embedding).unflatten(-1, (self.clip_length, -1))
        constants = self.prefix_const.expand(len(image), -1, -1).to(image.dtype)
        output: Tensor = self.transformer["layers"](torch.cat([image, constants], dim=1))[:, self.clip_length :]
        return output


class MlpMapper(nn.Module):
    """One hidden layer, half as wide as the whole prefix."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        self.prefix_length = config.prefix_length
        width = config.prefix_length * config.hidden_size
        linears = nn.Linear(config.input_width, width // 2), nn.Linear(width // 2, width)
        self.model = nn.Sequential(linears[0], nn.Tanh(), linears[1])
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, embedding: Tensor) -> Tensor:
        """Prefix [images, prefix_length, d] from the images' embeddings [images, width]."""
        first, tanh, second = self.model
        output: Tensor = second(self.dropout(tanh(first(embedding)))).unflatten(-1, (self.prefix_length, -1))
        return output


class ImagePrefix(nn.Module):
    """Visual embeddings to the prefix: pooling, projection, normalization, mapper."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        self.config = config
        self.projection: ClipProjection | None = None
        if config.projected_width is not None:
            self.projection = ClipProjection(config.visual_width, config.projected_width, config.layer_norm_eps)
        self.mapper = TransformerMapper(config) if config.mapper == "transformer" else MlpMapper(config)

    def pool(self, visual: Tensor) -> Tensor:
        """The mapper's input [images, width] from visual embeddings [images, N, d_v]."""
        embedding = visual.mean(dim=1) if self.config.pooling == "mean" else visual[:, 0]
        if self.projection is not None:
            embedding = self.projection(embedding)
        return F.normalize(embedding, dim=-1) if self.config.normalize else embedding

    def forward(self, visual: Tensor) -> Tensor:
        """Prefix [images, prefix_length, d] from visual embeddings [images, N, d_v]."""
        prefix: Tensor = self.mapper(self.pool(visual))
        return prefix


class PrefixedEmbedding(nn.Embedding):
    """GPT-2's token embedding, in which the ids after the vocabulary's stand for the image's prefix."""

    prefix: Tensor  # [images, prefix_length, d]

    def __init__(self, wte: nn.Embedding) -> None:
        super().__init__(wte.num_embeddings, wte.embedding_dim, _weight=wte.weight)
        self.weight = wte.weight  # the same parameter, which the output head shares

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings [rows, T, d] of ids [rows, T], whose rows are grouped by image."""
        vocab_size = self.num_embeddings
        tokens = super().forward(input_ids.clamp(max=vocab_size - 1))
        rows = torch.arange(len(input_ids), device=input_ids.device)
        images = rows * len(self.prefix) // len(input_ids)
        prefix = self.prefix[images[:, None], (input_ids - vocab_size).clamp(min=0)].to(tokens.dtype)
        return torch.where((input_ids >= vocab_size)[..., None], prefix, tokens)


class ClipCapModel(CaptionModel):
    """A frozen language model that reads the image as a prefix, `prefix` [images, prefix_length, d]."""

    method: ClassVar[Method] = "clipcap"
    weights_prefix: ClassVar[str] = ""
    begins: ClassVar[bool] = False
    """As in the paper, the caption directly follows the prefix: GPT-2 ignores what stands before its begin token, which
    also ends a text."""
    adapters: ImagePrefix

    def __init__(self, language_model: GPT2LMHeadModel, config: ClipCapConfig) -> None:
        super().__init__(language_model, ImagePrefix(config))
        self.config = config
        self.prefix_length = config.prefix_length
        self.embedding = PrefixedEmbedding(language_model.transformer.wte)
        language_model.transformer.wte = self.embedding

    @classmethod
    def create(cls, config: ModelConfig, language_model: GPT2LMHeadModel, visual: tuple[int, int]) -> Self:
        """A model as `config` describes it, with a fresh mapper, for visual embeddings of shape `visual` = (N, d_v).

        Raises:
            ConfigError: the tower has no projection, or visual dropout could remove the one embedding that is read.
        """
        widths = language_model.config.n_embd, visual[1]
        if isinstance(config, ClipCapCheckpoint):
            shape = {name: getattr(config, name) for name in _SHAPE if getattr(config, name) is not None}
            return cls(language_model, ClipCapConfig(*widths, **shape))
        assert isinstance(config, TrainConfig)
        projection = None if config.pooling in ("cls", "mean") else load_clip_projection(config.vision)
        pooling = config.pooling or _default_pooling(config.vision, projection)
        if pooling == "projected" and projection is None:
            raise ConfigError(f"--pooling projected: {config.vision} has no CLIP projection; choose cls or mean")
        if pooling != "mean" and config.visual_dropout and visual[0] > 1:
            raise ConfigError(
                f"--visual-dropout {config.visual_dropout} drops some of an image's embeddings and --pooling {pooling} "
                "reads only one: set --visual-dropout 0 or --pooling mean"
            )
        shape = {name: getattr(config, name) for name in (*_MAPPER, "normalize", "dropout")} | {"pooling": pooling}
        if projection is not None:
            shape |= {"projected_width": len(projection.weight), "layer_norm_eps": projection.epsilon}
        model = cls(language_model, ClipCapConfig(*widths, **shape))
        if projection is not None:
            model.load_projection(projection)
        return model

    def describe(self) -> dict[str, Any]:
        """The mapper's shape and what it reads."""
        unused = TRANSFORMER_FIELDS if self.config.mapper == "mlp" else ()
        return {name: getattr(self.config, name) for name in _SHAPE if name not in unused}

    def load_projection(self, projection: ClipProjection) -> None:
        """Put CLIP's projection before the mapper."""
        assert self.adapters.projection is not None
        self.adapters.projection.load_state_dict(projection.state_dict())

    def project(self, visual: Tensor) -> Visual:
        """The prefix, `prefix` [images, prefix_length, d]."""
        return {"prefix": self.adapters(visual)}

    @contextmanager
    def looking_at(self, visual: Visual) -> Iterator[None]:
        """Let the ids after the vocabulary's stand for the prefixes of these images within the block."""
        self.embedding.prefix = visual["prefix"]
        try:
            yield
        finally:
            del self.embedding.prefix


_MAPPER = ("mapper", "prefix_length", "clip_length", "mapper_layers", "mapper_heads")
_SHAPE = (*_MAPPER, "pooling", "projected_width", "layer_norm_eps", "normalize")


def _default_pooling(vision: str, projection: ClipProjection | None) -> Pooling:
    if vision_kind(vision) == "onnx":
        return "mean"  # an ONNX tower need not have a CLS position
    return "cls" if projection is None else "projected"
