"""Real plans, built without a GPU. They are never compared byte for byte, since no two builds are alike."""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from itune.export.bundle import export_bundle
from itune.export.graph.builder import Graph
from itune.export.options import ExportOptions
from itune.export.restore import restore_bundle
from itune.export.tensorrt import library as tensorrt
from itune.export.tensorrt import plans
from itune.export.tensorrt.library import Library, layer_table
from itune.export.tensorrt.plan_builder import Builder
from itune.export.tensorrt.plans import PlanWriter
from itune.runtime import Captioner
from itune.runtime.bundle import Bundle, default_bundle
from itune.runtime.errors import ItuneError
from itune.runtime.manifest import FileHash
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, tensorrt.LIBRARIES)), reason="TensorRT is not installed: no plan can be built"
)
GPUS = "sm86,sm89"


def export(
    checkpoint: Path, folder: Path, precision: str, *, vision: str | None = None, verify: bool = False, **options
) -> tuple[Bundle, dict]:
    """The bundle, and what TensorRT made of each graph by its role."""
    if "int8" in (precision, vision):
        options.setdefault("calibration_data", Path("random"))
    reports, checks = {}, []
    wanted = ExportOptions(
        target="tensorrt", precision=precision, vision_precision=vision, gpu=GPUS, max_beams=4, max_batch=2,
        verify=verify, **options
    )  # fmt: skip
    export_bundle(
        checkpoint,
        folder,
        wanted,
        search={"max_new_tokens": 12},
        report=checks.extend,
        report_plan=reports.__setitem__,
    )
    assert all(check.passed for check in checks)
    assert bool(checks) == verify
    return Bundle.load(folder), reports


@pytest.fixture(scope="module")
def bundles(clip_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return {precision: export(clip_checkpoint, folder / precision, precision) for precision in ("fp32", "fp16", "int8")}


@pytest.fixture(scope="module")
def onnx_bundles(onnx_checkpoint, photos, tmp_path_factory):
    """Verified bundles of the convolutional tower."""
    folder = tmp_path_factory.mktemp("plans")
    return {
        precision: export(onnx_checkpoint, folder / precision, precision, verify=True, **calibration)
        for precision, calibration in {"fp32": {}, "fp16": {}, "int8": {"calibration_data": photos[0].parent}}.items()
    }


@pytest.fixture
def only_parse(monkeypatch):
    """Plans that are parsed and not built, where nothing else is new about them."""

    def parse(request, _progress, report):
        found = Builder(Library.find(), request).parse()
        report(found)
        request.target.write_bytes(b"")

    monkeypatch.setattr(plans, "build_plan", parse)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_bundle_says_how_its_plans_were_built(bundles, precision):
    bundle, reports = bundles[precision]
    library = Library.find()
    assert {path.name for path in bundle.folder.iterdir()} == {
        "bundle.json", "README.md", "tokenizer.json", "vision.onnx", "decoder.onnx", "vision.plan", "decoder.plan"
    }  # fmt: skip
    for role in ("vision", "decoder"):
        entry, source = bundle.graph(role, "tensorrt"), bundle.graph(role, "onnxruntime")
        assert (entry.file, source.file, source.engine) == (f"{role}.plan", f"{role}.onnx", "any")
        assert entry.precision == source.precision == precision
        assert entry.target == GPUS
        assert bundle.path(entry.file).stat().st_size > 10_000
        plan = entry.plan
        assert (plan.flavour, plan.version) == (library.flavour, library.version)
        assert (plan.source, plan.source_sha256) == (source.file, FileHash.of(bundle.path(source.file)).sha256)
        assert entry.inputs == source.inputs
        assert {spec.name: spec.dtype for spec in entry.inputs} == reports[role].inputs
        assert {spec.name: spec.dtype for spec in entry.outputs} == reports[role].outputs
        assert plan.profiles[0].keys() == reports[role].inputs.keys()


@pytest.mark.parametrize(("precision", "cache"), [("fp32", "float32"), ("fp16", "float16"), ("int8", "float16")])
def test_types_of_inputs_and_outputs(bundles, precision, cache):
    _, reports = bundles[precision]
    decoder = reports["decoder"].inputs | reports["decoder"].outputs
    for name, dtype in {
        "tokens": "int64", "positions": "int64", "mask": "bool", "parents": "int64", "k": "int64",
        "past_key_values.2.key": cache, "present.2.value": cache, "visual.1.keys": cache,
        "logits": "float32", "token_ids": "int64", "logsumexp": "float32",
    }.items():  # fmt: skip
        assert decoder[name] == dtype, name
    assert reports["vision"].inputs == {"pixels": "uint8"}
    assert set(reports["vision"].outputs.values()) == {cache}


def test_profile_goes_from_an_empty_past_to_a_full_batch(bundles):
    bundle, _ = bundles["fp16"]
    (decoder,) = bundle.graph("decoder", "tensorrt").plan.profiles
    assert decoder["past_key_values.0.key"].min == [1, 4, 0, 16]
    assert decoder["past_key_values.0.key"].max == [8, 4, 13, 16]
    assert (decoder["tokens"].min, decoder["tokens"].max) == ([1, 1], [8, 1])
    assert decoder["mask"].max == [8, 14]
    assert (decoder["k"].min, decoder["k"].max) == ([1], [bundle.manifest.tokens.vocab_size])
    assert decoder["visual.1.values"].max == [2, 2, 17, 16]
    (vision,) = bundle.graph("vision", "tensorrt").plan.profiles
    assert (vision["pixels"].min[0], vision["pixels"].max[0]) == (1, 2)
    assert bundle.manifest.search.num_beams == 4  # the plans have room for no more
    assert bundle.manifest.search.max_new_tokens == 12


def test_layers_of_each_precision(bundles):
    layers = {precision: reports["decoder"].layers for precision, (_, reports) in bundles.items()}
    weights = {precision: reports["decoder"].weights for precision, (_, reports) in bundles.items()}
    assert layers["fp32"].keys() == {"float32", "other"}
    assert layers["fp16"]["float16"] > layers["fp16"]["float32"] > 0
    assert "int8" not in layers["fp16"]
    # Four products a layer and the head, and as many activations that are rounded for them.
    assert layers["int8"]["int8"] == 2 * (4 * 3 + 1)
    assert weights["fp16"]["float16"] > 10 * weights["fp16"]["float32"]
    assert weights["int8"]["int8"] > weights["int8"]["float16"]


def test_report_names_the_tensors_of_each_type(bundles):
    names = {precision: reports["decoder"].names for precision, (_, reports) in bundles.items()}
    in_fp32 = {
        "embeddings/residual/Add",
        "h.*/attn/LayerNormalization",
        "h.*/attn/Softmax",
        "h.*/mlp/adapter/MatMul",
        "logits",
    }
    in_fp16 = {"h.*/attn/MatMul", "present.*.key", "present.*.value", "h.*/mlp/Gelu"}
    for precision in ("fp16", "int8"):
        assert in_fp32 <= set(names[precision]["float32"])
        assert in_fp16 <= set(names[precision]["float16"])
    assert in_fp32 | in_fp16 <= set(names["fp32"]["float32"])
    assert names["int8"]["int8"] == [
        f"h.*/{name}"
        for name in ("attn/LayerNormalization", "attn/Reshape", "mlp/Concat", "mlp/Gelu", "mlp/LayerNormalization")
    ] + ["head/LayerNormalization"]
    console = Console(width=100, file=io.StringIO())
    console.print(layer_table("decoder", bundles["int8"][1]["decoder"]))
    text = " ".join(console.file.getvalue().split())
    assert re.search(r"int8 \d+ \d+ .*LayerNormalization", text)
    assert "ONNXTRT" not in text


def test_card_says_what_the_plans_are_for(bundles):
    for precision, (bundle, _) in bundles.items():
        card = bundle.path("README.md").read_text()
        size = bundle.manifest.files["decoder.plan"].bytes / 1e6
        assert f"exported to ONNX (vision {precision}, decoder {precision}) and TensorRT by itune" in card
        library = Library.find()
        built = f"{library.flavour} {library.version} | decoder.onnx |"
        assert f"| decoder.plan | {precision} | {size:.1f} MB | sm86, sm89 | {built}" in card
        assert "room for 2 images at once, 8 beams in all (images x beams) and 12 new tokens" in card


def test_captions_on_onnx_runtime(bundles, pixels):
    captioners = {name: Captioner.load(bundle.folder, engine="onnxruntime") for name, (bundle, _) in bundles.items()}
    captions = {name: captioner.caption(list(pixels), num_beams=3) for name, captioner in captioners.items()}
    same = [a.tokens == b.tokens for a, b in zip(captions["fp32"], captions["fp16"], strict=True)]
    assert np.mean(same) >= 0.8  # a random model's captions stand less far apart than a trained one's
    alone = [captioners["int8"].caption(image, num_beams=3) for image in pixels]
    assert [caption.tokens for caption in alone] == [caption.tokens for caption in captions["int8"]]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_verified_on_a_convolutional_tower_with_a_prompt(onnx_bundles, precision):
    bundle, reports = onnx_bundles[precision]
    (profile,) = bundle.graph("decoder", "tensorrt").plan.profiles
    prompt = 1 + len(bundle.manifest.tokens.prompt)
    assert (profile["tokens"].min, profile["tokens"].max) == ([1, 1], [8, prompt])
    if precision == "int8":
        assert bundle.manifest.provenance["value_scales"].keys() == {"1", "2"}
        assert reports["vision"].layers["int8"] == 2 * 3  # two convolutions, and the adapters' product


@pytest.mark.parametrize(
    ("vision", "decoder"), [("fp32", "fp16"), ("fp16", "fp32"), ("int8", "fp16"), ("fp16", "int8")]
)
@pytest.mark.usefixtures("only_parse")
def test_two_precisions(clip_checkpoint, tmp_path, vision, decoder):
    """The vision graph writes what the decoder reads."""
    bundle, _ = export(clip_checkpoint, tmp_path / "b", decoder, vision=vision, verify=True)
    written, read = bundle.graph("vision", "tensorrt"), bundle.graph("decoder", "tensorrt")
    assert (written.precision, read.precision) == (vision, decoder)
    dtype = "float32" if decoder == "fp32" else "float16"
    assert {spec.dtype for spec in written.outputs} == {dtype}
    assert {spec.dtype for spec in read.inputs if spec.name.startswith("visual.")} == {dtype}


def test_convolutional_towers_stay_in_fp32_unless_asked(onnx_checkpoint, onnx_bundles, tmp_path):
    bundle, _ = onnx_bundles["fp16"]
    assert [bundle.graph(role, "tensorrt").precision for role in ("vision", "decoder")] == ["fp32", "fp16"]
    bundle, _ = export(onnx_checkpoint, tmp_path / "c", "fp16", vision="fp16")
    assert bundle.graph("vision", "tensorrt").precision == "fp16"


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_restored_tower(onnx_bundles, pixels, tmp_path, precision):
    """The tower comes back in fp32, with the weights as they were rounded, for ONNX Runtime to export again."""
    bundle, _ = onnx_bundles[precision]
    restore_bundle(bundle.folder, tmp_path / "parts")
    export_bundle(tmp_path / "parts" / "checkpoint", tmp_path / "again", ExportOptions(verify=False))
    plain, typed = (
        Captioner.load(folder, engine="onnxruntime").engine.encode(pixels[4:])  # like the photos it was calibrated on
        for folder in (tmp_path / "again", bundle.folder)
    )
    for name, value in plain.visual.items():
        if name.endswith("keys"):  # values are scaled against W_o in int8
            expected = typed.visual[name].numpy().astype(np.float32)
            difference = value.numpy() - expected
            assert np.square(difference).mean() < 0.05**2 * np.square(expected).mean()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_restored(bundles, tmp_path, precision):
    """What a bundle gives back is what its graphs compute: an fp32 export of it makes the same captions."""
    bundle, _ = bundles[precision]
    restore_bundle(bundle.folder, tmp_path / "parts")
    export_bundle(tmp_path / "parts" / "checkpoint", tmp_path / "again", ExportOptions(verify=False))
    before, after = (Graph.load(folder / "decoder.onnx") for folder in (bundle.folder, tmp_path / "again"))
    name = "transformer.h.0.attn.c_attn.weight"
    weight = before.weights.get(name)
    if weight is None:
        weight = before.weights[f"{name}.int8"] * before.weights[f"{name}.scales"].astype(np.float32)
    np.testing.assert_array_equal(after.weights[name], weight.astype(np.float32))


def test_default_model(tmp_path):
    restore_bundle(default_bundle(), tmp_path / "restored")
    sizes = {}
    for precision in ("fp32", "fp16", "int8"):
        photos = {"calibration_data": REPOSITORY / "examples"} if precision == "int8" else {}
        bundle, reports = export(tmp_path / "restored" / "checkpoint", tmp_path / precision, precision, **photos)
        assert bundle.graph("decoder", "tensorrt").plan.profiles[0]["past_key_values.5.key"].min[2] == 0
        assert ("int8" in reports["decoder"].layers) == (precision == "int8")
        captioner = Captioner.load(bundle.folder, engine="onnxruntime")
        for photo in sorted((REPOSITORY / "examples").glob("*.jpg")):
            assert len(captioner.caption(photo).tokens) > 3
        sizes[precision] = [bundle.path(f"{role}.plan").stat().st_size for role in ("vision", "decoder")]
    # Plans of tiny models are nothing but kernels: there, int8 needs more.
    assert sizes["int8"][0] < 0.5 * sizes["fp16"][0]  # whose tower is in fp32
    assert sizes["int8"][1] < 0.7 * sizes["fp16"][1] < 0.49 * sizes["fp32"][1]


@pytest.mark.slow
def test_gpt2_base(base_checkpoint, tmp_path):
    sizes = {}
    for precision in ("fp16", "int8"):
        bundle, reports = export(base_checkpoint, tmp_path / precision, precision)
        sizes[precision] = bundle.path("decoder.plan").stat().st_size
        assert sum(reports["decoder"].weights.values()) > 1.4e8
        shutil.rmtree(bundle.folder)
    assert sizes["int8"] < 0.7 * sizes["fp16"]


@pytest.mark.parametrize(
    ("precision", "photos", "flag", "value"),
    [
        ("int8", None, "--calibration-data", "int8"),
        ("int8", Path("nowhere"), "--calibration-data", "nowhere"),
        ("int4", None, "--precision", "int4"),
        ("fp16", Path("random"), "--calibration-data", "random"),
    ],
)
def test_contradicting_options_are_named(precision, photos, flag, value):
    options = ExportOptions(target="tensorrt", calibration_data=photos)
    with pytest.raises(ItuneError) as error:
        PlanWriter.prepare(options, {"vision": precision, "decoder": precision})
    assert flag in str(error.value)
    assert value in str(error.value)


@pytest.mark.parametrize(
    ("limits", "search", "values"),
    [({}, {"max_new_tokens": 49}, ["--max-new-tokens 49", "48"]), ({"max_beams": 200}, {}, ["--max-beams 200", "154"])],
)
def test_limits_beyond_the_model_are_named(clip_checkpoint, tmp_path, limits, search, values):
    options = ExportOptions(target="tensorrt", verify=False, **limits)
    with pytest.raises(ItuneError) as error:
        export_bundle(clip_checkpoint, tmp_path / "b", options, search=search)
    assert all(value in str(error.value) for value in values), error.value
    assert list(tmp_path.iterdir()) == []
