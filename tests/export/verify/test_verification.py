from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from itune.data.records import Record
from itune.evaluate import caption_records, score_captions
from itune.export.bundle import export_bundle
from itune.export.graph.builder import Graph
from itune.export.options import ExportOptions
from itune.export.process import run_module
from itune.export.verify import verification
from itune.export.verify.captions import Written, caption_dev_split, compare_dev_split, write_dev_split
from itune.export.verify.compare import compare
from itune.export.verify.limits import LIMITS
from itune.export.verify.report import Check, VerificationError, report_table
from itune.export.verify.scenarios import Scenario, Step, beside_loud_image, pick_images
from itune.export.verify.verification import write_reference
from itune.loading import LoadedCheckpoint, eager_captioner
from itune.runtime.bundle import MANIFEST
from itune.runtime.errors import ItuneError
from itune.runtime.manifest import FileHash
from itune.runtime.settings import ImageSettings, SearchDefaults

KINDS = pytest.mark.parametrize("kind", ["clip", "onnx"])
PRECISIONS = ("fp32", "fp16", "int8", "int4")


@pytest.fixture(scope="module")
def references(clip_checkpoint, onnx_checkpoint, tmp_path_factory):
    """Both checkpoints' references, by kind."""
    folders = {kind: tmp_path_factory.mktemp(f"{kind}-reference") for kind in ("clip", "onnx")}
    write_reference(clip_checkpoint, folders["clip"])
    write_reference(onnx_checkpoint, folders["onnx"])
    return folders


@pytest.fixture(scope="module")
def bundles(clip_checkpoint, onnx_checkpoint, tmp_path_factory):
    """Their unverified bundles, by kind and precision."""
    root = tmp_path_factory.mktemp("bundles")
    for kind, checkpoint in (("clip", clip_checkpoint), ("onnx", onnx_checkpoint)):
        for precision in PRECISIONS:
            export_bundle(checkpoint, root / f"{kind}-{precision}", ExportOptions(precision=precision, verify=False))
    return root


def by_output(checks: list[Check]) -> dict[str, Check]:
    return {check.output: check for check in checks}


def change_weight(bundle, role, name, change):
    """Rewrite one weight of a graph, and its hash."""
    path = bundle / f"{role}.onnx"
    graph = Graph.load(path)
    graph.weights[name] = change(graph.weights[name].copy())
    graph.save(path)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][path.name] = FileHash.of(path).model_dump()
    (bundle / MANIFEST).write_text(json.dumps(manifest))


@KINDS
def test_fp32_agrees_far_below_the_limits(kind, references, bundles):
    checks = compare(bundles / f"{kind}-fp32", references[kind])
    assert all(check.passed for check in checks)
    found = by_output(checks)
    layers = [f"present.{i}.{part}" for i in range(3) for part in ("key", "value")]
    visual = [f"visual.{i}.{part}" for i in (1, 2) for part in ("keys", "values")]
    steps = [f"{output} {when} past" for output in ("logits", "logsumexp") for when in ("with", "without")]
    captions = ["captions, 1 beam", "captions, 3 beams"]
    assert {*layers, *visual, *steps, *captions, "best token"} <= found.keys()
    for output in (*layers, *visual, *steps):
        assert found[output].value < 5e-5, output
    assert found["captions, 3 beams"].value == 1


@KINDS
@pytest.mark.parametrize(
    ("precision", "least", "most"), [("fp16", 1e-5, 0.003), ("int8", 1e-3, 0.05), ("int4", 5e-3, 0.4)]
)
def test_smaller_precisions_agree_within_their_limits(kind, precision, least, most, references, bundles):
    found = by_output(compare(bundles / f"{kind}-{precision}", references[kind]))
    assert all(check.passed for check in found.values())
    assert least < found["logits with past"].value < most  # it is this precision that was measured
    assert found["neighbours: logits"].value < 1e-5


def test_a_tower_in_fp32_is_held_to_its_own_limits(references, bundles, tmp_path, clip_checkpoint):
    export_bundle(
        clip_checkpoint, tmp_path / "b", ExportOptions(precision="int4", vision_precision="fp32", verify=False)
    )
    found = by_output(compare(tmp_path / "b", references["clip"]))
    assert all(check.passed for check in found.values())
    assert found["visual.1.keys"].limit == LIMITS["fp32"].outputs < found["logits with past"].limit


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("role", "weight", "output"),
    [
        ("vision", "visual.bias", "visual.1.keys"),
        ("decoder", "transformer.ln_f.weight", "logits with past"),
        ("decoder", "transformer.wpe.weight", "present.1.key"),
    ],
)
def test_garbage_fails(precision, role, weight, output, references, bundles, tmp_path):
    bundle = shutil.copytree(bundles / f"clip-{precision}", tmp_path / "b")
    rng = np.random.default_rng(0)
    # int8's limits leave room for the rounding of models far steeper than this one.
    factor = np.float32(1 if precision == "fp32" else 4)
    change_weight(bundle, role, weight, lambda array: factor * rng.permuted(array, axis=0))
    found = by_output(compare(bundle, references["clip"]))
    assert not found[output].passed


def test_one_wrong_scale_fails_in_int8(references, bundles, tmp_path):
    """One matrix of twenty, twice too large."""
    bundle = shutil.copytree(bundles / "clip-int8", tmp_path / "b")
    change_weight(bundle, "decoder", "transformer.h.1.mlp.c_proj.weight.scales", lambda scales: scales * 2)
    assert not all(check.passed for check in compare(bundle, references["clip"]))


def test_not_a_number_fails(references, bundles, tmp_path):
    bundle = shutil.copytree(bundles / "clip-fp32", tmp_path / "b")
    change_weight(bundle, "vision", "visual.bias", lambda array: array * np.nan)
    with pytest.raises(VerificationError) as error:
        compare(bundle, references["clip"])
    assert "visual.1.keys" in str(error.value)


def test_another_image_normalisation_fails(references, bundles, tmp_path):
    bundle = shutil.copytree(bundles / "onnx-fp32", tmp_path / "b")
    change_weight(bundle, "vision", "normalize.shift", lambda shift: shift * 1.02)
    found = by_output(compare(bundle, references["onnx"]))
    assert not found["visual.1.keys"].passed


@pytest.fixture(scope="module")
def dev(photos):
    """Six records; the last has no photo."""
    captions = ("a dog runs through the grass", "two men in red shirts")
    return [Record(photo, captions, photo.stem) for photo in photos[:5]] + [Record(Path("none.jpg"), captions, "none")]


@pytest.fixture(scope="module")
def dev_reference(clip_checkpoint, dev, tmp_path_factory):
    """The reference with a dev split in it."""
    folder = tmp_path_factory.mktemp("dev-reference")
    write_dev_split(dev, SearchDefaults(num_beams=2, max_new_tokens=8), folder)
    write_reference(clip_checkpoint, folder)
    return folder


def test_dev_split_is_captioned_and_scored(dev, dev_reference, bundles, clip_checkpoint):
    found = by_output(compare(bundles / "clip-fp32", dev_reference))
    eager = eager_captioner(LoadedCheckpoint.load(clip_checkpoint))
    captions, failed = caption_records(eager, dev, num_beams=2, max_new_tokens=8)
    assert len(failed) == 1
    points = 100 * score_captions(captions, dev)["cider"]
    assert found["CIDEr-D, dev"].case == f"{points:.1f}, PyTorch {points:.1f}"
    assert found["captions, dev"].case == f"{len(set(captions.values()))} different, 5 photos, 1 cannot be read"
    assert found["captions, dev"].value == found["CIDEr-D, dev"].value == 1
    assert all(check.passed for check in found.values())


def test_a_photo_that_one_side_cannot_read_is_counted(dev_reference, clip_checkpoint):
    eager = eager_captioner(LoadedCheckpoint.load(clip_checkpoint))
    reference = caption_dev_split(eager, dev_reference)
    first, *others = reference
    for sides in ((reference, {key: reference[key] for key in others}), ({first: reference[first]}, reference)):
        captions, _ = compare_dev_split(*sides, dev_reference, LIMITS["fp32"])
        assert f"{6 - min(map(len, sides))} cannot be read" in captions.case


def test_dev_split_without_a_photo(references, bundles, tmp_path, dev):
    folder = shutil.copytree(references["clip"], tmp_path / "reference")
    write_dev_split(dev[5:], SearchDefaults(), folder)
    with pytest.raises(ItuneError) as error:
        compare(bundles / "clip-fp32", folder)
    assert "none.jpg" in str(error.value)


@pytest.mark.parametrize(
    ("better", "photos", "passed"), [(0, 40, False), (30, 40, False), (2, 4, True), (39, 40, True)]
)
def test_a_loss_within_two_standard_errors_passes(better, photos, passed, tmp_path):
    """`better` of the photos keep their good caption; the others get a bad one."""
    good = {f"{i}": f"a dog number {i} runs through the grass" for i in range(photos)}
    records = [Record(Path(f"{key}.jpg"), (text,), key) for key, text in good.items()]
    write_dev_split(records, SearchDefaults(), tmp_path)
    written = {key: Written(caption=text, tokens=[i], score=-1) for i, (key, text) in enumerate(good.items())}
    bad = Written(caption="x y z", tokens=[], score=-2)
    other = {key: one if int(key) < better else bad for key, one in written.items()}
    captions, cider = compare_dev_split(written, other, tmp_path, LIMITS["int8"])
    assert captions.value == pytest.approx(better / photos)
    assert cider.value == pytest.approx(better / photos, abs=0.02)
    assert cider.passed == passed


def test_equally_good_captions_are_the_same():
    one, tied, worse = (
        Written(caption=text, tokens=[number], score=score)
        for number, (text, score) in enumerate([("a dog", -1), ("dog", -1.00001), ("dog", -1.001)])
    )
    assert one.as_good_as(tied)
    assert not one.as_good_as(worse)
    assert one.as_good_as(one.model_copy(update={"score": -3}))


def test_report_marks_what_failed():
    checks = [
        Check("visual.1.keys", "1 image", 1e-6, 1e-6, 1e-3, passed=True),
        Check("logits", "3 images", 0.5, 0.25, 1e-3, passed=False),
    ]
    console = Console(width=100, file=io.StringIO())
    console.print(report_table(checks, "a title"))
    text = console.file.getvalue()
    assert "0.25" in text
    assert text.count("ok") == text.count("FAIL") == 1


def test_errors_of_a_process_are_passed_on(tmp_path):
    with pytest.raises(VerificationError) as error:
        run_module(verification.__name__, "compare", tmp_path, tmp_path, about="verification", error=VerificationError)
    assert str(tmp_path) in str(error.value)


def test_images_are_loud_quiet_and_real(photos):
    settings = ImageSettings(size=(24, 30), resize="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    synthetic = pick_images(settings)
    assert synthetic.shape == (4, 24, 30, 3)
    assert synthetic[-1].std() > 100
    assert synthetic[-2].max() < 64
    assert len(pick_images(settings, photos[0].parent)) == 10


def test_loud_neighbour_goes_first():
    alone = Scenario(name="n", images=[0], steps=[Step(tokens=[[3, 4]], parents=[0])])
    both = beside_loud_image(alone, np.arange(20))
    assert both.images == [-1, 0]
    assert both.steps[0].tokens == [[14, 1], [3, 4]]
    assert both.steps[0].parents == [0, 1]
