"""SmallCap exported: the graphs compute what eager PyTorch does, in every precision, and come back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from itune.backbones import load_language_model, load_vision_tower
from itune.checkpoint import WEIGHTS_FILE, ModelSource, VisionSource, save_config
from itune.export.bundle import export_bundle
from itune.export.options import ExportOptions
from itune.export.restore import restore_bundle
from itune.export.verify.report import Check
from itune.loading import LoadedCheckpoint, load_captioner
from itune.methods.smallcap.model import CrossAttentionConfig, SmallCapModel
from itune.methods.smallcap.settings import SmallCapCheckpoint
from itune.retrieval.build import build_datastore
from itune.retrieval.encoder import load_head
from itune.retrieval.options import CaptionSource
from itune.runtime import Captioner, ItuneError
from itune.runtime.errors import DatastoreError
from itune.runtime.image import decode, preprocess
from itune.runtime.search import SearchConfig
from itune.runtime.settings import RetrievalSettings, TextSettings
from tests.conftest import CAPTIONS, REPOSITORY, assert_same_weights, make_language_model, random_photo
from tests.export.fixtures import EACH_ENGINE, int8_codes


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photos with captions of very different lengths."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for i in range(24):
        random_photo(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "captions": [CAPTIONS[i % 6], f"photo {'very ' * (i % 7)}{i}"]}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return [folder / f"{i}.png" for i in range(8)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, photos: list[Path], clip_folder: Path) -> Path:
    store = tmp_path_factory.mktemp("stores") / "store"
    build_datastore(CaptionSource(captions=photos[0].with_name("captions.jsonl")), str(clip_folder), store)
    return store


def save_smallcap(folder: Path, clip_folder: Path, **language_model: Any) -> Path:
    """Random cross-attention, its norm included, of heads that are neither GPT-2's in number nor in width."""
    language_folder = make_language_model(folder / "language-model", n_positions=300, width=128, **language_model)
    language, tower = load_language_model(str(language_folder)), load_vision_tower(str(clip_folder))
    model = SmallCapModel(language.model, CrossAttentionConfig(128, tower.width, heads=6, head_width=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in sorted(model.adapters.named_parameters()):  # whatever order the modules are declared in
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.ndim > 1 else 0.2))
        for layer in model.layers:
            layer.norm.weight.add_(1)
    model.save_adapters(folder / "checkpoint" / WEIGHTS_FILE)
    config = SmallCapCheckpoint(
        language_model=ModelSource.of_language_model(language, str(language_folder), folder / "checkpoint"),
        vision=VisionSource.of_tower(tower, str(clip_folder), folder / "checkpoint"),
        heads=6,
        attention_width=8,
        image=tower.image,
        text=TextSettings(),
        retrieval=RetrievalSettings(k=3, encoder=load_head(tower, "../vision").encoder),
        training={"num_beams": 3, "max_new_tokens": 12},
    )
    save_config(config, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    return save_smallcap(tmp_path_factory.mktemp("smallcap"), clip_folder)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict[str, Path]:
    """A bundle in every precision."""
    folder = tmp_path_factory.mktemp("bundles")
    for precision in ("fp32", "fp16", "int8", "int4"):
        export_bundle(checkpoint, folder / precision, ExportOptions(precision=precision, verify=False))  # type: ignore[arg-type]
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    "precision",
    [pytest.param(p, marks=[pytest.mark.slow] if p != "int8" else []) for p in ("fp32", "fp16", "int8", "int4")],
)
def test_the_export_verifies_itself(precision: Any, tmp_path: Path, checkpoint: Path, clip_folder: Path) -> None:
    if precision == "int4":  # which adds up over the layers where weights are as loud as the others'
        checkpoint = save_smallcap(tmp_path, clip_folder, initializer_range=0.1)
    checks: list[Check] = []
    export_bundle(checkpoint, tmp_path / "bundle", ExportOptions(precision=precision), report=checks.extend)
    assert all(check.passed for check in checks)
    assert {"visual.0.keys", "visual.2.values", "visual.embedding"} <= {check.output for check in checks}


@EACH_ENGINE
def test_captions_are_those_of_pytorch_alone_and_beside_other_prompts(
    engine: str, bundles: dict[str, Path], checkpoint: Path, store: Path, photos: list[Path]
) -> None:
    captioner = Captioner.load(bundles["fp32"], datastore=store, engine=engine, threads=1)
    eager = load_captioner(checkpoint, datastore=store).caption(photos, num_beams=3, max_new_tokens=12)
    together = captioner.caption(photos, batch_size=8)  # beam 3 and 12 tokens, as in training
    lengths = {len(" ".join(each.retrieved or ())) for each in together}
    assert len(lengths) > 3, "prompts of one length prove nothing"
    assert len({each.tokens for each in together}) > 3, "captions that are all alike prove nothing"
    for size in (1, 3):
        for mine, theirs in zip(captioner.caption(photos, batch_size=size), together, strict=True):
            assert (mine.tokens, mine.retrieved) == (theirs.tokens, theirs.retrieved)
            assert mine.score == pytest.approx(theirs.score, abs=1e-4)
    for mine, theirs in zip(eager, together, strict=True):
        assert (mine.tokens, mine.retrieved) == (theirs.tokens, theirs.retrieved)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_smaller_precisions_do_not_mix_a_batchs_images(
    precision: str, bundles: dict[str, Path], store: Path, photos: list[Path]
) -> None:
    captioner = Captioner.load(bundles[precision], datastore=store, threads=1)
    alone, together = (captioner.caption(photos, batch_size=size) for size in (1, 8))
    for mine, theirs in zip(alone, together, strict=True):
        assert mine.tokens == theirs.tokens
        # Integers turn the last bit of a sum, which padding moves, into hundredths (see `search`).
        assert mine.score == pytest.approx(theirs.score, abs=3e-6)


def test_another_datastore_changes_the_captions_without_training(
    tmp_path: Path, bundles: dict[str, Path], store: Path, photos: list[Path], clip_folder: Path
) -> None:
    lines = [json.dumps({"image": str(photo), "captions": [f"something else {i}"]}) for i, photo in enumerate(photos)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    build_datastore(CaptionSource(captions=tmp_path / "captions.jsonl"), str(clip_folder), tmp_path / "store")
    found = [
        [each.tokens for each in Captioner.load(bundles["fp32"], datastore=path, retrieve=k).caption(photos)]
        for path, k in ((store, None), (tmp_path / "store", None), (None, 0))
    ]
    assert found[0] != found[1] != found[2] != found[0]
    with pytest.raises(DatastoreError) as error:
        Captioner.load(bundles["fp32"])
    assert str(bundles["fp32"]) in str(error.value)
    shutil.copytree(bundles["fp32"], tmp_path / "bundle")
    shutil.copytree(store, tmp_path / "bundle" / "datastore")
    assert [each.tokens for each in Captioner.load(tmp_path / "bundle").caption(photos)] == found[0]


def test_heatmaps_are_those_of_the_retrieved_prompt(
    bundles: dict[str, Path], checkpoint: Path, store: Path, photos: list[Path]
) -> None:
    captioner, loaded = Captioner.load(bundles["fp32"], datastore=store, threads=1), LoadedCheckpoint.load(checkpoint)
    model, writer = loaded.model, captioner.retriever.writer  # type: ignore[union-attr]
    for photo in photos[:2]:
        own = captioner.caption(photo)
        head = [captioner.tokens.begin, *writer.write(own.retrieved or (), 200)[0]]
        visual = loaded.tower.embed(preprocess(decode(photo), loaded.config.image)[None])
        weights: list[torch.Tensor] = []
        with torch.inference_mode(), model.looking_at(model.project(visual)), model.recording(weights):
            model.language_model(torch.tensor([[*head, *own.tokens]]))
        for layer in (0, 2):
            expected = weights[layer][0].mean(0)[len(head) - 1 : -1]
            found = captioner.explain(photo, layer=layer)
            assert found.token_ids == own.tokens
            np.testing.assert_allclose(found.attention, expected, atol=1e-5)


def test_every_weight_comes_back(tmp_path: Path, bundles: dict[str, Path], checkpoint: Path) -> None:
    restore_bundle(bundles["fp32"], tmp_path / "restored")
    before, after = LoadedCheckpoint.load(checkpoint), LoadedCheckpoint.load(tmp_path / "restored" / "checkpoint")
    assert before.config.retrieval is not None
    assert after.config.retrieval is not None
    assert after.config.retrieval.encoder.sha256 == after.config.vision.sha256  # it is another tower to a datastore
    assert after.config.retrieval.encoder.source == "../vision"
    left_out = {"encoder": {"sha256", "source"}}
    assert after.config.retrieval.model_dump(exclude=left_out) == before.config.retrieval.model_dump(exclude=left_out)
    assert_same_weights(after, before)
    # Exported again in int8, the integers are the same.
    restore_bundle(bundles["int8"], tmp_path / "small")
    export_bundle(tmp_path / "small" / "checkpoint", tmp_path / "again", ExportOptions(precision="int8", verify=False))
    before_codes, after_codes = int8_codes(bundles["int8"]), int8_codes(tmp_path / "again")
    assert before_codes.keys() == after_codes.keys()
    for key, array in before_codes.items():
        np.testing.assert_array_equal(after_codes[key], array, err_msg=key)


def test_benchmarks_use_prompts_of_retrieved_captions(
    bundles: dict[str, Path], checkpoint: Path, store: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.parity import compare

    for datastore in (store, None):
        for row in compare(checkpoint, bundles["fp32"], photos, [1, 3], 8, datastore):
            assert row["identical"] == row["photos"] == row["exchanged"] == row["paired"] == len(photos)
            assert row["distinct"] > 3
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import latency

    task = latency.make_task(bundles["fp32"], 3, 8)
    empty = Captioner.load(bundles["fp32"], retrieve=0).prompts(SimpleNamespace(images=1), SearchConfig())[0][0]
    assert len(task.prompt) > len(empty) + 3 * 10
    assert task.prompt[0] == task.end == 0


def test_options_that_retrieval_does_not_support_are_named(
    tmp_path: Path, checkpoint: Path, photos: list[Path]
) -> None:
    for flag, options in (
        ("--target tensorrt", ExportOptions(target="tensorrt")),
        ("--vocabulary", ExportOptions(vocabulary="5", data=photos[0])),
    ):
        with pytest.raises(ItuneError) as error:
            export_bundle(checkpoint, tmp_path / "bundle", options)
        assert flag in str(error.value)
