from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from itune.backbones import BackboneError, ClipTower, OnnxTower
from itune.export.graph.builder import Graph
from itune.export.graph.clip import append_clip, fold_clip, unfold_clip
from itune.export.graph.onnx_tower import append_onnx
from itune.export.methods.registry import METHODS, build_vision
from itune.loading import LoadedCheckpoint
from itune.runtime.bundle import DecoderSettings
from tests.export.fixtures import SIDE


def eager_visual(checkpoint: LoadedCheckpoint, pixels) -> dict[str, np.ndarray]:
    """What the graph should give, by the adapters' own equations."""
    config, expected = checkpoint.model.config, {}
    with torch.inference_mode():
        for name, projected in checkpoint.model.project(checkpoint.tower.embed(pixels)).items():
            by_head = projected.reshape(*projected.shape[:2], config.heads, -1)
            permutation = (0, 2, 3, 1) if name.endswith("keys") else (0, 2, 1, 3)
            expected[f"visual.{name}"] = by_head.permute(permutation).numpy()
    return expected


def run(path: Path, pixels) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixels": pixels}), strict=True))


@pytest.mark.parametrize("kind", ["clip", "onnx"])
def test_graph_matches_eager(kind, request, tmp_path, pixels):
    checkpoint = LoadedCheckpoint.load(request.getfixturevalue(f"{kind}_checkpoint"))
    build_vision(checkpoint.model, checkpoint.tower).save(tmp_path / "vision.onnx")
    model = onnx.load(tmp_path / "vision.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 20)}

    found, expected = run(tmp_path / "vision.onnx", pixels), eager_visual(checkpoint, pixels)
    assert found.keys() == expected.keys() == {f"visual.{i}.{p}" for i in (1, 2) for p in ("keys", "values")}
    for name, value in expected.items():
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, atol=2e-5 * np.abs(value).max(), err_msg=name)
        assert np.abs(value[0] - value[1]).max() > 0.1 * np.abs(value).max()  # the image matters


def test_projections_split_again(clip_checkpoint):
    loaded = LoadedCheckpoint.load(clip_checkpoint)
    model, method = loaded.model, METHODS["i-tuning"]
    settings = DecoderSettings.model_construct(**method.settings(model))
    tensors = method.split_vision(settings, build_vision(model, loaded.tower).weights)
    state = model.adapter_state()
    assert tensors.keys() == {name for name in state if ".key." in name or ".value." in name}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, state[name].numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("hidden_act", "side"),
    [("quick_gelu", 32), ("gelu", 32), ("gelu_pytorch_tanh", 32), ("silu", 32), ("relu", 36)],
)
def test_clip_variants_match_transformers(hidden_act, side, tmp_path):
    """36 is no multiple of the patch size: the convolution leaves the last rows and columns out."""
    torch.manual_seed(0)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side,
            patch_size=8,
            hidden_act=hidden_act,
            layer_norm_eps=1e-3,
            initializer_range=0.3,
        )
    )
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"height": side, "width": side},
                "do_center_crop": False,
                "image_mean": [0.5, 0.4, 0.3],
                "image_std": [0.2, 0.3, 0.4],
            }
        )
    )
    tower = ClipTower(tmp_path)
    graph = Graph("tower")
    graph.input("pixels", np.uint8, ("images", side, side, 3))
    graph.output(append_clip(graph, "pixels", tower), np.float32, ("images", tower.tokens, tower.width))
    graph.save(tmp_path / "tower.onnx")

    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    (found,) = run(tmp_path / "tower.onnx", pixels).values()
    np.testing.assert_allclose(found, tower.embed(pixels).numpy(), atol=2e-5)


def test_clip_unfolds_again(clip_tower):
    tower = ClipTower(clip_tower)
    state = {name: tensor.numpy() for name, tensor in tower.model.state_dict().items()}
    weights = fold_clip(state, tower.model.config, tower.image)
    unfolded = unfold_clip(weights, tower.model.config, tower.image)
    assert unfolded.keys() == state.keys()
    for name, array in state.items():
        if not name.startswith("post_layernorm"):
            np.testing.assert_allclose(unfolded[name], array, rtol=3e-7, err_msg=name)


def test_tower_that_cannot_be_converted_is_refused(onnx_tower, tmp_path):
    model = onnx.load(onnx_tower / "model.onnx")
    model.opset_import[0].version = 2  # its Reshape took the shape as an attribute
    tower = OnnxTower(onnx_tower / "model.onnx")
    tower.file = tmp_path / "old.onnx"
    onnx.save(model, tower.file)
    with pytest.raises(BackboneError) as error:
        append_onnx(Graph("g"), "pixels", tower)
    assert "old.onnx" in str(error.value)
    assert "opset 20" in str(error.value)


@pytest.mark.parametrize("written_in", [False, True])
def test_tower_declared_for_one_image(written_in, onnx_tower, tmp_path, pixels):
    """It works for several unless a shape inside says otherwise."""
    model = onnx.load(onnx_tower / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    if written_in:
        reshape = next(node for node in model.graph.node if node.op_type == "Reshape")
        shape = next(tensor for tensor in model.graph.initializer if tensor.name == reshape.input[1])
        shape.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 24, 16]), shape.name))
    onnx.save(model, tmp_path / "model.onnx")
    tower = OnnxTower(tmp_path / "model.onnx", OnnxTower(onnx_tower / "model.onnx").image)
    graph = Graph("tower")
    graph.input("pixels", np.uint8, ("images", 32, 32, 3))
    if written_in:
        with pytest.raises(BackboneError) as error:
            append_onnx(graph, "pixels", tower)
        assert "model.onnx" in str(error.value)
        return
    graph.output(append_onnx(graph, "pixels", tower), np.float32, ("images", 16, 24))
    graph.save(tmp_path / "spliced.onnx")
    (found,) = run(tmp_path / "spliced.onnx", pixels).values()
    np.testing.assert_allclose(found, tower.embed(pixels).numpy(), atol=1e-5)


def test_tower_keeps_its_names_when_they_are_canonical(onnx_tower, tmp_path):
    """A restored tower can be exported again without growing."""
    model = onnx.load(onnx_tower / "model.onnx")
    for node in model.graph.node:
        node.input[:] = ["pixel_values" if name == "image" else name for name in node.input]
        node.output[:] = ["last_hidden_state" if name == "features" else name for name in node.output]
    model.graph.input[0].name, model.graph.output[0].name = "pixel_values", "last_hidden_state"
    onnx.save(model, tmp_path / "model.onnx")
    graph = Graph("g")
    graph.input("pixels", np.uint8, ("images", 32, 32, 3))
    append_onnx(graph, "pixels", OnnxTower(tmp_path / "model.onnx", OnnxTower(onnx_tower / "model.onnx").image))
    assert [node.op_type for node in graph.nodes].count("Identity") == 0
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)


@pytest.mark.parametrize("location", ["model.onnx_data", "weights/part.bin", "[a] b"])
@pytest.mark.parametrize("linked", [False, True])
def test_external_data_of_a_tower_under_any_name_and_behind_links(onnx_tower, tmp_path, location, linked, pixels):
    folder = tmp_path / "tower"
    (folder / location).parent.mkdir(parents=True)
    for file in onnx_tower.iterdir():
        shutil.copy(file, folder)
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location=location, size_threshold=512)
    if linked:  # as in a hub's cache
        (tmp_path / "blobs").mkdir()
        for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
            blob = file.rename(tmp_path / "blobs" / str(number))
            file.symlink_to(os.path.relpath(blob, file.parent))
    plain, external = Graph("plain"), Graph("external")
    for graph, place in ((plain, onnx_tower), (external, folder)):
        append_onnx(graph, graph.input("pixels", np.uint8, ("images", SIDE, SIDE, 3)), OnnxTower(place / "model.onnx"))
    assert plain.weights.keys() == external.weights.keys()
    for name, weight in plain.weights.items():
        np.testing.assert_array_equal(weight, external.weights[name])
