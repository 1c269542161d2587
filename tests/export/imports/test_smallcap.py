"""A published SmallCap checkpoint, imported: it is what transformers computes of the same tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from itune.backbones import load_language_model, load_vision_tower
from itune.checkpoint import CheckpointError
from itune.cli.train import _inherit
from itune.export.bundle import export_bundle
from itune.export.imports.checkpoint import import_checkpoint
from itune.export.options import ExportOptions, ImportOptions
from itune.loading import LoadedCheckpoint, load_captioner
from itune.methods.registry import MODELS
from itune.retrieval.build import build_datastore
from itune.retrieval.options import CaptionSource
from itune.runtime import Captioner
from itune.runtime.image import decode, preprocess
from itune.training.config import resolve
from tests.conftest import CAPTIONS, make_clip, make_language_model, random_photo

WIDTH = 32
PROMPT = "Similar images show\n\nA dog runs.\n\nThis image shows "


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    language = make_language_model(folder / "gpt2", n_positions=200, width=WIDTH)
    return language, make_clip(folder / "clip", hidden_size=WIDTH)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, parts: tuple[Path, Path]) -> tuple[Path, GPT2LMHeadModel]:
    """A file of that layout, buffers of old releases included, and the decoder in it as transformers has it."""
    language, vision = parts
    torch.manual_seed(3)
    decoder = GPT2LMHeadModel.from_pretrained(language, add_cross_attention=True).eval()
    state: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if "crossattention" in name:
                weight.normal_(std=0.4)
    for name, tensor in decoder.state_dict().items():
        state[f"decoder.{name}"] = tensor.clone()
    for i in range(3):
        for module in ("attn", "crossattention"):
            state[f"decoder.transformer.h.{i}.{module}.bias"] = torch.ones(1, 1, 200, 200).tril().byte()
            state[f"decoder.transformer.h.{i}.{module}.masked_bias"] = torch.tensor(-1e4)
    for name, tensor in load_vision_tower(str(vision)).model.state_dict().items():  # type: ignore[union-attr]
        state[f"encoder.{name.removeprefix('vision_model.')}"] = tensor.clone()
    folder = tmp_path_factory.mktemp("published")
    torch.save(state, folder / "pytorch_model.bin")
    save_file(state, folder / "model.safetensors")
    # As save_pretrained writes it: weights that are tied are there once.
    save_file({name: state[name] for name in state if "lm_head" not in name}, folder / "tied.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "smallcap", "k": 1, "rag": True}))
    return folder, decoder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tied.safetensors"])
def test_an_imported_checkpoint_writes_what_transformers_generates(
    name: str, published: tuple[Path, GPT2LMHeadModel], parts: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, decoder = published
    language, vision = parts
    import_checkpoint(
        folder / name, tmp_path / "imported", ImportOptions(language_model=str(language), vision=str(vision))
    )
    loaded = LoadedCheckpoint.load(tmp_path / "imported")
    assert loaded.config.retrieval is not None
    assert (loaded.config.retrieval.k, loaded.config.text.begin, loaded.config.text.end) == (1, None, ".")
    assert not (tmp_path / "imported" / "language-model").exists(), "the language model is the one that is named"
    photos = [random_photo(i) for i in range(4)]
    visual = loaded.tower.embed(preprocess(decode(photos[0]), loaded.tower.image)[None])
    ids = torch.tensor([loaded.language.tokenizer.encode(PROMPT).ids])
    with torch.no_grad(), loaded.model.looking_at(loaded.model.project(visual)):
        logits = loaded.model.language_model(ids).logits
    torch.testing.assert_close(logits, decoder(ids, encoder_hidden_states=visual).logits, rtol=1e-5, atol=1e-4)

    lines = [json.dumps({"image": f"{i}.png", "captions": [CAPTIONS[i]]}) for i in range(4)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    build_datastore(CaptionSource(captions=tmp_path / "captions.jsonl"), str(vision), tmp_path / "store")
    export_bundle(tmp_path / "imported", tmp_path / "bundle", ExportOptions(verify=False))
    captioner = Captioner.load(tmp_path / "bundle", datastore=tmp_path / "store", threads=1)
    assert captioner.search.model_dump() == captioner.search.model_dump() | {
        "num_beams": 3, "max_new_tokens": 25, "length_penalty": 0.0, "early_stopping": True
    }  # fmt: skip
    found = captioner.caption(photos)
    end = loaded.language.tokenizer.token_to_id(".")
    for i, mine in enumerate(found):
        pixels = preprocess(decode(photos[i]), loaded.tower.image)[None]
        assert mine.retrieved is not None
        (similar,) = mine.retrieved
        text = f"Similar images show\n\n{similar.lower().rstrip(' .')}.\n\nThis image shows "
        prompt = torch.tensor([loaded.language.tokenizer.encode(text).ids])
        options: Any = {"max_new_tokens": 25, "num_beams": 3, "length_penalty": 0.0, "early_stopping": True}
        theirs = decoder.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            encoder_hidden_states=loaded.tower.embed(pixels),
            eos_token_id=end,
            pad_token_id=end,
            do_sample=False,
            **options,
        )[0, prompt.shape[1] :].tolist()
        assert list(mine.tokens) == theirs[: [*theirs, end].index(end)]
    eager = load_captioner(tmp_path / "imported", datastore=tmp_path / "store")
    assert [each.tokens for each in eager.caption(photos)] == [each.tokens for each in found]
    inherited = _inherit({"datastore": str(tmp_path / "store")}, tmp_path / "imported")
    config = resolve("small-data", **inherited)
    text = MODELS["smallcap"].text(config)
    assert (text.begin, text.end) == (None, "."), "training it further goes on with the same tokens"


def test_what_does_not_fit_is_named(
    published: tuple[Path, GPT2LMHeadModel], parts: tuple[Path, Path], tmp_path: Path
) -> None:
    (folder, _), (language, vision) = published, parts
    file = folder / "pytorch_model.bin"

    def refused(source: Path, *values: str, language_model: Path = language, tower: Path = vision) -> None:
        with pytest.raises(CheckpointError) as caught:
            import_checkpoint(
                source, tmp_path / "x", ImportOptions(language_model=str(language_model), vision=str(tower))
            )
        assert all(value in str(caught.value) for value in (str(source), *values)), caught.value
        assert not (tmp_path / "x").exists()

    refused(file, "encoder.", "--vision", tower=make_clip(tmp_path / "other", hidden_size=WIDTH, seed=9))
    two_layers = make_language_model(tmp_path / "gpt2", layers=2, width=WIDTH)
    refused(file, "decoder.transformer.h.2.", "--language-model", language_model=two_layers)
    state = torch.load(file, weights_only=True)
    trained = {name: tensor for name, tensor in state.items() if "crossattention" in name}
    torch.save(trained, tmp_path / "trained.bin")
    import_checkpoint(
        tmp_path / "trained.bin", tmp_path / "trained", ImportOptions(language_model=str(language), vision=str(vision))
    )
    model, own = LoadedCheckpoint.load(tmp_path / "trained").model, load_language_model(str(language)).model
    assert model.adapter_state()["layers.2.norm.weight"].eq(1).all()
    assert torch.equal(model.language_model.lm_head.weight, own.lm_head.weight)
    trained_bin, part = tmp_path / "trained.bin", tmp_path / "part.bin"
    refused(trained_bin, "crossattention.c_attn.weight", "[32, ", "[24, ", tower=make_clip(tmp_path / "narrow"))
    del trained["decoder.transformer.h.1.crossattention.c_proj.weight"]
    torch.save(trained, part)
    refused(part, "decoder.transformer.h.1.crossattention.c_proj.weight")

    def changed(name: str, change: Callable[[Tensor], Tensor]) -> Path:
        torch.save({n: change(t) if name in n else t for n, t in state.items()}, tmp_path / "changed.bin")
        return tmp_path / "changed.bin"

    query, key_value = "crossattention.q_attn", "h.0.crossattention.c_attn.bias"
    refused(changed(query, lambda t: t[..., :-1].clone()), "h.0.crossattention.")
    refused(changed(f"{query}.weight", lambda t: t[0].clone()), f"h.0.{query}.weight")
    refused(changed(key_value, lambda t: t / 0), key_value, "finite")
    refused(changed("h.2.crossattention.c_attn", lambda t: t[..., :-2].clone()), "h.2.crossattention.c_attn.")
