"""The eager model: parity with transformers, Dropping, checkpoints and their errors."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from itune.backbones import load_language_model, load_vision_tower
from itune.checkpoint import CheckpointError
from itune.eager import EagerEngine, candidates
from itune.loading import LoadedCheckpoint
from itune.methods.ituning.model import ITuningModel
from itune.runtime.errors import ItuneError
from itune.runtime.search import SearchConfig
from itune.runtime.search.loop import search
from tests.conftest import refused
from tests.runtime.fake_engine import best_of


@pytest.fixture(scope="module")
def loaded(checkpoint_folder: Path) -> LoadedCheckpoint:
    return LoadedCheckpoint.load(checkpoint_folder)


def random_visual(images: int, loaded: LoadedCheckpoint, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, loaded.tower.tokens, loaded.tower.width, generator=generator)


@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_captions_are_those_of_transformers_generate(loaded: LoadedCheckpoint, num_beams: int) -> None:
    model, images = loaded.model, 4
    visual = random_visual(images, loaded)
    end = loaded.language.tokenizer.token_to_id("<|endoftext|>")
    state = EagerEngine(model, loaded.tower).encode_features(visual)
    ours = search(
        EagerEngine(model, loaded.tower),
        state,
        [[end]] * images,
        SearchConfig(num_beams=num_beams, max_new_tokens=12),
        end,
    )
    with torch.inference_mode(), model.looking_at(model.project(visual)):
        theirs = model.language_model.generate(
            torch.full((images, 1), end),
            attention_mask=torch.ones(images, 1, dtype=torch.long),
            num_beams=num_beams,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=end,
        )
    expected = [row[1:][: [*row[1:].tolist(), end].index(end)].tolist() for row in theirs]
    assert [list(hypotheses[0].tokens) for hypotheses in ours] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1, "a model that ignores the image proves nothing"


def test_prompts_of_different_lengths_do_not_disturb_each_other(loaded: LoadedCheckpoint) -> None:
    engine, visual = EagerEngine(loaded.model, loaded.tower), random_visual(2, loaded)
    prompts = [[0, 5, 9, 11], [0, 7]]
    config = SearchConfig(num_beams=3, max_new_tokens=8)
    together = search(engine, engine.encode_features(visual), prompts, config, 0)
    for i, prompt in enumerate(prompts):
        alone = search(engine, engine.encode_features(visual[i : i + 1]), [prompt], config, 0)
        assert [h.tokens for h in alone[0]] == [h.tokens for h in together[i]]


def test_layers_below_the_first_adapter_keep_no_activations(
    language_model_folder: Path, loaded: LoadedCheckpoint
) -> None:
    kept: list[int] = []
    for first in (0, 1, 2):
        model = ITuningModel(
            load_language_model(str(language_model_folder)).model, loaded.model.config, first_adapter_layer=first
        )
        torch.nn.init.normal_(next(iter(model.adapters.values())).output.weight)
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.randint(0, 100, (4, 10))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.loss(ids, torch.ones_like(ids, dtype=torch.bool), random_visual(2, loaded)).backward()
        kept.append(sum(saved.values()))
        assert all(weight.grad is None for weight in model.language_model.parameters())
    assert kept[0] - kept[1] == pytest.approx(kept[1] - kept[2], rel=0.3)
    assert kept[2] < 0.6 * kept[0]


def test_loss_covers_the_masked_tokens_only(loaded: LoadedCheckpoint) -> None:
    visual, ids = random_visual(1, loaded), torch.tensor([[0, 5, 6, 7, 0, 0]])
    mask = torch.tensor([[False, False, True, True, True, False]])
    loss = loaded.model.loss(ids, mask, visual)
    with torch.inference_mode(), loaded.model.looking_at(loaded.model.project(visual)):
        logits = loaded.model.language_model(ids).logits.log_softmax(-1)
    expected = -sum(logits[0, i - 1, ids[0, i]] for i in (2, 3, 4))
    torch.testing.assert_close(loss.detach(), expected)


def test_entropy_is_one_when_attention_is_uniform(loaded: LoadedCheckpoint) -> None:
    ids = torch.tensor([[0, 5, 6, 7]])
    same = random_visual(1, loaded)[:, :1].expand(-1, loaded.tower.tokens, -1)
    assert loaded.model.attention_entropy(ids, ids > 0, same) == pytest.approx(1.0, abs=1e-5)
    assert loaded.model.attention_entropy(ids, ids > 0, random_visual(1, loaded)) < 0.99
    assert loaded.model.attention_entropy(ids, ids > 0, same[:, :1]) == 0  # of one embedding there is no choice


@pytest.mark.parametrize("levels", [2, 20, 1000])
@pytest.mark.parametrize("k", [1, 9, 70])
def test_candidates_break_ties_by_token_id(levels: int, k: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(levels).integers(0, levels, (5, 60)) / np.float32(50)).float()
    logits[1, 7:] = -math.inf
    for found, expected in zip(candidates(logits, k), best_of(logits.numpy(), k), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_visual_embeddings_are_clips_last_hidden_state(clip_folder: Path) -> None:
    from transformers import CLIPVisionModel

    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    tower = load_vision_tower(str(clip_folder))
    mean, std = np.array(tower.image.mean), np.array(tower.image.std)
    normalized = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.inference_mode():
        expected = CLIPVisionModel.from_pretrained(clip_folder)(torch.from_numpy(normalized)).last_hidden_state
    torch.testing.assert_close(tower.embed(pixels), expected, rtol=1e-4, atol=1e-4)
    assert tuple(expected.shape[1:]) == (tower.tokens, tower.width)


def copy(folder: Path, to: Path) -> Path:
    """A copy of a checkpoint beside the original, so that its relative sources still hold."""
    return shutil.copytree(folder, folder.parent / to.name)


def test_checkpoint_errors_name_file_field_and_mend(checkpoint_folder: Path, tmp_path: Path) -> None:
    broken = copy(checkpoint_folder, tmp_path)
    config = json.loads((broken / "itune.json").read_text())

    def expect(*named: object, **changes: object) -> None:
        (broken / "itune.json").write_text(json.dumps(config | changes))
        with refused(ItuneError, *named):
            LoadedCheckpoint.load(broken)

    expect("itune.json", "bottleneck", "-1", bottleneck=-1)
    expect("itune.json", "method", "telepathy", method="telepathy")
    expect("itune.json", "method", "['i-tuning']", method=["i-tuning"])
    expect("itune.json", "speed", speed=9)
    expect("first_adapter_layer 7", "3 layers", first_adapter_layer=7)
    expect(
        "itune.json", "language_model.sha256", "0" * 64, language_model={**config["language_model"], "sha256": "0" * 64}
    )
    expect("../moved", vision={**config["vision"], "source": "../moved"})
    expect("itune.json", "vision.tokens is 5", "17", vision={**config["vision"], "tokens": 5})
    expect("adapters.safetensors", "layers.0.key.bias", "[16]", "[8]", bottleneck=8)
    for content in ("{", "[]"):
        (broken / "itune.json").write_text(content)
        with refused(CheckpointError, "itune.json"):
            LoadedCheckpoint.load(broken)
    (broken / "itune.json").write_text(json.dumps(config))
    tensors = load_file(broken / "adapters.safetensors")
    del tensors["layers.1.key.bias"]
    save_file(tensors, broken / "adapters.safetensors")
    with refused(CheckpointError, "layers.1.key.bias"):
        LoadedCheckpoint.load(broken)
    complete = load_file(checkpoint_folder / "adapters.safetensors")
    save_file(complete | {"layers.9.key.bias": torch.zeros(16)}, broken / "adapters.safetensors")
    with refused(CheckpointError, "layers.9.key.bias"):
        LoadedCheckpoint.load(broken)
    (broken / "adapters.safetensors").write_bytes(b"nothing of the kind")
    with refused(CheckpointError, broken / "adapters.safetensors"):
        LoadedCheckpoint.load(broken)
    with refused(CheckpointError, tmp_path / "itune.json"):
        LoadedCheckpoint.load(tmp_path)


def test_gpt2_keeps_its_own_weights_and_names(language_model_folder: Path, loaded: LoadedCheckpoint) -> None:
    untouched = load_language_model(str(language_model_folder)).model.state_dict()
    found = loaded.model.language_model.state_dict()
    assert found.keys() == untouched.keys()
    assert all(torch.equal(found[name], weight) for name, weight in untouched.items())
    own = loaded.model.language_model_state()
    assert untouched.keys() - own.keys() == {"lm_head.weight"}, "it is tied to the embedding"
    assert own.keys() <= untouched.keys()


def test_checkpoint_names_are_the_published_ones(checkpoint_folder: Path) -> None:
    tensors = load_file(checkpoint_folder / "adapters.safetensors")
    names = {
        f"layers.{i}.{part}.{kind}"
        for i in range(3)
        for part in ("query", "key", "value", "output")
        for kind in ("weight", "bias")
    }
    assert tensors.keys() == names
    assert tensors["layers.0.query.weight"].shape == (16, 32)
    assert tensors["layers.0.key.weight"].shape == (16, 24)
    assert tensors["layers.0.output.weight"].shape == (32, 16)
