"""Checkpoints that are damaged, or whose frozen models have changed since the training, are refused by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from itune.backbones import BackboneError, load_vision_tower
from itune.checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError
from itune.loading import LoadedCheckpoint
from itune.runtime.errors import ItuneError
from itune.runtime.text import encode_text
from tests.conftest import make_checkpoint, make_clip, make_language_model, refused


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    language_model, clip = make_language_model(tmp_path / "gpt2"), make_clip(tmp_path / "clip")
    return make_checkpoint(tmp_path / "checkpoint", language_model, clip)


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("folder", "field", "value"),
    [
        ("gpt2", "n_head", 2),
        ("gpt2", "layer_norm_epsilon", 0.5),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("clip", "num_attention_heads", 2),
        ("clip", "hidden_act", "gelu"),
        ("clip", "layer_norm_eps", 0.5),
    ],
)
def test_a_changed_config_of_a_frozen_model_is_noticed(
    folder: str, field: str, value: object, checkpoint: Path
) -> None:
    LoadedCheckpoint.load(checkpoint)
    change(checkpoint.parent / folder / "config.json", **{field: value})
    with refused(CheckpointError, checkpoint / CONFIG_FILE, field, value):
        LoadedCheckpoint.load(checkpoint)
    # Checkpoints of earlier versions record the weights alone.
    config = json.loads((checkpoint / CONFIG_FILE).read_text())
    for part in "language_model", "vision":
        del config[part]["settings"]
    (checkpoint / CONFIG_FILE).write_text(json.dumps(config))
    LoadedCheckpoint.load(checkpoint)


def test_another_vocabulary_is_noticed_but_not_a_tokenizers_state(checkpoint: Path) -> None:
    file = checkpoint.parent / "gpt2" / "tokenizer.json"
    text = "A dog runs through the grass ."
    tokenizer = Tokenizer.from_file(str(file))
    expected = encode_text(tokenizer, text)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(file))
    assert encode_text(LoadedCheckpoint.load(checkpoint).language.tokenizer, text) == expected
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with refused(CheckpointError, checkpoint / CONFIG_FILE, "vocabulary"):
        LoadedCheckpoint.load(checkpoint)


@pytest.mark.parametrize(
    ("damage", "value"),
    [
        (lambda t: t.to(torch.int64), "int64"),
        (lambda t: t.bool(), "bool"),
        (lambda t: t * torch.nan, "finite"),
        (lambda t: t + torch.inf, "finite"),
        (lambda t: t[:1], "[1"),
    ],
    ids=["int64", "bool", "nan", "inf", "shape"],
)
def test_adapters_are_finite_floats_of_the_right_shape(
    damage: Callable[[torch.Tensor], torch.Tensor], value: str, checkpoint: Path
) -> None:
    file = checkpoint / WEIGHTS_FILE
    tensors = load_file(file)
    save_file(tensors | {"layers.1.key.weight": damage(tensors["layers.1.key.weight"])}, file)
    with refused(CheckpointError, file, "layers.1.key.weight", value):
        LoadedCheckpoint.load(checkpoint)


def test_adapters_in_half_precision_are_computed_in_single(checkpoint: Path) -> None:
    file = checkpoint / WEIGHTS_FILE
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    state = LoadedCheckpoint.load(checkpoint).model.adapter_state()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}


@pytest.mark.parametrize(
    "fields",
    [{"heads": 2**31 - 1}, {"bottleneck": 2**31 - 1}, {"bottleneck": 2**60}, {"heads": 0}],
    ids=str,
)
def test_absurd_sizes_cost_no_memory(fields: dict[str, Any], checkpoint: Path) -> None:
    change(checkpoint / CONFIG_FILE, **fields)
    with refused(CheckpointError, checkpoint, *fields.values()):
        LoadedCheckpoint.load(checkpoint)


def test_deeply_nested_json_names_its_file(checkpoint: Path) -> None:
    folder = checkpoint.parent
    (folder / "clip" / "processor_config.json").write_text("{}")
    for name in "processor_config.json", "preprocessor_config.json", "config.json":
        file = folder / "clip" / name
        before = file.read_text()
        file.write_text("[" * 100_000)
        with refused(BackboneError, file):
            load_vision_tower(str(folder / "clip"))
        file.write_text(before)
    for file in folder / "gpt2" / "config.json", folder / "gpt2" / "tokenizer.json", checkpoint / CONFIG_FILE:
        before = file.read_text()
        file.write_text("[" * 100_000)
        with refused(ItuneError, Path(file.parent.name, file.name)):
            LoadedCheckpoint.load(checkpoint)
        file.write_text(before)
