"""Language models and vision towers that are damaged, incomplete or something else are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from itune.backbones import (
    BackboneError,
    load_clip_projection,
    load_language_model,
    load_vision_tower,
)
from itune.retrieval.encoder import TextEncoder
from itune.runtime.text import encode_text
from tests.conftest import refused

WEIGHTS = "model.safetensors"
CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda _content: b"",
    "text": lambda _content: b"<html>not found</html>",
    "json": lambda _content: b"{}",
}


def damaged(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    file = folder / name
    file.write_bytes(change(file.read_bytes()))


def without(folder: Path, part: str) -> None:
    """Leave out the weights with `part` in their names."""
    kept = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if part not in name}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def language_model(language_model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(language_model_folder, tmp_path / "gpt2")


@pytest.fixture
def clip(full_clip_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(full_clip_folder, tmp_path / "clip")


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_weights_name_their_folder(change: str, language_model: Path, clip: Path) -> None:
    for folder in (language_model, clip):
        damaged(folder, WEIGHTS, CHANGES[change])
    with refused(BackboneError, language_model):
        load_language_model(str(language_model))
    with refused(BackboneError, clip):
        load_vision_tower(str(clip))
    with refused(BackboneError, clip):
        TextEncoder(str(clip))


def test_missing_weights_are_not_made_up(language_model: Path, clip: Path) -> None:
    without(language_model, "h.2.mlp")
    with refused(BackboneError, language_model, "transformer.h.2.mlp.c_fc.bias"):
        load_language_model(str(language_model))
    without(clip, "vision_model.encoder.layers.1.")
    with refused(BackboneError, clip, "encoder.layers.1.layer_norm1.bias"):
        load_vision_tower(str(clip))


def test_a_tower_needs_no_post_layernorm(clip: Path) -> None:
    without(clip, "post_layernorm")
    assert load_vision_tower(str(clip)).width > 0
    assert load_clip_projection(str(clip)) is None


def test_a_language_model_in_the_hubs_layout(language_model: Path) -> None:
    """The published GPT-2: names without `transformer.`, causal masks among the weights, no tied head."""
    expected = load_language_model(str(language_model)).model.state_dict()
    weights = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(language_model / WEIGHTS).items()
    }
    weights["h.0.attn.bias"] = weights["wpe.weight"].new_ones(1, 1, 8, 8)
    save_file(weights, language_model / WEIGHTS, metadata={"format": "pt"})
    found = load_language_model(str(language_model)).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_tokenizers(change: str, language_model: Path, clip: Path) -> None:
    damaged(language_model, "tokenizer.json", CHANGES[change])
    with refused(BackboneError, language_model / "tokenizer.json"):
        load_language_model(str(language_model))
    for file in clip.glob("tokenizer*.json"):
        file.unlink()
    damaged(clip, "vocab.json", CHANGES[change])
    with refused(BackboneError, clip):
        TextEncoder(str(clip))


def test_text_features_do_not_depend_on_a_tokenizers_state(clip: Path) -> None:
    captions = ["a dog", "<|endoftext|>", "a dog and a cat on a sofa " * 4]
    alone = [TextEncoder(str(clip)).embed([caption]) for caption in captions]
    tokenizer = TextEncoder(str(clip))._tokenizer
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer(captions, truncation=True, max_length=3, padding="max_length")
    tokenizer.save_pretrained(clip)
    content = json.loads((clip / "tokenizer.json").read_text())
    assert content["truncation"]
    assert content["padding"]
    content["model"]["dropout"] = 0.9
    (clip / "tokenizer.json").write_text(json.dumps(content))
    found = TextEncoder(str(clip)).embed(captions)
    np.testing.assert_allclose(found, np.concatenate(alone), atol=1e-6)
    assert not np.allclose(found[1], TextEncoder(str(clip)).embed([""])[0], atol=1e-3)


def test_an_older_tokenizer_is_stateless_too(language_model: Path) -> None:
    text = "<|endoftext|> A dog runs through the grass ."
    expected = encode_text(load_language_model(str(language_model)).tokenizer, text)
    model = json.loads((language_model / "tokenizer.json").read_text())["model"]
    (language_model / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (language_model / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (language_model / "tokenizer.json").unlink()
    state = {"add_bos_token": True, "add_eos_token": True, "model_max_length": 3, "truncation_side": "left"}
    (language_model / "tokenizer_config.json").write_text(json.dumps(state))
    assert encode_text(load_language_model(str(language_model)).tokenizer, text) == expected


def test_no_source_is_not_the_current_folder(language_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(language_model)
    with refused(BackboneError, "''"):
        load_language_model("")


@pytest.mark.parametrize("content", [[], {}, {"size": 1, "crop_size": []}, {"size": {"height": "x", "width": 2}}])
def test_preprocessors_that_are_none(content: object, clip: Path) -> None:
    (clip / "preprocessor_config.json").write_text(json.dumps(content))
    with refused(BackboneError, clip / "preprocessor_config.json"):
        load_vision_tower(str(clip))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"do_normalize": False}, "do_normalize"),
        ({"do_resize": False}, "do_resize"),
        ({"do_center_crop": False}, "do_center_crop"),
        ({"resample": 4}, "resample 4"),
        ({"size": {"max_height": 32, "max_width": 32}}, "size"),
        ({"do_rescale": False}, "do_rescale"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "size.longest_edge"),
        ({"image_std": [0, 1, 1]}, "std.0"),
        ({"image_mean": [float("nan"), 0, 0]}, "mean.0"),
    ],
)
def test_preprocessing_that_we_do_not_reproduce(change: dict[str, object], field: str, clip: Path) -> None:
    file = clip / "preprocessor_config.json"
    load_vision_tower(str(clip))
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with refused(BackboneError, file, field):
        load_vision_tower(str(clip))


@pytest.mark.parametrize(
    ("load", "part", "field", "wrong"),
    [
        (load_language_model, None, "n_embd", 64),
        (load_language_model, None, "n_positions", 8),
        (load_language_model, None, "vocab_size", 10**9),
        (load_language_model, None, "n_layer", 2),
        (load_language_model, None, "n_layer", 4),
        (load_language_model, None, "n_layer", 10**30),
        (load_language_model, None, "n_inner", 4),
        (load_vision_tower, "vision_config", "image_size", 64),
        (load_vision_tower, "vision_config", "patch_size", 16),
        (load_vision_tower, "vision_config", "hidden_size", 48),
        (load_vision_tower, "vision_config", "num_hidden_layers", 1),
        (load_vision_tower, "vision_config", "num_hidden_layers", 3),
        (load_vision_tower, "vision_config", "intermediate_size", 4),
        (TextEncoder, "text_config", "vocab_size", 5),
        (TextEncoder, "text_config", "num_hidden_layers", 1),
        (TextEncoder, "text_config", "max_position_embeddings", 5),
        (TextEncoder, None, "projection_dim", 10),
    ],
)
def test_a_config_of_other_weights_is_refused_by_field(
    load: Callable[[str], object], part: str | None, field: str, wrong: int, language_model: Path, clip: Path
) -> None:
    file = (language_model if load is load_language_model else clip) / "config.json"
    load(str(file.parent))
    config = json.loads(file.read_text())
    (config[part] if part else config)[field] = wrong
    file.write_text(json.dumps(config))
    with refused(BackboneError, file, field, wrong):
        load(str(file.parent))


def test_weights_that_would_be_dropped_are_named(language_model: Path, clip: Path) -> None:
    for folder, load, name in (
        (language_model, load_language_model, "h.1.crossattention.q_attn.weight"),
        (clip, load_vision_tower, "encoder.layers.0.mlp.lora_A.weight"),
    ):
        prefix = "transformer." if folder == language_model else "vision_model."
        save_file(load_file(folder / WEIGHTS) | {prefix + name: torch.zeros(2)}, folder / WEIGHTS, {"format": "pt"})
        with refused(BackboneError, folder, name):
            load(str(folder))


def saved_by_torch(folder: Path, *, old_format: bool) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old_format)


def saved_in_shards(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in files if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize(
    "save",
    [partial(saved_by_torch, old_format=False), partial(saved_by_torch, old_format=True), saved_in_shards],
    ids=["zip", "old", "shards"],
)
def test_weights_in_the_formats_of_torch(save: Callable[[Path], None], language_model: Path, clip: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)

    def numbers() -> list[torch.Tensor]:
        projection = load_clip_projection(str(clip))
        assert projection is not None
        return [
            load_language_model(str(language_model)).model.transformer.wte.weight,
            load_vision_tower(str(clip)).embed(pixels),
            projection.weight,
            torch.from_numpy(TextEncoder(str(clip)).embed(["a dog"])),
        ]

    expected = numbers()
    save(language_model)
    save(clip)
    for ours, theirs in zip(numbers(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_files_that_transformers_reads_are_the_identity(language_model: Path) -> None:
    other = language_model.parent / "other"
    shutil.copytree(language_model, other)
    expected = load_language_model(str(language_model))
    saved_by_torch(language_model, old_format=False)
    save_file({"stray": torch.zeros(1)}, language_model / "adapter_model.safetensors")
    before = load_language_model(str(language_model))
    saved_in_shards(other)
    shards = load_language_model(str(other))
    for found in before, shards:
        assert found.model.transformer.wte.weight.equal(expected.model.transformer.wte.weight)
    for folder, name, old in (
        (language_model, "pytorch_model.bin", before),
        (other, "pytorch_model-00002-of-00002.bin", shards),
    ):
        tensors = torch.load(folder / name)
        (folder / name).unlink()  # it is mapped
        torch.save({key: tensor + 1 for key, tensor in tensors.items()}, folder / name)
        assert load_language_model(str(folder)).sha256 != old.sha256
    named = language_model / "named.safetensors"
    save_file(torch.load(language_model / "pytorch_model.bin"), named, {"format": "pt"})
    config = json.loads((language_model / "config.json").read_text()) | {"transformers_weights": named.name}
    (language_model / "config.json").write_text(json.dumps(config))
    (language_model / "pytorch_model.bin").unlink()
    assert load_language_model(str(language_model)).model.transformer.wte.weight.equal(
        before.model.transformer.wte.weight + 1
    )


def test_an_adapter_beside_the_weights_is_refused(language_model: Path, clip: Path) -> None:
    for folder, load in ((language_model, load_language_model), (clip, load_vision_tower), (clip, TextEncoder)):
        (folder / "adapter_config.json").write_text("{}")
        with refused(BackboneError, folder / "adapter_config.json"):
            load(str(folder))


def test_code_in_weights_is_never_run(clip: Path, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "planted"),)

    (clip / WEIGHTS).unlink()
    torch.save({"visual_projection.weight": Planted()}, clip / "pytorch_model.bin")
    for load in load_vision_tower, load_clip_projection, TextEncoder:
        with refused(BackboneError, clip):
            load(str(clip))
    assert not (tmp_path / "planted").exists()


def make_onnx_tower(folder: Path, pixels: list[int | str], embeddings: list[int | str], *more: str) -> Path:
    """A graph that returns its pixels, reshaped; `more` are further inputs."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, pixels) for name in ("pixels", *more)]
    output = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, embeddings)
    shape = helper.make_tensor("shape", TensorProto.INT64, [len(embeddings)], [0, *embeddings[1:]])
    nodes = [helper.make_node("Sum", [each.name for each in inputs], ["sum"])]
    nodes += [helper.make_node("Reshape", ["sum", "shape"], ["embeddings"])]
    graph = helper.make_graph(nodes, "tower", inputs, [output], [shape])
    opsets = [helper.make_opsetid("", 17)]
    folder.mkdir()
    (folder / "model.onnx").write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    )
    size = {"height": 4, "width": 4}
    settings = {"size": size, "do_center_crop": False, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_onnx_towers_take_pixels_and_give_embeddings(tmp_path: Path) -> None:
    folder = make_onnx_tower(tmp_path / "tower", ["B", 3, 4, 4], ["B", 6, 8])
    tower = load_vision_tower(str(folder))
    assert (tower.tokens, tower.width) == (6, 8)
    for name, pixels, embeddings, more in (
        ("other-size", ["B", 3, 5, 5], ["B", 5, 15], []),
        ("flat", ["B", 48], ["B", 6, 8], []),
        ("two-inputs", ["B", 3, 4, 4], ["B", 6, 8], ["more"]),
        ("one-vector", ["B", 3, 4, 4], ["B", 48], []),
    ):
        wrong = make_onnx_tower(tmp_path / name, pixels, embeddings, *more)
        with refused(BackboneError, wrong / "model.onnx"):
            load_vision_tower(str(wrong))
    (folder / "model.onnx").write_bytes(b"no graph")
    with refused(BackboneError, folder / "model.onnx"):
        load_vision_tower(str(folder))
    (folder / "preprocessor_config.json").unlink()
    with refused(BackboneError, folder / "preprocessor_config.json"):
        load_vision_tower(str(folder))
