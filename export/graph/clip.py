"""CLIP's vision transformer as ONNX operators, straight from its weights.

Exact algebra makes it shorter than a trace of the PyTorch model: the patch convolution is one matrix product
with the pixels' standard deviation in its weights; queries, keys and values come from one product, with
1/sqrt(d) in the queries' weights. What only serves the pooled output is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...backbones import ClipTower
from ...runtime.settings import ImageSettings
from .builder import Array, Graph
from .ops import append_activation

PREFIX = "clip."
Config = Any  # a CLIPVisionConfig, whose sizes transformers also types as pairs and None


def append_clip(graph: Graph, pixels: str, tower: ClipTower) -> str:
    """Append the tower; returns its `last_hidden_state` [images, N, d_v] of pixels uint8 [images, H, W, 3]."""
    config = tower.model.config
    tensors = tower.model.state_dict().items()
    state = {name.removeprefix("vision_model."): tensor.detach().numpy() for name, tensor in tensors}
    for name, array in fold_clip(state, config, tower.image).items():
        graph.initializer(PREFIX + name, array)
    with graph.scope("clip"):
        x = _embeddings(graph, pixels, config, tower.image)
        x = _layer_norm(graph, x, "pre_layrnorm", config)
        for layer in range(config.num_hidden_layers):
            with graph.scope(f"layers.{layer}"):
                x = _encoder_layer(graph, x, f"encoder.layers.{layer}.", config)
    return x


def fold_clip(state: Mapping[str, Array], config: Config, image: ImageSettings) -> dict[str, Array]:
    """The graph's weights, products in [in, out] layout, of a `CLIPVisionModel`'s state."""
    weights = {}
    for name, array in state.items():
        parent, _, parameter = name.rpartition(".")
        module = parent.rpartition(".")[2]
        if name == "embeddings.patch_embedding.weight":
            # [out, channel, row, column] -> [(row, column, channel), out]
            per_pixel = array / _std(image)[None, :, None, None]
            weights[name] = per_pixel.transpose(2, 3, 1, 0).reshape(-1, len(array))
        elif module == "q_proj":
            qkv = [state[f"{parent[:-6]}{part}_proj.{parameter}"] for part in "qkv"]
            qkv[0] = qkv[0] * _query_scale(config)
            weights[f"{parent[:-6]}qkv.{parameter}"] = np.concatenate(qkv).T
        elif parameter == "weight" and module in ("out_proj", "fc1", "fc2"):
            weights[name] = array.T
        elif module not in ("k_proj", "v_proj", "post_layernorm"):
            weights[name] = array
    return weights


def unfold_clip(weights: Mapping[str, Array], config: Config, image: ImageSettings) -> dict[str, Array]:
    """The inverse of `fold_clip`, with an identity for the layer norm of the pooled output."""
    state = {
        "post_layernorm.weight": np.ones(config.hidden_size, np.float32),
        "post_layernorm.bias": np.zeros(config.hidden_size, np.float32),
    }
    for name, array in weights.items():
        parent, _, parameter = name.rpartition(".")
        module = parent.rpartition(".")[2]
        if name == "embeddings.patch_embedding.weight":
            side = config.patch_size
            per_pixel = array.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
            state[name] = per_pixel * _std(image)[None, :, None, None]
        elif module == "qkv":
            q, k, v = np.split(array.T, 3)
            for part, value in (("q", q / _query_scale(config)), ("k", k), ("v", v)):
                state[f"{parent[:-3]}{part}_proj.{parameter}"] = value
        elif parameter == "weight" and module in ("out_proj", "fc1", "fc2"):
            state[name] = array.T
        else:
            state[name] = array
    return state


def _embeddings(graph: Graph, pixels: str, config: Config, image: ImageSettings) -> str:
    side = config.patch_size
    grid = config.image_size // side
    if config.image_size % side:  # a convolution ignores the rest
        rest = (graph.constant([v, v]) for v in (0, grid * side))
        pixels = graph.op("Slice", pixels, *rest, graph.constant([1, 2]))
    with graph.scope("patches"):
        # Patches are gathered as bytes, a quarter of the memory traffic.
        x = graph.op("Reshape", pixels, graph.constant([0, grid, side, grid, side * 3]))
        x = graph.op("Transpose", x, perm=[0, 1, 3, 2, 4])
        x = graph.op("Reshape", x, graph.constant([0, grid * grid, side * side * 3]))
        x = graph.op("Cast", x, to=1)
        # Around zero, pixels lose nothing to an activation quantised symmetrically; and the weights, which
        # an int8 graph rounds, need no bias that was computed from them.
        mean = np.tile(255 * np.array(image.mean), side * side).astype(np.float32)
        x = graph.op("Sub", x, graph.initializer(PREFIX + "pixel_mean", mean))
        x = graph.op("MatMul", x, PREFIX + "embeddings.patch_embedding.weight")
    with graph.scope("embeddings"):
        images = graph.op("Shape", pixels, start=0, end=1)
        shape = graph.op("Concat", images, graph.constant([1, config.hidden_size]), axis=0)
        start = graph.op("Expand", PREFIX + "embeddings.class_embedding", shape)
        x = graph.op("Concat", start, x, axis=1)
        return graph.op("Add", x, PREFIX + "embeddings.position_embedding.weight")


def _encoder_layer(graph: Graph, x: str, name: str, config: Config) -> str:
    heads = config.num_attention_heads
    with graph.scope("self_attn"):
        hidden = _layer_norm(graph, x, name + "layer_norm1", config)
        hidden = _linear(graph, hidden, name + "self_attn.qkv")
        q, k, v = graph.ops("Split", hidden, names=[None] * 3, axis=-1, num_outputs=3)
        split = graph.constant([0, 0, heads, config.hidden_size // heads])
        q, k, v = (
            graph.op("Transpose", graph.op("Reshape", part, split), perm=perm)
            for part, perm in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3]))
        )
        weights = graph.op("Softmax", graph.op("MatMul", q, k), axis=-1)
        hidden = graph.op("Transpose", graph.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        hidden = graph.op("Reshape", hidden, graph.constant([0, 0, config.hidden_size]))
        hidden = _linear(graph, hidden, name + "self_attn.out_proj")
        x = graph.op("Add", hidden, x)
    with graph.scope("mlp"):
        hidden = _layer_norm(graph, x, name + "layer_norm2", config)
        hidden = _linear(graph, hidden, name + "mlp.fc1")
        hidden = append_activation(graph, hidden, config.hidden_act)
        hidden = _linear(graph, hidden, name + "mlp.fc2")
        return graph.op("Add", hidden, x)


def _linear(graph: Graph, x: str, name: str) -> str:
    product = graph.op("MatMul", x, f"{PREFIX}{name}.weight")
    return graph.op("Add", product, f"{PREFIX}{name}.bias")


def _layer_norm(graph: Graph, x: str, name: str, config: Config) -> str:
    scale, bias = f"{PREFIX}{name}.weight", f"{PREFIX}{name}.bias"
    return graph.op("LayerNormalization", x, scale, bias, epsilon=config.layer_norm_eps)


def _query_scale(config: Config) -> Any:
    return np.float32((config.hidden_size // config.num_attention_heads) ** -0.5)


def _std(image: ImageSettings) -> Array:
    return (255 * np.array(image.std)).astype(np.float32)
