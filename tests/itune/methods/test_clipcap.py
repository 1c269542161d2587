"""ClipCap in PyTorch: the paper's mappers, the prefix in front of GPT-2, training, and published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection, GPT2LMHeadModel

from itune.backbones import BackboneError, load_clip_projection, load_language_model, load_vision_tower
from itune.checkpoint import CheckpointError
from itune.data.features import Features
from itune.data.records import Record
from itune.eager import EagerEngine
from itune.loading import LoadedCheckpoint, eager_captioner
from itune.methods.clipcap.model import ClipCapConfig, ClipCapModel, ImagePrefix
from itune.methods.schemas import load_config
from itune.runtime.errors import ItuneError
from itune.runtime.search import SearchConfig
from itune.runtime.search.loop import search
from itune.runtime.settings import TextSettings
from itune.runtime.text import encode_caption
from itune.training.batches import prompt_tokens
from itune.training.config import PRESETS, ConfigError, resolve
from itune.training.loop import Interrupted, Trainer
from itune.training.prompting import TrainingData
from tests.clipcap import SHAPES, papers_transformer, save_clipcap
from tests.conftest import CAPTIONS, make_clip, refused
from tests.itune.training.test_loop import Quiet


def state(prefix: ImagePrefix) -> dict[str, Tensor]:
    return {name.removeprefix("mapper."): tensor for name, tensor in prefix.state_dict().items()}


def test_mappers_are_the_papers() -> None:
    torch.manual_seed(0)
    visual = torch.randn(3, 7, 24)
    shape = {"prefix_length": 4, "clip_length": 3, "mapper_layers": 2, "mapper_heads": 4}
    prefix = ImagePrefix(ClipCapConfig(32, 24, "transformer", **shape))
    expected = torch.stack([papers_transformer(state(prefix), v[0], 4, 3) for v in visual])
    torch.testing.assert_close(prefix(visual), expected, rtol=1e-4, atol=1e-5)

    prefix = ImagePrefix(ClipCapConfig(32, 24, "mlp", prefix_length=4, pooling="mean", normalize=True))
    w, x = state(prefix), visual.mean(1)
    hidden = torch.tanh(x / x.norm(dim=1, keepdim=True) @ w["model.0.weight"].T + w["model.0.bias"])
    expected = (hidden @ w["model.2.weight"].T + w["model.2.bias"]).reshape(3, 4, 32)
    torch.testing.assert_close(prefix(visual), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mapper", "parameters"), [("transformer", 41_745_408), ("mlp", 31_468_800)])
def test_parameter_counts_are_the_papers(mapper: Any, parameters: int) -> None:
    """The paper (table 1) counts 43M and 32M for GPT-2 base and CLIP ViT-B/32."""
    with torch.device("meta"):
        prefix = ImagePrefix(ClipCapConfig(768, 768, mapper, pooling="projected", projected_width=512))
    assert sum(weight.numel() for weight in prefix.parameters()) == parameters


def test_projection_is_clips(projecting: Path, clip_folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    tower, projection = load_vision_tower(str(projecting)), load_clip_projection(str(projecting))
    assert projection is not None
    assert projection.epsilon == 1e-3
    prefix = ImagePrefix(ClipCapConfig(32, 24, "mlp", pooling="projected", projected_width=20, layer_norm_eps=1e-3))
    assert prefix.projection is not None
    prefix.projection.load_state_dict(projection.state_dict())
    mean, std = np.array(tower.image.mean), np.array(tower.image.std)
    normalized = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.inference_mode():
        clip: Any = CLIPVisionModelWithProjection.from_pretrained(projecting)
        expected = clip(torch.from_numpy(normalized)).image_embeds
    torch.testing.assert_close(prefix.pool(tower.embed(pixels)), expected, rtol=1e-3, atol=1e-4)
    assert load_clip_projection(str(clip_folder)) is None


@pytest.mark.parametrize("prompt", ["", "A photo of"])
def test_captions_are_those_of_generate_with_inputs_embeds(
    prompt: str, language_model_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    """Our search with prefix ids, `generate` with them, and an untouched GPT-2: token for token."""
    checkpoint = save_clipcap(tmp_path / "c", language_model_folder, clip_folder, prompt, **SHAPES["transformer"])
    loaded = LoadedCheckpoint.load(checkpoint)
    model, config = loaded.model, loaded.config
    visual = torch.randn(4, loaded.tower.tokens, loaded.tower.width, generator=torch.Generator().manual_seed(1))
    head = prompt_tokens(loaded.language.tokenizer, config.text, model.prefix_ids)
    assert len(head) == 4 + len(encode_caption(loaded.language.tokenizer, TextSettings(), prompt))
    untouched: Any = GPT2LMHeadModel.from_pretrained(language_model_folder).eval()
    engine, found_captions = EagerEngine(model, loaded.tower), set()
    for beams in (1, 3):
        options: dict[str, Any] = {
            "num_beams": beams, "max_new_tokens": 9, "do_sample": False, "eos_token_id": 0, "pad_token_id": 0
        }  # fmt: skip
        with torch.inference_mode():
            projected = model.project(visual)
            words = untouched.transformer.wte(torch.tensor([head[4:]] * 4, dtype=torch.long))
            embeds = torch.cat([projected["prefix"], words], dim=1)
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
            expected = untouched.generate(inputs_embeds=embeds, attention_mask=mask, **options)
            with model.looking_at(projected):
                gpt2: Any = model.language_model
                by_ids = gpt2.generate(torch.tensor([head] * 4), attention_mask=mask, **options)[:, len(head) :]
        assert by_ids.tolist() == expected.tolist()
        search_config = SearchConfig(num_beams=beams, max_new_tokens=9)
        found = search(engine, engine.encode_features(visual), [head] * 4, search_config, 0)
        for row, hypotheses in zip(expected.tolist(), found, strict=True):
            caption = row[: row.index(0)] if 0 in row else row
            assert list(hypotheses[0].tokens) == caption
            found_captions.add(tuple(caption))
    assert len(found_captions) >= 4


def test_gradients_reach_the_mapper_and_nothing_else(language_model_folder: Path, records: list[Record]) -> None:
    language = load_language_model(str(language_model_folder))
    shape = {"prefix_length": 3, "clip_length": 2, "mapper_layers": 1, "mapper_heads": 4}
    model = ClipCapModel(language.model, ClipCapConfig(32, 24, "transformer", **shape))
    ids = [*model.prefix_ids, *encode_caption(language.tokenizer, TextSettings(), CAPTIONS[0])]
    input_ids, mask = torch.tensor([ids] * 2), torch.ones(2, len(ids), dtype=torch.bool)
    mask[:, :3] = False
    visual = torch.randn(2, 5, 24)
    model.loss(input_ids, mask, visual).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.adapters.parameters())
    assert all(weight.grad is None for weight in language.model.parameters())
    # The first token is predicted by the last prefix position: cross-entropies computed by hand agree.
    with torch.no_grad():
        untouched: Any = load_language_model(str(language_model_folder)).model
        embeds = torch.cat([model.project(visual)["prefix"], untouched.transformer.wte(input_ids[:, 3:])], dim=1)
        logits = untouched(inputs_embeds=embeds).logits[:, 2:-1].log_softmax(-1)
        by_hand = -logits.gather(2, input_ids[:, 3:, None]).sum()
    assert float(model.loss(input_ids, mask, visual).detach()) == pytest.approx(float(by_hand), rel=1e-5)


def make_trainer(lm: Path, vision: Path, records: list[Record], output: Path, **settings: Any) -> Trainer:
    values: dict[str, Any] = {
        "method": "clipcap", "prefix_length": 3, "clip_length": 2, "mapper_layers": 1, "mapper_heads": 4,
        "epochs": 8, "batch_size": 4, "images_per_forward": 2, "learning_rate": 1e-2, "precision": "fp32",
        "num_beams": 2, "max_new_tokens": 6, "language_model": str(lm), "vision": str(vision), "visual_dropout": 0.0,
    }  # fmt: skip
    config = resolve("small-data", **(values | settings))
    tower = load_vision_tower(str(vision))
    language = load_language_model(str(lm))
    data = TrainingData({"train": records}, {"dev": records[3:]}, Features(tower))
    return Trainer(config, language, tower, data, output, device=torch.device("cpu"))


def test_training_learns_resumes_and_saves_a_checkpoint(
    language_model_folder: Path, projecting: Path, records: list[Record], photos: list[Path], tmp_path: Path
) -> None:
    def trainer(output: str, **settings: Any) -> Trainer:
        return make_trainer(language_model_folder, projecting, records, tmp_path / output, **settings)

    whole, unbroken = trainer("whole"), Quiet()
    whole.run(unbroken)
    assert unbroken.losses[-1] < 0.95 * unbroken.losses[0], "as far as a prefix moves a random GPT-2"
    before, first = Quiet(), trainer("stopped")
    before.stop, before.after = first, 2
    with pytest.raises(Interrupted):
        first.run(before)
    second, rest = trainer("stopped"), Quiet()
    second.resume()
    second.run(rest)
    assert before.losses + rest.losses == unbroken.losses

    loaded = LoadedCheckpoint.load(tmp_path / "whole" / "best")
    config = load_config(tmp_path / "whole" / "best")
    assert (config.method, config.text.begin, config.model_dump()["pooling"]) == ("clipcap", None, "projected")
    projection = load_clip_projection(str(projecting))
    assert projection is not None
    assert torch.equal(loaded.model.adapter_state()["projection.weight"], projection.weight), "it is frozen"
    assert eager_captioner(loaded).caption(photos[0], min_new_tokens=4, max_new_tokens=4).tokens
    continued = trainer("continued")
    continued.init_from(tmp_path / "whole")
    found = continued.model.adapter_state()
    assert all(torch.equal(found[name], tensor) for name, tensor in loaded.model.adapter_state().items())


def test_settings_that_contradict_each_other(
    language_model_folder: Path, clip_folder: Path, records: list[Record], tmp_path: Path
) -> None:
    mlp = {"method": "clipcap", "mapper": "mlp"}
    for named, overrides in (
        (["--bottleneck", "clipcap"], {"method": "clipcap", "bottleneck": 8}),
        (["--mapper", "i-tuning"], {"mapper": "mlp"}),
        (["--clip-length", "mlp"], mlp | {"clip_length": 3}),
        (["--mapper", "rnn"], {"method": "clipcap", "mapper": "rnn"}),
        (["--pooling", "max"], {"method": "clipcap", "pooling": "max"}),
        (["--prefix-length", "0"], {"method": "clipcap", "prefix_length": 0}),
    ):
        with refused(ConfigError, *named):
            resolve("base", **overrides)
    preset = PRESETS["clipcap"]
    assert (preset.learning_rate, preset.batch_size, preset.epochs, preset.prefix_length) == (2e-5, 40, 10, 10)
    for named, settings in (
        (["--visual-dropout 0.5", "--pooling cls"], {"visual_dropout": 0.5}),
        (["--pooling projected", clip_folder], {"pooling": "projected"}),
        (["--mapper-heads 5", "32"], {"mapper_heads": 5}),
        (["--max-new-tokens 6", "64", "--prefix-length"], {"prefix_length": 64}),
    ):
        with refused(ItuneError, *named):
            make_trainer(language_model_folder, clip_folder, records, tmp_path / "t", **settings)


def test_damaged_checkpoints_and_towers_say_why(language_model_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    folder = save_clipcap(tmp_path / "c", language_model_folder, clip_folder, **SHAPES["transformer"])
    content = json.loads((folder / "itune.json").read_text(encoding="utf-8"))
    for named, changes in (
        (["itune.json", "clip_length"], {"clip_length": None}),
        (["itune.json", "projected_width"], {"pooling": "projected"}),
        (["mapper.prefix_const", "[4, 32]", "[6, 32]"], {"prefix_length": 6}),
        (["itune.json", "mapper", "rnn"], {"mapper": "rnn"}),
    ):
        (folder / "itune.json").write_text(json.dumps(content | changes), encoding="utf-8")
        with refused(CheckpointError, *named):
            LoadedCheckpoint.load(folder)
    broken = make_clip(tmp_path / "clip")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with refused(BackboneError, broken / "model.safetensors"):
        load_clip_projection(str(broken))
