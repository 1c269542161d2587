"""ClipCap in PyTorch: the paper's mappers, the prefix in front of GPT-2, training, and published checkpoints."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, GPT2LMHeadModel

from itune.backbones import BackboneError, load_clip_projection, load_language_model, load_vision_tower
from itune.batches import caption_head, encode_caption
from itune.checkpoint import CheckpointError, load_config
from itune.clipcap import ClipCapConfig, ClipCapModel, ImagePrefix
from itune.config import PRESETS, ConfigError, resolve
from itune.data import Record
from itune.eager import EagerEngine
from itune.evaluate import eager_captioner
from itune.export.importing import ImportOptions, import_checkpoint
from itune.features import LiveFeatures
from itune.methods import LoadedCheckpoint
from itune.runtime.errors import ItuneError
from itune.runtime.search import SearchConfig, search
from itune.runtime.settings import TextSettings
from itune.train import Interrupted, Trainer
from tests.clipcap import SHAPES, save_clipcap
from tests.conftest import CAPTIONS, make_clip, make_language_model
from tests.itune.test_train import Quiet

PARTS = ("gpt.", "clip_project.")


@pytest.fixture(scope="module")
def projecting(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """A CLIP that has its projection, to 20."""
    folder = make_clip(tmp_path_factory.mktemp("clip") / "projecting")
    config = CLIPVisionConfig.from_pretrained(folder)
    config.projection_dim, config.layer_norm_eps = 20, 1e-3
    torch.manual_seed(3)
    model = CLIPVisionModelWithProjection(config)
    with torch.no_grad():
        norm = model.vision_model.post_layernorm
        norm.weight.normal_(1, 0.2), norm.bias.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def records(photos: list[Path]) -> list[Record]:
    """Five photos with two captions each."""
    return [Record(path, (CAPTIONS[i], CAPTIONS[i + 1]), path.stem) for i, path in enumerate(photos[:5])]


def state(prefix: ImagePrefix) -> dict[str, Tensor]:
    return {name.removeprefix("mapper."): tensor for name, tensor in prefix.state_dict().items()}


def papers_transformer(w: dict[str, Tensor], x: Tensor, heads: int, clip_length: int) -> Tensor:
    """The mapper, position by position and head by head, from the paper's description and its code's conventions."""
    d = w["prefix_const"].shape[1]
    positions = [*(x @ w["linear.weight"].T + w["linear.bias"]).split(d), *w["prefix_const"]]
    h = torch.stack(positions)

    def norm(name: str, t: Tensor) -> Tensor:
        centred = t - t.mean(-1, keepdim=True)
        return w[f"{name}.weight"] * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() + w[f"{name}.bias"]

    for i in range(1 + max(int(n.split(".")[2]) for n in w if n.startswith("transformer."))):
        name, n = f"transformer.layers.{i}", len(h)
        a = norm(f"{name}.norm1", h)
        q = (a @ w[f"{name}.attn.to_queries.weight"].T).reshape(n, heads, -1)
        both = (a @ w[f"{name}.attn.to_keys_values.weight"].T).reshape(n, 2, heads, -1)
        scores = torch.einsum("qhc,khc->qkh", q, both[:, 0]) / math.sqrt(d // heads)
        mixed = torch.einsum("qkh,khc->qhc", scores.softmax(1), both[:, 1]).reshape(n, d)
        h = h + mixed @ w[f"{name}.attn.project.weight"].T + w[f"{name}.attn.project.bias"]
        a = norm(f"{name}.norm2", h) @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
        h = h + a.clamp(min=0) @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]
    return h[clip_length:]


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
    for name in ("norm_weight", "norm_bias", "weight"):
        prefix.projection.get_buffer(name).copy_(getattr(projection, name))
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
    """Our search with prefix ids, `generate` with them, and a GPT-2 without hooks: token for token."""
    checkpoint = save_clipcap(tmp_path / "c", language_model_folder, clip_folder, prompt, **SHAPES["transformer"])
    loaded = LoadedCheckpoint.load(checkpoint)
    model, config = loaded.model, loaded.config
    visual = torch.randn(4, loaded.tower.tokens, loaded.tower.width, generator=torch.Generator().manual_seed(1))
    head = caption_head(loaded.language.tokenizer, config.text, model.prefix_ids)
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
        embeds = torch.cat([model.project(visual)["prefix"], language.model.transformer.wte(input_ids[:, 3:])], dim=1)
        untouched: Any = load_language_model(str(language_model_folder)).model
        logits = untouched(inputs_embeds=embeds).logits[:, 2:-1].log_softmax(-1)
        by_hand = -logits.gather(2, input_ids[:, 3:, None]).sum()
    assert float(model.loss(input_ids, mask, visual).detach()) == pytest.approx(float(by_hand), rel=1e-5)
    with pytest.raises(RuntimeError, match="looking_at"):
        language.model(input_ids)


def make_trainer(lm: Path, vision: Path, records: list[Record], output: Path, **settings: Any) -> Trainer:
    values: dict[str, Any] = {
        "method": "clipcap", "prefix_length": 3, "clip_length": 2, "mapper_layers": 1, "mapper_heads": 4,
        "epochs": 8, "batch_size": 4, "images_per_forward": 2, "learning_rate": 1e-2, "precision": "fp32",
        "num_beams": 2, "max_new_tokens": 6, "language_model": str(lm), "vision": str(vision), "visual_dropout": 0.0,
    }  # fmt: skip
    config = resolve("small-data", **(values | settings))
    tower = load_vision_tower(str(vision))
    language = load_language_model(str(lm))
    cpu = torch.device("cpu")
    return Trainer(config, language, tower, LiveFeatures(tower), records, records[3:], output, cpu)


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
    for message, overrides in (
        ("--bottleneck belongs to --method i-tuning, not to clipcap", {"method": "clipcap", "bottleneck": 8}),
        ("--mapper belongs to --method clipcap, not to i-tuning", {"mapper": "mlp"}),
        ("--clip-length belongs to --mapper transformer, not to mlp", mlp | {"clip_length": 3}),
        ("--mapper rnn does not exist: choose one of transformer, mlp", {"method": "clipcap", "mapper": "rnn"}),
        ("--pooling max does not exist: choose one of projected, cls, mean", {"method": "clipcap", "pooling": "max"}),
        ("--prefix-length must be at least 1, not 0", {"method": "clipcap", "prefix_length": 0}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            resolve("base", **overrides)
    preset = PRESETS["clipcap"]
    assert (preset.learning_rate, preset.batch_size, preset.epochs, preset.prefix_length) == (2e-5, 40, 10, 10)
    for message, settings in (
        ("--visual-dropout 0.5 leaves out .* --pooling cls reads one", {"visual_dropout": 0.5}),
        ("--pooling projected: .* has no CLIP projection; give cls or mean", {"pooling": "projected"}),
        ("--mapper-heads 5 does not divide the language model's width 32", {"mapper_heads": 5}),
        ("--prefix-length 64 leaves no room", {"prefix_length": 64}),
    ):
        with pytest.raises(ItuneError, match=message):
            make_trainer(language_model_folder, clip_folder, records, tmp_path / "t", **settings)


def published(
    folder: Path, lm: Path, *, mapper: str = "transformer", fine_tuned: bool = False, width: int = 20, gpt: bool = True
) -> Path:
    """A checkpoint in the layout of ClipCap's code, old releases' mask buffers included."""
    torch.manual_seed(9)
    d, length, clip_length = 32, 4, 3
    shapes: dict[str, tuple[int, ...]] = {}
    if mapper == "mlp":
        shapes |= {"model.0.weight": (d * length // 2, width), "model.0.bias": (d * length // 2,)}
        shapes |= {"model.2.weight": (d * length, d * length // 2), "model.2.bias": (d * length,)}
    else:
        shapes |= {"prefix_const": (length, d), "linear.weight": (clip_length * d, width), "linear.bias": (96,)}
        for i in range(2):
            layer = {"norm1.weight": (d,), "norm1.bias": (d,), "attn.to_queries.weight": (d, d)}
            layer |= {"attn.to_keys_values.weight": (2 * d, d), "attn.project.weight": (d, d)}
            layer |= {"attn.project.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,)}
            layer |= {"mlp.fc1.weight": (2 * d, d), "mlp.fc1.bias": (2 * d,)}
            layer |= {"mlp.fc2.weight": (d, 2 * d), "mlp.fc2.bias": (d,)}
            shapes |= {f"transformer.layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors = {f"clip_project.{name}": torch.randn(shape) * 0.7 for name, shape in shapes.items()}
    if gpt:
        language: Any = GPT2LMHeadModel.from_pretrained(lm)
        if fine_tuned:
            language.transformer.h[1].mlp.c_fc.weight.data += 0.1
        tensors |= {f"gpt.{name}": tensor for name, tensor in language.state_dict().items()}
        for i in range(3):
            tensors[f"gpt.transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            tensors[f"gpt.transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "coco.pt")
    return folder / "coco.pt"


@pytest.mark.parametrize(("mapper", "fine_tuned"), [("transformer", False), ("mlp", True)])
def test_published_checkpoints_are_imported_exactly(
    mapper: str, fine_tuned: bool, projecting: Path, photos: list[Path], tmp_path: Path
) -> None:
    lm = make_language_model(tmp_path / "lm", n_head=8)
    file = published(tmp_path / "published", lm, mapper=mapper, fine_tuned=fine_tuned)
    options = ImportOptions(str(lm), str(projecting), normalize=mapper == "mlp")
    import_checkpoint(file, tmp_path / "c", options)
    loaded = LoadedCheckpoint.load(tmp_path / "c")
    assert (tmp_path / "c" / "language-model").exists() == fine_tuned
    assert loaded.config.text == TextSettings(begin=None, end=".", strip_period=True)
    tensors = torch.load(file, weights_only=True)
    for name, tensor in loaded.model.adapter_state().items():
        if name.startswith("mapper."):
            assert torch.equal(tensor, tensors[name.replace("mapper.", "clip_project.", 1)]), name
    own = loaded.language.model.state_dict()
    assert all(torch.equal(tensor, tensors[f"gpt.{name}"]) for name, tensor in own.items())

    # What the original does: CLIP's image embedding, the mapper, GPT-2 on inputs_embeds until the period.
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    clip: Any = CLIPVisionModelWithProjection.from_pretrained(projecting)
    image = loaded.tower.image
    normalized = ((pixels / 255 - np.array(image.mean)) / np.array(image.std)).transpose(0, 3, 1, 2)
    w = {name.removeprefix("clip_project."): tensor for name, tensor in tensors.items()}
    with torch.inference_mode():
        embedding = clip(torch.from_numpy(normalized.astype(np.float32))).image_embeds
        if mapper == "mlp":
            embedding = embedding / embedding.norm(2, -1, keepdim=True)
            hidden = torch.tanh(embedding @ w["model.0.weight"].T + w["model.0.bias"])
            prefix = (hidden @ w["model.2.weight"].T + w["model.2.bias"]).reshape(3, 4, 32)
        else:
            mapped = {name: tensor for name, tensor in w.items() if not name.startswith("gpt.")}
            prefix = torch.stack([papers_transformer(mapped, each, 8, 3) for each in embedding])
        gpt2: Any = GPT2LMHeadModel.from_pretrained(lm).eval()
        gpt2.load_state_dict({n[4:]: t for n, t in tensors.items() if n[4:] in gpt2.state_dict()})
        period = loaded.language.tokenizer.token_to_id(".")
        expected = gpt2.generate(
            inputs_embeds=prefix, attention_mask=torch.ones(3, 4), do_sample=False, max_new_tokens=8,
            eos_token_id=period, pad_token_id=period,
        )  # fmt: skip
    found = eager_captioner(loaded).caption(list(pixels), num_beams=1, max_new_tokens=8)
    for row, caption in zip(expected.tolist(), found, strict=True):
        assert list(caption.tokens) == (row[: row.index(period)] if period in row else row)
    assert len({caption.tokens for caption in found}) > 1


def test_imports_that_fail_say_why(projecting: Path, clip_folder: Path, tmp_path: Path) -> None:
    lm = make_language_model(tmp_path / "lm", n_head=8)
    good = published(tmp_path / "good", lm)

    def refused(message: str, file: Path, language_model: Path = lm, vision: Path = projecting) -> None:
        with pytest.raises(ItuneError, match=message) as caught:
            import_checkpoint(file, tmp_path / "c", ImportOptions(str(language_model), str(vision)))
        assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "c").exists()

    refused(r"absent\.pt: does not exist", tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no weights")
    refused(r"text\.pt: (is not a state dict|holds more than tensors)", tmp_path / "text.pt")
    with (tmp_path / "code.pt").open("wb") as evil:
        pickle.dump(subprocess.Popen, evil)
    refused(r"code\.pt: (is not a state dict|holds more than tensors)", tmp_path / "code.pt")
    torch.save({"model": subprocess.run}, tmp_path / "call.pt")
    refused("holds more than tensors, which could be code", tmp_path / "call.pt")
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "other.pt")
    refused(r"no checkpoint of ClipCap.*encoder\.weight", tmp_path / "other.pt")
    torch.save({"clip_project.gate": torch.ones(2)}, tmp_path / "third.pt")
    refused("neither of ClipCap's mappers", tmp_path / "third.pt")
    wide = make_language_model(tmp_path / "wide", width=64)
    refused(r"gpt\.transformer\.wte\.weight is .* has .*--language-model", good, wide)
    refused("writes embeddings of 32, and .* 64", published(tmp_path / "bare", lm, gpt=False), wide)
    refused("reads image embeddings of 20, and those .* are of 24: .* --vision", good, vision=clip_folder)
    refused(r"reads .* of 21, .* are of 20 \(projected\) and 24", published(tmp_path / "narrow", lm, width=21))
    tensors = torch.load(good, weights_only=True)
    del tensors["clip_project.transformer.layers.1.mlp.fc2.bias"]
    torch.save(tensors, tmp_path / "hole.pt")
    refused(r"lacks tensor mapper\.transformer\.layers\.1\.mlp\.fc2\.bias", tmp_path / "hole.pt")


def test_damaged_checkpoints_and_towers_say_why(language_model_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    folder = save_clipcap(tmp_path / "c", language_model_folder, clip_folder, **SHAPES["transformer"])
    content = json.loads((folder / "itune.json").read_text(encoding="utf-8"))
    for message, changes in (
        ("mapper transformer needs clip_length", {"clip_length": None}),
        ("pooling projected and projected_width: give both or neither", {"pooling": "projected"}),
        ("has shape .* itune.json asks for", {"prefix_length": 6}),
        ("field mapper", {"mapper": "rnn"}),
    ):
        (folder / "itune.json").write_text(json.dumps(content | changes), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            LoadedCheckpoint.load(folder)
    broken = make_clip(tmp_path / "clip")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BackboneError, match=r"model\.safetensors cannot be read"):
        load_clip_projection(str(broken))


def itune(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-P", "-m", f"itune.cli.{command}", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_command_lines(projecting: Path, records: list[Record], tmp_path: Path) -> None:
    """Train, export in int8, run and evaluate; then from a published checkpoint on."""
    lm = make_language_model(tmp_path / "lm", n_head=8)
    captions = tmp_path / "captions.jsonl"
    lines = [json.dumps({"image": str(r.image), "captions": r.captions, "split": "train"}) for r in records]
    captions.write_text("\n".join(lines), encoding="utf-8")
    run, photo = tmp_path / "run", records[0].image
    done = itune(
        "train", "--preset", "clipcap", "--data", captions, "--dev-fraction", "0.3", "--language-model", lm,
        "--vision", projecting, "--mapper", "mlp", "--prefix-length", 3, "--epochs", 1, "-o", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    bundle = tmp_path / "bundle"
    done = itune("export", run, "--precision", "int8", "--no-verify", "-o", bundle)
    assert done.returncode == 0, done.stderr
    done = itune("run", photo, "--bundle", bundle, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["caption"]
    file = published(tmp_path / "p", lm)
    done = itune("export", "--import", file, "--language-model", lm, "--vision", projecting, "-o", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    done = itune("evaluate", tmp_path / "c", "--data", captions, "--split", "all")
    assert done.returncode == 0, done.stderr
    done = itune(
        "train", "--preset", "clipcap", "--data", captions, "--dev-fraction", "0.3", "--init-from", tmp_path / "c",
        "--epochs", 1, "-o", tmp_path / "tuned",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = load_config(tmp_path / "tuned" / "best").text
    assert (text.end, text.strip_period, text.begin) == (".", True, None)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("--language-model is for a published checkpoint: give --import, too", ["c", "--language-model", "gpt2"]),
        ("--normalize is for a published checkpoint", ["--restore", "b", "--normalize"]),
        ("--import contradicts --restore", ["--restore", "b", "--import", "f.pt"]),
        ("--precision contradicts --import, which writes a checkpoint", ["--import", "f.pt", "--precision", "int8"]),
        ("CHECKPOINT contradicts --import", ["c", "--import", "f.pt"]),
    ],
)
def test_export_flags_that_contradict_each_other(message: str, arguments: list[str]) -> None:
    import typer
    from typer.testing import CliRunner

    from itune.cli.export import export

    app = typer.Typer()
    app.command()(export)
    result = CliRunner().invoke(app, [*arguments, "-o", "out"])
    assert message in str(result.exception)
