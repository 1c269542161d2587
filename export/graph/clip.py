"""CLIP's vision transformer as ONNX operators, built from its weights.

Exact algebra makes it shorter than a trace of the PyTorch model: the patch convolution is one matrix product whose
weights include the pixels' standard deviation; one product gives queries, keys and values, with 1/sqrt(d) in the
queries' weights. Layers that serve the pooled output only are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from ...backbones import ClipTower
from ...runtime.settings import ImageSettings
from .builder import Array, Graph, Weights
from .ops import Config, activation, add_residual, arrays, attention, join_heads, layer_norm, linear, split_heads

PREFIX = "clip."
_PATCHES = "embeddings.patch_embedding.weight"
_TRANSPOSED = ("out_proj.weight", "fc1.weight", "fc2.weight")
_LEFT_OUT = (".k_proj.", ".v_proj.", "post_layernorm.")


def append_clip(graph: Graph, pixels: str, tower: ClipTower) -> str:
    """Append the tower; returns its `last_hidden_state` [images, N, d_v] for pixels uint8 [images, H, W, 3]."""
    config = tower.model.config
    state = {n.removeprefix("vision_model."): array for n, array in arrays(tower.model.state_dict()).items()}
    for name, array in fold_clip(state, config, tower.image).items():
        graph.initializer(PREFIX + name, array)
    with graph.scope("clip"):
        x = _embeddings(graph, pixels, config, tower.image)
        x = layer_norm(graph, x, f"{PREFIX}pre_layrnorm", config.layer_norm_eps)
        for layer in range(config.num_hidden_layers):
            with graph.scope(f"layers.{layer}"):
                x = _encoder_layer(graph, x, f"{PREFIX}encoder.layers.{layer}", config)
    return x


def fold_clip(state: Weights, config: Config, image: ImageSettings) -> dict[str, Array]:
    """The graph's weights, matrices as [in, out], from the state of a `CLIPVisionModel`."""
    weights = {}
    for name, array in state.items():
        if name == _PATCHES:  # [out, channel, row, column] -> [(row, column, channel), out]
            weights[name] = (array / _std(image)).transpose(2, 3, 1, 0).reshape(-1, len(array))
        elif ".q_proj." in name:
            keys, values = (state[name.replace(".q_proj.", f".{part}_proj.")] for part in "kv")
            joined = np.concatenate([array * _query_scale(config), keys, values])
            weights[name.replace(".q_proj.", ".qkv.")] = joined.T
        elif not any(part in name for part in _LEFT_OUT):
            weights[name] = array.T if name.endswith(_TRANSPOSED) else array
    return weights


def unfold_clip(weights: Weights, config: Config, image: ImageSettings) -> dict[str, Array]:
    """The inverse of `fold_clip`, with an identity for the layer norm of the pooled output."""
    state = {
        "post_layernorm.weight": np.ones(config.hidden_size, np.float32),
        "post_layernorm.bias": np.zeros(config.hidden_size, np.float32),
    }
    for name, array in weights.items():
        if name == _PATCHES:
            side = config.patch_size
            state[name] = array.reshape(side, side, 3, -1).transpose(3, 2, 0, 1) * _std(image)
        elif ".qkv." in name:
            query, key, value = np.split(array.T, 3)
            for part, split in (("q", query / _query_scale(config)), ("k", key), ("v", value)):
                state[name.replace(".qkv.", f".{part}_proj.")] = split
        else:
            state[name] = array.T if name.endswith(_TRANSPOSED) else array
    return state


def _embeddings(graph: Graph, pixels: str, config: Config, image: ImageSettings) -> str:
    side = config.patch_size
    grid = config.image_size // side
    if config.image_size % side:  # the convolution ignores the remainder
        ends = (graph.constant([v, v]) for v in (0, grid * side))
        pixels = graph.op("Slice", pixels, *ends, graph.constant([1, 2]))
    with graph.scope("patches"):
        # Patches are gathered as bytes: a quarter of the memory traffic.
        x = graph.op("Reshape", pixels, graph.constant([0, grid, side, grid, side * 3]))
        x = graph.op("Transpose", x, perm=[0, 1, 3, 2, 4])
        x = graph.op("Reshape", x, graph.constant([0, grid * grid, side * side * 3]))
        x = graph.op("Cast", x, to=onnx.TensorProto.FLOAT)
        # The mean stays out of the weights: symmetric quantisation suits pixels around zero, and an int8 graph,
        # which rounds the weights, then needs no bias that was computed from them.
        mean = np.tile(255 * np.array(image.mean), side * side).astype(np.float32)
        x = graph.op("Sub", x, graph.initializer(f"{PREFIX}pixel_mean", mean))
        x = graph.op("MatMul", x, PREFIX + _PATCHES)
    with graph.scope("embeddings"):
        images = graph.op("Shape", pixels, start=0, end=1)
        shape = graph.op("Concat", images, graph.constant([1, config.hidden_size]), axis=0)
        cls = graph.op("Expand", f"{PREFIX}embeddings.class_embedding", shape)
        x = graph.op("Concat", cls, x, axis=1)
        return graph.op("Add", x, f"{PREFIX}embeddings.position_embedding.weight")


def _encoder_layer(graph: Graph, x: str, name: str, config: Config) -> str:
    with graph.scope("self_attn"):
        hidden = layer_norm(graph, x, f"{name}.layer_norm1", config.layer_norm_eps)
        qkv = linear(graph, hidden, f"{name}.self_attn.qkv")
        hidden = attention(graph, *split_heads(graph, qkv, config.num_attention_heads, config.hidden_size))
        hidden = linear(graph, join_heads(graph, hidden, config.hidden_size), f"{name}.self_attn.out_proj")
        x = add_residual(graph, hidden, x)
    with graph.scope("mlp"):
        hidden = layer_norm(graph, x, f"{name}.layer_norm2", config.layer_norm_eps)
        hidden = activation(graph, linear(graph, hidden, f"{name}.mlp.fc1"), config.hidden_act)
        return add_residual(graph, linear(graph, hidden, f"{name}.mlp.fc2"), x)


def _query_scale(config: Config) -> Any:
    return np.float32((config.hidden_size // config.num_attention_heads) ** -0.5)


def _std(image: ImageSettings) -> Array:
    return (255 * np.array(image.std)).astype(np.float32)[None, :, None, None]
