"""Names of graph inputs, outputs and nodes that the exporter writes and the runtime reads."""

from __future__ import annotations

VISUAL = "visual."
"""Prefix of the tensors from the vision graph to the decoder: `visual.{layer}.keys`, `.values`, or `visual.prefix`."""
EMBEDDING = "visual.embedding"
"""Output of the vision graph that a datastore is searched with: float32 [images, D], of length 1."""
TOKENS, POSITIONS, MASK, PARENTS, K = STEP = ("tokens", "positions", "mask", "parents", "k")
"""Inputs of the decoder that every step sets, as in `Engine.step`."""
PAST, PRESENT = "past_key_values.", "present."
"""Prefixes of the decoder's cache as input and as output: `past_key_values.{layer}.key`, `present.{layer}.value`."""
HEAD = "head/"
"""Prefix of the names of the language-model head's nodes."""
RESIDUAL = "residual"
"""Scope of the additions to the residual stream, in the decoder and in a CLIP tower."""


def keys(layer: int) -> str:
    """The visual keys of an adapted layer [images, heads, width, N]."""
    return f"{VISUAL}{layer}.keys"


def values(layer: int) -> str:
    """The visual values of an adapted layer [images, heads, N, width]."""
    return f"{VISUAL}{layer}.values"


def past(layer: int, part: str) -> str:
    """Input of the decoder: a layer's cached keys or values (`part` is "key" or "value")."""
    return f"{PAST}{layer}.{part}"


def present(layer: int, part: str) -> str:
    """Output of the decoder: a layer's cached keys or values after the step."""
    return f"{PRESENT}{layer}.{part}"


def visual_attention(layer: int, method: str) -> str:
    """Output of the softmax over the image in a decoder layer [images, heads, rows / images * T, N].

    I-Tuning with one head has no axis for the heads.
    """
    scope = {"i-tuning": "mlp/adapter", "smallcap": "cross_attn"}[method]
    return f"h.{layer}/{scope}/Softmax"
