"""The frozen GPT-2 and its tokenizer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import GPT2LMHeadModel

from ..files import hash_files
from ..runtime.errors import reading
from .sources import BackboneError, fetch, load_pretrained, read_config, require_weights, weight_files

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters else "past_key_values"
"""The name of the key/value cache in GPT-2's forward pass; newer releases of transformers have renamed it."""


@dataclass(frozen=True)
class LanguageModel:
    """A frozen GPT-2 with its tokenizer; `sha256` is the hash of its weight files."""

    model: GPT2LMHeadModel
    tokenizer: Tokenizer
    folder: Path
    sha256: str


def load_language_model(source: str, revision: str | None = None) -> LanguageModel:
    """Load a GPT-2-family checkpoint (hub id or folder) in float32, with its tokenizer."""
    folder = fetch(source, revision)
    read_config(folder, "gpt2")
    weights = weight_files(folder)
    model, missing = load_pretrained(GPT2LMHeadModel, folder, "a GPT-2 language model")
    require_weights(folder, missing)
    if model.config.activation_function == "gelu_new":
        # The same function in one kernel: it saves a fifth of a training step, and of its activations.
        blocks: Any = model.transformer.h
        for block in blocks:
            block.mlp.act = nn.GELU(approximate="tanh")
    return LanguageModel(model, load_tokenizer(folder), folder, hash_files(weights))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's `tokenizer.json`, or the same built from GPT-2's `vocab.json` and `merges.txt`."""
    path = folder / "tokenizer.json"
    if path.is_file():
        with reading(path, BackboneError, "copy the model again"):
            return Tokenizer.from_file(str(path))
    if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise BackboneError(f"{folder} has no tokenizer.json (nor vocab.json and merges.txt): put one there")
    from transformers import GPT2Tokenizer

    with reading(f"{folder}: vocab.json and merges.txt", BackboneError, "copy the model again"):
        tokenizer: Tokenizer = GPT2Tokenizer.from_pretrained(folder).backend_tokenizer
    return tokenizer
