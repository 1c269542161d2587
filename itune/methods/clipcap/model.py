"""ClipCap: Mokady et al., "ClipCap: CLIP Prefix for Image Captioning" (https://arxiv.org/abs/2111.09734).

A mapper turns one embedding of the image into `prefix_length` embeddings that stand before the caption of a frozen
GPT-2, in place of tokens:

    p_1 ... p_k = mapper(pool(V))            GPT-2 reads p_1 ... p_k c_1 ... c_l, the loss covers c_1 ... c_l

Modules have the names of the paper's code, so that its checkpoints are read as they are. The prefix stands in
`input_ids` as the ids that follow the vocabulary's: batching, masks and the search know nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from ...backbones import ClipProjection, load_clip_projection, vision_kind
from ...checkpoint import CheckpointConfig
from ...runtime.errors import ItuneError
from ...runtime.settings import Method, TextSettings
from ...training.config import ConfigError, TrainConfig
from ..base import CaptionModel, Visual
from .settings import ClipCapCheckpoint

Pooling = Literal["projected", "cls", "mean"]
_MLP_RATIO = 2


@dataclass(frozen=True)
class ClipCapConfig:
    """Shape of a mapper and of what it reads."""

    hidden_size: int
    """Width d of the language model."""

    visual_width: int
    """Width d_v of the visual embeddings."""

    mapper: Literal["transformer", "mlp"] = "transformer"

    prefix_length: int = 10
    """The paper's k: embeddings before the caption."""

    clip_length: int = 10
    """Transformer mapper: how many vectors of width d the image's embedding becomes."""

    mapper_layers: int = 8
    mapper_heads: int = 8

    pooling: Pooling = "cls"
    """Which embedding of the image is read: position 0, the mean of all, or position 0 projected as CLIP does it."""

    projected_width: int | None = None
    """With `pooling` projected: the width of that projection."""

    layer_norm_eps: float = 1e-5
    """Of the layer norm before the projection."""

    normalize: bool = False
    """Scale the embedding to length 1."""

    dropout: float = 0.0
    """Within the mapper's feed-forward blocks, while training."""

    def __post_init__(self) -> None:
        sizes = (self.hidden_size, self.visual_width, self.prefix_length, self.clip_length, self.mapper_layers)
        if min(*sizes, self.mapper_heads) < 1:
            raise ItuneError(f"mapper sizes must be positive: {self}")
        if self.mapper == "transformer" and self.hidden_size % self.mapper_heads:
            raise ItuneError(
                f"--mapper-heads {self.mapper_heads} does not divide the language model's width {self.hidden_size}: "
                "choose another"
            )

    @property
    def input_width(self) -> int:
        """Width of the embedding that the mapper reads."""
        return self.projected_width or self.visual_width


class Attention(nn.Module):
    """Self-attention of the mapper: no biases but the output's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[images, n, d] to the same."""
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
        self.fc1 = nn.Linear(width, _MLP_RATIO * width)
        self.fc2 = nn.Linear(_MLP_RATIO * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[images, n, d] to the same."""
        output: Tensor = self.dropout(self.fc2(self.dropout(self.fc1(x).relu())))
        return output


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = FeedForward(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[images, n, d] to the same."""
        x = x + self.attn(self.norm1(x))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class Transformer(nn.Module):
    """The layers, no norm after the last."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        shape = config.hidden_size, config.mapper_heads, config.dropout
        self.layers = nn.ModuleList(Layer(*shape) for _ in range(config.mapper_layers))

    def forward(self, x: Tensor) -> Tensor:
        """[images, n, d] to the same."""
        for layer in self.layers:
            x = layer(x)
        return x


class TransformerMapper(nn.Module):
    """A transformer over the image's vectors and learned constants; where the constants were, the prefix comes out."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        self.clip_length = config.clip_length
        self.transformer = Transformer(config)
        self.linear = nn.Linear(config.input_width, config.clip_length * config.hidden_size)
        self.prefix_const = nn.Parameter(torch.randn(config.prefix_length, config.hidden_size))

    def forward(self, embedding: Tensor) -> Tensor:
        """Prefix [images, prefix_length, d] of the images' embeddings [images, width]."""
        image = self.linear(embedding).unflatten(-1, (self.clip_length, -1))
        constants = self.prefix_const.expand(len(image), -1, -1).to(image.dtype)
        output: Tensor = self.transformer(torch.cat([image, constants], dim=1))[:, self.clip_length :]
        return output


class MlpMapper(nn.Module):
    """One hidden layer, half as wide as the whole prefix."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        self.prefix_length = config.prefix_length
        width = config.prefix_length * config.hidden_size
        self.model = nn.Sequential(
            nn.Linear(config.input_width, width // 2), nn.Tanh(), nn.Linear(width // 2, width)
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, embedding: Tensor) -> Tensor:
        """Prefix [images, prefix_length, d] of the images' embeddings [images, width]."""
        first, tanh, second = self.model
        output: Tensor = second(self.dropout(tanh(first(embedding)))).unflatten(-1, (self.prefix_length, -1))
        return output


class Projection(nn.Module):
    """CLIP's way to the space that it shares with text: a layer norm and a product, both frozen.

    Buffers: they travel in the checkpoint, since towers come without them, and are not trained.
    """

    norm_weight: Tensor  # [d_v]
    norm_bias: Tensor  # [d_v]
    weight: Tensor  # [projected width, d_v]

    def __init__(self, width: int, projected_width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("norm_weight", torch.ones(width))
        self.register_buffer("norm_bias", torch.zeros(width))
        self.register_buffer("weight", torch.zeros(projected_width, width))

    def forward(self, cls: Tensor) -> Tensor:
        """[images, d_v] to [images, projected width]."""
        normed = F.layer_norm(cls, cls.shape[-1:], self.norm_weight, self.norm_bias, self.epsilon)
        return F.linear(normed, self.weight)


class ImagePrefix(nn.Module):
    """Visual embeddings to the prefix: pooling, projection, normalisation, mapper."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        self.config = config
        self.projection = (
            None
            if config.projected_width is None
            else Projection(config.visual_width, config.projected_width, config.layer_norm_eps)
        )
        self.mapper = TransformerMapper(config) if config.mapper == "transformer" else MlpMapper(config)

    def pool(self, visual: Tensor) -> Tensor:
        """What the mapper reads [images, width], from visual embeddings [images, N, d_v]."""
        embedding = visual.mean(dim=1) if self.config.pooling == "mean" else visual[:, 0]
        if self.projection is not None:
            embedding = self.projection(embedding)
        return F.normalize(embedding, dim=-1) if self.config.normalize else embedding

    def forward(self, visual: Tensor) -> Tensor:
        """Prefix [images, prefix_length, d] of visual embeddings [images, N, d_v]."""
        prefix: Tensor = self.mapper(self.pool(visual))
        return prefix


class ClipCapModel(CaptionModel):
    """A frozen language model that reads the image as a prefix; it gives `prefix` [images, prefix_length, d]."""

    method: ClassVar[Method] = "clipcap"
    weights_prefix: ClassVar[str] = ""

    def __init__(self, language_model: GPT2LMHeadModel, config: ClipCapConfig) -> None:
        positions = language_model.config.n_positions
        if config.prefix_length >= positions:
            raise ItuneError(
                f"--prefix-length {config.prefix_length} leaves no room for a caption: the language model has "
                f"{positions} positions"
            )
        super().__init__(language_model, ImagePrefix(config))
        self.config = config
        self.prefix_length = config.prefix_length
        language_model.transformer.register_forward_pre_hook(self._embed, with_kwargs=True)

    @classmethod
    def create(cls, config: TrainConfig, language_model: GPT2LMHeadModel, tokens: int, width: int) -> Self:
        """See `CaptionModel.create`; CLIP's projection is read from the tower's folder.

        Raises:
            ConfigError: the tower has no projection, or embeddings are to be dropped of which one alone is read.
        """
        projection = None if config.pooling in ("cls", "mean") else load_clip_projection(config.vision)
        pooling = config.pooling or _default_pooling(config.vision, projection)
        if pooling == "projected" and projection is None:
            raise ConfigError(f"--pooling projected: {config.vision} has no CLIP projection; give cls or mean")
        if pooling != "mean" and config.visual_dropout and tokens > 1:
            raise ConfigError(
                f"--visual-dropout {config.visual_dropout} leaves out some of an image's embeddings, and --pooling "
                f"{pooling} reads one alone: give --visual-dropout 0, or --pooling mean"
            )
        model = cls(
            language_model,
            ClipCapConfig(
                hidden_size=language_model.config.n_embd,
                visual_width=width,
                mapper=config.mapper,
                prefix_length=config.prefix_length,
                clip_length=config.clip_length,
                mapper_layers=config.mapper_layers,
                mapper_heads=config.mapper_heads,
                pooling=pooling,
                projected_width=None if projection is None else len(projection.weight),
                layer_norm_eps=1e-5 if projection is None else projection.epsilon,
                normalize=config.normalize,
                dropout=config.dropout,
            ),
        )
        if projection is not None:
            model.load_projection(projection)
        return model

    @classmethod
    def from_checkpoint(cls, config: CheckpointConfig, language_model: GPT2LMHeadModel) -> Self:
        """See `CaptionModel.from_checkpoint`."""
        assert isinstance(config, ClipCapCheckpoint)
        shape = {name: getattr(config, name) for name in _SHAPE if getattr(config, name) is not None}
        return cls(
            language_model,
            ClipCapConfig(
                hidden_size=language_model.config.n_embd,
                visual_width=config.vision.width,
                dropout=config.dropout,
                **shape,
            ),
        )

    @classmethod
    def text(cls, config: TrainConfig) -> TextSettings:
        """See `CaptionModel.text`; as in the paper, the caption follows the prefix at once.

        GPT-2 has learned that what comes before its begin token, the end of a text, does not matter after it.
        """
        return super().text(config).model_copy(update={"begin": None})

    def describe(self) -> dict[str, Any]:
        """See `CaptionModel.describe`."""
        left_out = ("clip_length", "mapper_layers", "mapper_heads") if self.config.mapper == "mlp" else ()
        return {name: getattr(self.config, name) for name in _SHAPE if name not in left_out}

    @property
    def image_prefix(self) -> ImagePrefix:
        """The trainable part."""
        assert isinstance(self.adapters, ImagePrefix)
        return self.adapters

    def load_projection(self, projection: ClipProjection) -> None:
        """Put CLIP's projection before the mapper."""
        assert self.image_prefix.projection is not None
        self.image_prefix.projection.load_state_dict(
            {"norm_weight": projection.norm_weight, "norm_bias": projection.norm_bias, "weight": projection.weight}
        )

    def project(self, visual: Tensor) -> Visual:
        """The prefix, `prefix` [images, prefix_length, d]."""
        return {"prefix": self.image_prefix(visual)}

    def _embed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the language model embeddings in place of ids, those of the image where a prefix id stands."""
        input_ids: Tensor = kwargs.pop("input_ids", None) if not args else args[0]
        prefix = self.seen()["prefix"]
        vocab_size = self.prefix_ids.start
        wte: Any = module.wte
        tokens = wte(input_ids.clamp(max=vocab_size - 1))
        rows = torch.arange(len(input_ids), device=input_ids.device) * len(prefix) // len(input_ids)  # their images
        image = prefix[rows[:, None], (input_ids - vocab_size).clamp(min=0)].to(tokens.dtype)
        kwargs["inputs_embeds"] = torch.where((input_ids >= vocab_size)[..., None], image, tokens)
        return args[1:] and (None, *args[1:]), kwargs


_SHAPE = (
    "mapper", "prefix_length", "clip_length", "mapper_layers", "mapper_heads",
    "pooling", "projected_width", "layer_norm_eps", "normalize",
)  # fmt: skip


def _default_pooling(vision: str, projection: ClipProjection | None) -> Pooling:
    if vision_kind(vision) == "onnx":
        return "mean"  # it need not have a CLS position
    return "cls" if projection is None else "projected"
