"""What is said of language models and vision towers that are damaged, incomplete or something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from itune.backbones import BackboneError, load_clip_projection, load_language_model, load_vision_tower
from itune.retrieval.encoder import TextEncoder

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
    with pytest.raises(BackboneError, match=f"^{language_model}: cannot be loaded as GPT-2: "):
        load_language_model(str(language_model))
    with pytest.raises(BackboneError, match=f"^{clip}: cannot be loaded as a CLIP vision model: "):
        load_vision_tower(str(clip))
    with pytest.raises(BackboneError, match=f"^{clip}: cannot be loaded as a CLIP with a text tower: "):
        TextEncoder(str(clip))


def test_missing_weights_are_not_made_up(language_model: Path, clip: Path) -> None:
    without(language_model, "h.2.mlp")
    with pytest.raises(
        BackboneError, match=r"config.json asks for transformer\.h\.2\.mlp\.c_fc\.bias, which its weight"
    ):
        load_language_model(str(language_model))
    without(clip, "vision_model.encoder.layers.1.")
    with pytest.raises(BackboneError, match=r"config.json asks for .*encoder\.layers\.1\.layer_norm1\.bias"):
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
    with pytest.raises(BackboneError, match=r"tokenizer\.json is not a tokenizer: "):
        load_language_model(str(language_model))
    for file in clip.glob("tokenizer*.json"):
        file.unlink()
    damaged(clip, "vocab.json", CHANGES[change])
    with pytest.raises(BackboneError, match=f"^{clip}: tokenizer: "):
        TextEncoder(str(clip))


@pytest.mark.parametrize("content", [[], {}, {"size": 1, "crop_size": []}, {"size": {"height": "x", "width": 2}}])
def test_preprocessors_that_are_none(content: object, clip: Path) -> None:
    (clip / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(BackboneError, match=r"preprocessor_config\.json: not an image preprocessor's configuration: "):
        load_vision_tower(str(clip))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_normalize": False}, "do_resize and do_normalize must be true"),
        ({"do_rescale": False}, "pixels must be rescaled by 1/255"),
        ({"rescale_factor": 1 / 127.5}, "pixels must be rescaled by 1/255"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "longest_edge is not supported"),
        ({"image_std": [0, 1, 1]}, "not an image preprocessor's configuration: .*"),
        ({"image_mean": [float("nan"), 0, 0]}, "not an image preprocessor's configuration: .*"),
    ],
)
def test_preprocessing_that_would_be_another(change: dict[str, object], message: str, clip: Path) -> None:
    file = clip / "preprocessor_config.json"
    load_vision_tower(str(clip))
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BackboneError, match=message):
        load_vision_tower(str(clip))
