"""ClipCap's graphs against eager PyTorch, in every precision; what a bundle says; restoring; TensorRT plans."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from itune.export.bundle import export_bundle
from itune.export.graph.builder import Graph
from itune.export.methods.clipcap import fold_mapper, unfold_mapper
from itune.export.options import ExportOptions
from itune.export.restore import restore_bundle
from itune.export.tensorrt import library as tensorrt
from itune.export.verify.compare import compare
from itune.export.verify.verification import write_reference
from itune.export.vocabulary import Vocabulary
from itune.loading import LoadedCheckpoint, eager_captioner
from itune.runtime import Captioner
from itune.runtime.bundle import Bundle
from tests.clipcap import SHAPES, save_clipcap
from tests.export.fixtures import EACH_ENGINE, int8_codes

CASES = ("transformer", "mlp", "projected", "onnx")
ALL = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, language_model: Path, clip_tower: Path, onnx_tower: Path
) -> dict[str, Path]:
    """Mappers of both kinds and all poolings; the ONNX tower's has a prompt, too."""
    folder = tmp_path_factory.mktemp("clipcap")
    found = {case: save_clipcap(folder / case, language_model, clip_tower, **SHAPES[case]) for case in SHAPES}
    return found | {"onnx": save_clipcap(folder / "onnx", language_model, onnx_tower, "a dog", **SHAPES["transformer"])}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> dict[str, Path]:
    """fp32 bundles of them."""
    folder = tmp_path_factory.mktemp("clipcap-bundles")
    for case, checkpoint in checkpoints.items():
        export_bundle(checkpoint, folder / case, ExportOptions(verify=False))
    return {case: folder / case for case in checkpoints}


def check(checkpoint: Path, bundle: Path, folder: Path, vocabulary: Any = None) -> set[str]:
    """The verification, in this process; the outputs that it compared."""
    folder.mkdir()
    write_reference(checkpoint, folder, None, vocabulary)
    checks = compare(bundle, folder)
    assert [check for check in checks if not check.passed] == []
    return {check.output for check in checks}


@ALL
def test_vision_graph_computes_the_mapper(
    case: str, checkpoints: dict[str, Path], bundles: dict[str, Path], pixels: Any
) -> None:
    loaded = LoadedCheckpoint.load(checkpoints[case])
    with torch.no_grad():
        expected = loaded.model.project(loaded.tower.embed(pixels))["prefix"].numpy()
    (found,) = ort.InferenceSession(bundles[case] / "vision.onnx").run(["visual.prefix"], {"pixels": pixels})
    assert np.std(expected, axis=0).mean() > 0.1, "the prefix ignores the image"
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


@ALL
@EACH_ENGINE
def test_captions_are_those_of_pytorch(
    engine: str, case: str, checkpoints: dict[str, Path], bundles: dict[str, Path], pixels: Any
) -> None:
    exported = Captioner.load(bundles[case], engine=engine)
    eager = eager_captioner(LoadedCheckpoint.load(checkpoints[case]))
    for num_beams, penalty in ((1, 1.0), (3, 1.3), (5, 1.0)):
        options: dict[str, Any] = {
            "num_beams": num_beams, "max_new_tokens": 12, "repetition_penalty": penalty, "no_repeat_ngram_size": 2
        }  # fmt: skip
        expected, found = (c.caption(list(pixels), **options) for c in (eager, exported))
        assert [caption.tokens for caption in found] == [caption.tokens for caption in expected]
        assert [c.score for c in found] == pytest.approx([c.score for c in expected], abs=1e-4)
        assert len({caption.tokens for caption in expected}) >= 5


@pytest.mark.parametrize(
    ("case", "precision"),
    [("transformer", "fp32"), ("projected", "int8"), ("mlp", "int8"), ("onnx", "int8"), ("transformer", "int4")],
)
def test_each_precision_is_verified_against_pytorch(
    case: str, precision: Any, checkpoints: dict[str, Path], tmp_path: Path, pixels: Any
) -> None:
    export_bundle(checkpoints[case], tmp_path / "b", ExportOptions(precision=precision, verify=False))
    compared = check(checkpoints[case], tmp_path / "b", tmp_path / "r")
    assert {"visual.prefix", "neighbours: visual", "logits with past"} <= compared
    if precision != "fp32":
        integers = [name for name in Graph.load(tmp_path / "b" / "vision.onnx").weights if name.endswith(".int8")]
        mapper = [name for name in integers if name.startswith("visual.mapper.")]
        assert len(mapper) == {"transformer": 9, "projected": 5, "mlp": 2, "onnx": 9}[case]
        captioner = Captioner.load(tmp_path / "b")
        together = captioner.caption(list(pixels[:4]), num_beams=3, max_new_tokens=8)
        alone = [captioner.caption(image, num_beams=3, max_new_tokens=8) for image in pixels[:4]]
        assert [caption.tokens for caption in together] == [caption.tokens for caption in alone]


def test_swapped_visual_states_swap_the_captions(bundles: dict[str, Path], pixels: Any) -> None:
    captioner = Captioner.load(bundles["transformer"])
    first, second = captioner.caption([pixels[0], pixels[2]])
    assert first.tokens != second.tokens
    engine: Any = captioner.engine
    encode = engine.encode

    def swapped(images: Any) -> Any:
        state = encode(images)
        state.keep(np.array([1, 0]))
        return state

    engine.encode = swapped
    assert [c.tokens for c in captioner.caption([pixels[0], pixels[2]])] == [second.tokens, first.tokens]


def test_manifest_and_card(bundles: dict[str, Path]) -> None:
    bundle = Bundle.load(bundles["onnx"])
    manifest, tokens = bundle.manifest, bundle.manifest.tokens
    assert (manifest.method, tokens.prefix, tokens.begin) == ("clipcap", 4, None)
    assert tokens.prompt_tokens == [*range(tokens.vocab_size, tokens.vocab_size + 4), *tokens.prompt]
    assert tokens.room == tokens.max_positions - 4 - len(tokens.prompt) + 1
    assert [(spec.name, spec.shape) for spec in manifest.graphs[0].outputs] == [("visual.prefix", ["images", 4, 64])]
    card = bundle.path("README.md").read_text(encoding="utf-8")
    assert "arXiv 2111.09734" in card
    assert "4 embeddings" in card


@ALL
def test_folding_is_exactly_undone(case: str, checkpoints: dict[str, Path]) -> None:
    state = {k: v.numpy() for k, v in LoadedCheckpoint.load(checkpoints[case]).model.adapter_state().items()}
    found = unfold_mapper(fold_mapper(state) | {"clip.weight": np.zeros(3)})
    assert found.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@ALL
def test_restored_checkpoints_are_what_they_were(
    case: str, checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    restore_bundle(bundles[case], tmp_path / "restored")
    before, after = LoadedCheckpoint.load(checkpoints[case]), LoadedCheckpoint.load(tmp_path / "restored/checkpoint")
    parts = {"language_model", "vision"}
    assert after.config.model_dump(exclude=parts) == before.config.model_dump(exclude=parts)
    for old, new in (
        (before.model.adapter_state(), after.model.adapter_state()),
        (before.language.model.state_dict(), after.language.model.state_dict()),
    ):
        assert old.keys() == new.keys()
        assert [name for name in old if not torch.equal(old[name], new[name])] == []


def test_a_restored_tower_has_its_projection(
    checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    from itune.backbones import load_clip_projection

    restore_bundle(bundles["projected"], tmp_path / "restored")
    state = LoadedCheckpoint.load(checkpoints["projected"]).model.adapter_state()
    projection = load_clip_projection(str(tmp_path / "restored" / "vision"))
    assert projection is not None
    assert torch.equal(projection.weight, state["projection.weight"])
    assert torch.equal(projection.norm_weight, state["projection.norm_weight"])
    restore_bundle(bundles["transformer"], tmp_path / "without")
    assert load_clip_projection(str(tmp_path / "without" / "vision")) is None


@pytest.mark.parametrize("case", ["transformer", "mlp"])
def test_int8_restores_to_the_same_integers(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    export_bundle(checkpoints[case], tmp_path / "bundle", ExportOptions(precision="int8", verify=False))
    restore_bundle(tmp_path / "bundle", tmp_path / "restored")
    export_bundle(
        tmp_path / "restored" / "checkpoint", tmp_path / "again", ExportOptions(precision="int8", verify=False)
    )
    before, after = int8_codes(tmp_path / "bundle"), int8_codes(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)


def test_a_shortlist_is_verified_and_used(checkpoints: dict[str, Path], tmp_path: Path, pixels: Any) -> None:
    (tmp_path / "words.txt").write_text("a dog runs\ntwo men in red shirts\n")
    manifest = export_bundle(
        checkpoints["transformer"], tmp_path / "b", ExportOptions(vocabulary=str(tmp_path / "words.txt"), verify=False)
    )
    loaded = LoadedCheckpoint.load(checkpoints["transformer"])
    words = Vocabulary.read(str(tmp_path / "words.txt"), None)
    kept = words.token_ids(loaded.language.tokenizer, manifest.text, manifest.tokens)
    assert manifest.tokens.shortlist == len(kept) < manifest.tokens.vocab_size
    check(checkpoints["transformer"], tmp_path / "b", tmp_path / "r", kept)
    assert len({c.tokens for c in Captioner.load(tmp_path / "b").caption(list(pixels), max_new_tokens=8)}) > 3


@pytest.mark.skipif(not any(map(importlib.util.find_spec, tensorrt.LIBRARIES)), reason="TensorRT is not installed")
@pytest.mark.parametrize("precision", ["fp16", pytest.param("int8", marks=pytest.mark.slow)])
def test_tensorrt_plans(precision: Any, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = ExportOptions(
        target="tensorrt",
        precision=precision,
        gpu="sm86",
        max_beams=4,
        max_batch=2,
        calibration_data=Path("random") if precision == "int8" else None,
        verify=False,
    )
    export_bundle(checkpoints["transformer"], tmp_path / "b", options, search={"max_new_tokens": 12})
    check(checkpoints["transformer"], tmp_path / "b", tmp_path / "r")
    bundle = Bundle.load(tmp_path / "b")
    plan = bundle.graph("decoder", "tensorrt").plan
    assert plan is not None
    profile = plan.profiles[0]
    assert (profile["visual.prefix"].min, profile["visual.prefix"].max) == ([1, 4, 64], [2, 4, 64])
    assert (profile["tokens"].min, profile["tokens"].max) == ([1, 1], [8, 4])
