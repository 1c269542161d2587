"""SmallCap: parity with GPT-2's own cross-attention, parameter counts, packed captions, training with retrieval."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from itune.backbones import LanguageModel, load_language_model, load_vision_tower
from itune.cli.train import main
from itune.data.features import Features
from itune.data.records import load_records
from itune.loading import load_captioner
from itune.methods.base import CaptionModel
from itune.methods.ituning.model import AdapterConfig, ITuningModel
from itune.methods.smallcap.model import CrossAttentionConfig, SmallCapModel
from itune.retrieval.build import build_datastore
from itune.retrieval.options import CaptionSource
from itune.runtime.errors import DatastoreError, SearchError
from itune.runtime.settings import TextSettings
from itune.training.batches import Batch, TokenizedRecord, make_batch, pack_batch, tokenize
from itune.training.config import ConfigError, resolve
from itune.training.prompting import Prompting, TrainingData, prepare_prompts
from tests.conftest import CAPTIONS, make_language_model, random_photo, refused


@pytest.fixture(scope="module")
def language(language_model_folder: Path) -> LanguageModel:
    return load_language_model(str(language_model_folder))


def randomise(model: CaptionModel) -> CaptionModel:
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.adapters.parameters():
            weight.normal_(std=0.5 if weight.ndim > 1 else 0.2)
    return model


@pytest.mark.parametrize(("width", "millions"), [(64, 28.3), (32, 14.2), (16, 7.1), (8, 3.6), (4, 1.8)])
def test_parameters_are_as_many_as_the_paper_counts(width: int, millions: float) -> None:
    with torch.device("meta"):
        model = SmallCapModel(GPT2LMHeadModel(GPT2Config()), CrossAttentionConfig(768, 768, 12, width))
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert round(trainable / 1e6, 1) == millions


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_those_of_gpt2_with_cross_attention(attention: str) -> None:
    """With heads as wide as GPT-2's own, SmallCap is what `add_cross_attention` gives in transformers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 3, "initializer_range": 0.3}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, add_cross_attention=True)).eval()
    ours = GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation=attention))
    model = SmallCapModel(ours, CrossAttentionConfig(24, 24, heads=3, head_width=8))
    blocks: Any = theirs.transformer.h
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "cross" in name and weight.ndim == 1:
                weight.normal_()
        ours.load_state_dict({name: w for name, w in theirs.state_dict().items() if "cross" not in name})
        for layer, block in zip(model.layers, blocks, strict=True):
            layer.norm.load_state_dict(block.ln_cross_attn.state_dict())
            cross = block.crossattention
            for linear, weight, bias in (
                (layer.query, cross.q_attn.weight, cross.q_attn.bias),
                (layer.key, cross.c_attn.weight[:, :24], cross.c_attn.bias[:24]),
                (layer.value, cross.c_attn.weight[:, 24:], cross.c_attn.bias[24:]),
                (layer.output, cross.c_proj.weight, cross.c_proj.bias),
            ):
                linear.weight.copy_(weight.T)
                linear.bias.copy_(bias)
        ids, visual = torch.randint(0, 50, (4, 9)), torch.randn(2, 5, 24)
        expected = theirs(ids, encoder_hidden_states=visual.repeat_interleave(2, 0)).logits
        with model.looking_at(model.project(visual)):
            found = model.language_model(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        with model.looking_at(model.project(visual.flip(0))):
            assert (model.language_model(ids).logits - expected).abs().max() > 0.1, "the image is not looked at"


def test_the_norm_before_cross_attention_is_frozen_as_in_the_original(language: LanguageModel) -> None:
    model = SmallCapModel(copy.deepcopy(language.model), CrossAttentionConfig(32, 24, 4, 2))
    frozen = {name for name, weight in model.adapters.named_parameters() if not weight.requires_grad}
    assert frozen == {f"{i}.norm.{part}" for i in range(3) for part in ("weight", "bias")}
    assert set(model.adapter_state()) >= {f"layers.{name}" for name in frozen}, "an imported one has its own"


# Packed captions


RECORDS = [
    TokenizedRecord(Path("a"), (0, 9, 8, 7, 6), ((11, 12, 13, 0), (11, 0), (21, 22, 23, 24, 0)), True),
    TokenizedRecord(Path("b"), (0, 5, 4), ((31, 32), (33, 34, 35, 0)), True),
    TokenizedRecord(Path("c"), (0, 3, 2, 1), ((41, 42, 0),), True),
]


def cross_attention(language: GPT2LMHeadModel) -> CaptionModel:
    return SmallCapModel(language, CrossAttentionConfig(32, 24, heads=4, head_width=2))


def adapters(language: GPT2LMHeadModel) -> CaptionModel:
    return ITuningModel(language, AdapterConfig(32, 24, 16, 2))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [cross_attention, adapters])
def test_packed_captions_have_the_loss_and_gradients_of_rows_of_their_own(
    language: LanguageModel, make: Any, attention: str
) -> None:
    gpt2 = copy.deepcopy(language.model)
    gpt2.set_attn_implementation(attention)
    model = randomise(make(gpt2.double()))  # in single precision the order of the sums is seen
    model.adapters.double()
    visual = torch.randn(3, 17, 24, dtype=torch.float64)

    def measure(batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor], float | None]:
        model.zero_grad()
        loss = model.loss(batch.input_ids, batch.mask, visual, 0.1, batch.packing)
        loss.backward()  # type: ignore[no-untyped-call]
        entropy = model.attention_entropy(batch.input_ids, batch.mask, visual, batch.packing)
        return loss.detach(), [w.grad for w in model.adapters.parameters() if w.grad is not None], entropy

    rows, packed = make_batch(RECORDS, [False] * 3), pack_batch(RECORDS, [False] * 3)
    assert rows.targets == packed.targets == 20
    assert packed.input_ids.shape == (3, 16)
    expected, found = measure(rows), measure(packed)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert len(found[1]) == len(expected[1]) > 8
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert found[2] == pytest.approx(expected[2], rel=1e-5)
    # The last token needs no position.
    assert packed.packing is not None
    assert packed.packing.positions.max() == 5 + 5 - 2
    # And what another caption of the image says is not seen.
    other = replace(RECORDS[0], captions=(RECORDS[0].captions[0], (77, 0), RECORDS[0].captions[2]))
    changed = pack_batch([other, *RECORDS[1:]], [False] * 3)
    only = torch.zeros_like(packed.mask)
    only[0, -5:] = True
    losses = [model.loss(batch.input_ids, only, visual, 0, batch.packing).item() for batch in (packed, changed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# Settings


def test_conflicting_settings_are_named_by_their_flag() -> None:
    for named, settings in (
        (["--method smallcap", "--datastore"], {"method": "smallcap"}),
        (["--retrieve 4"], {"retrieve": 4}),
        (["--retrieve 0"], {"retrieve": 0, "datastore": "store"}),
        (["--prompt", "--datastore"], {"prompt": "a photo of ", "datastore": "store"}),
        (["--bottleneck", "smallcap"], {"method": "smallcap", "retrieve": 0, "bottleneck": 8}),
        (["--attention-width", "i-tuning"], {"attention_width": 8}),
        (["--attention-width", "0"], {"method": "smallcap", "retrieve": 0, "attention_width": 0}),
        (["--retrieve", "-1"], {"datastore": "store", "retrieve": -1}),
        (["--heads", "0"], {"heads": 0}),
    ):
        with refused(ConfigError, *named):
            resolve("small-data", **settings)  # type: ignore[arg-type]


def test_the_preset_is_the_papers() -> None:
    config = resolve("smallcap", datastore="store")
    assert (config.method, config.learning_rate, config.batch_size, config.epochs) == ("smallcap", 1e-4, 64, 10)
    assert (config.heads, config.attention_width, config.retrieved, config.num_beams) == (None, 16, 4, 3)
    assert config.max_caption_tokens == 25
    switched = resolve("small-data", method="smallcap", datastore="store", retrieve=2, heads=12)
    assert (switched.num_beams, switched.retrieved, switched.heads) == (3, 2, 12)
    assert resolve("smallcap", method="i-tuning").heads == 1


# Training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """Twelve photos with two captions each, and a datastore of them."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(12):
        random_photo(i).save(folder / f"{i}.png")
        texts = [CAPTIONS[i % 6], f"Number {i} of {CAPTIONS[(i + 1) % 6]}"]
        lines.append(json.dumps({"image": f"{i}.png", "captions": texts, "id": str(i)}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    build_datastore(CaptionSource(captions=folder / "captions.jsonl"), str(clip_folder), folder / "store")
    return folder


@pytest.fixture(scope="module")
def long_language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("language") / "gpt2", n_positions=320)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["itune-train", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    code = done.value.code
    return (code if isinstance(code, int) else int(bool(code))), capsys.readouterr().err


@pytest.mark.parametrize("method", ["smallcap", "i-tuning"])
def test_trained_with_retrieved_captions_from_the_command_line(
    method: str,
    data: Path,
    long_language: Path,
    clip_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = [
        *("--preset", "small-data", "--data", data / "captions.jsonl", "--dev-fraction", "0.3", "--precision", "fp32"),
        *("--batch-size", "8", "--images-per-forward", "2", "--max-new-tokens", "6"),
        *("--cache-features", tmp_path / "f"),
        *("--learning-rate", "0.01", "--datastore", data / "store", "--flip"),
    ]
    parts = ["--language-model", long_language, "--vision", clip_folder]
    first = [*common, *parts, "--method", method, "--retrieve", "2", "-o", tmp_path / "run", "--epochs", "4"]
    code, stderr = run(monkeypatch, capsys, *first)
    assert code == 0, stderr
    assert "2.00 of 2" in stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4]
    config = json.loads((tmp_path / "run" / "best" / "itune.json").read_text())
    assert (config["method"], config["retrieval"]["k"], config["training"]["datastore"]["captions"]) == (method, 2, 24)
    assert str(data) not in json.dumps(config), "a path of this machine is in the model"

    # The run goes on, and another from it, with the captions that it was trained with.
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved | {"epochs": 5}))
    code, stderr = run(monkeypatch, capsys, *common, "-o", tmp_path / "run", "--resume", "--retrieve", "2")
    assert code == 0, stderr
    again = [*common, "--init-from", tmp_path / "run", "--epochs", "1"]
    code, stderr = run(monkeypatch, capsys, *again, "-o", tmp_path / "again")
    assert code == 0, stderr
    assert json.loads((tmp_path / "again" / "last" / "itune.json").read_text())["retrieval"]["k"] == 2
    # Self-critical training packs the captions that it draws.
    code, stderr = run(monkeypatch, capsys, *again, "--preset", "scst", "-o", tmp_path / "scst")
    assert code == 0, stderr
    assert json.loads((tmp_path / "scst" / "config.json").read_text())["objective"] == "scst"
    without = [argument for argument in again if argument not in ("--datastore", data / "store")]
    code, stderr = run(monkeypatch, capsys, *without, "-o", tmp_path / "without")
    assert code == 2
    assert "--init-from" in stderr
    assert "--datastore" in stderr

    captioner = load_captioner(tmp_path / "run", datastore=data / "store")
    found = captioner.caption([data / "0.png", data / "1.png"], num_beams=2, max_new_tokens=6)
    assert [len(each.retrieved or ()) for each in found] == [2, 2]
    with refused(DatastoreError, tmp_path / "run"):
        load_captioner(tmp_path / "run")
    assert load_captioner(tmp_path / "run", retrieve=0).caption(data / "0.png", max_new_tokens=4).retrieved == ()


def test_prompts_leave_out_a_photos_own_captions_and_what_has_no_room(
    data: Path, long_language: Path, clip_folder: Path
) -> None:
    records = load_records(data / "captions.jsonl")
    features = Features(load_vision_tower(str(clip_folder)))
    language, text = load_language_model(str(long_language)), TextSettings()
    split = TrainingData({"train": records[:8]}, {"dev": records[8:]}, features)

    def prepare(**settings: object) -> Prompting:
        config = resolve("small-data", **{"vision": str(clip_folder), "datastore": str(data / "store"), **settings})
        return prepare_prompts(config, text, language, features.tower, split)

    everything = prepare(retrieve=4)
    assert everything.captions == 4
    for record in records:
        begin, *ids = everything.prompts[record.image]
        prompt = language.tokenizer.decode(ids)
        assert begin == 0
        assert prompt.startswith("Similar images show\n\n")
        assert prompt.endswith(".\n\nThis image shows ")
        own = [caption for caption in record.captions if f"\n\n{caption.rstrip(' .')}" in prompt]
        # What another photo says as well is left out in training only.
        assert own == [] if record in records[:8] else record.captions[1] not in own
    few = prepare(retrieve=4, max_new_tokens=260)
    longest = max(map(len, few.prompts.values()))
    assert longest <= 320 - 260 + 1 < max(map(len, everything.prompts.values()))
    assert few.captions < 4
    for too_long in (315, 320):
        with pytest.raises(SearchError):
            prepare(max_new_tokens=too_long)
    batch = pack_batch(tokenize(records[:8], language.tokenizer, text, 64, prompts=few.prompts), [False] * 8)
    assert batch.packing is not None
    assert batch.packing.positions.max() < 320
