from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itune.runtime import bundle as bundle_module
from itune.runtime.bundle import DEFAULT, MANIFEST, SCHEMA_VERSION, Bundle
from itune.runtime.errors import BundleError
from itune.runtime.manifest import FileHash

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


def rewrite(folder: Path, change: Change) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def refusal(folder: Path, *, verify: bool = True) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.load(folder, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    assert folder == DEFAULT or str(folder) in message
    return message


def test_reads_what_was_written(bundle: Path) -> None:
    loaded = Bundle.load(bundle)
    assert loaded.manifest.name == "colours"
    assert loaded.manifest.schema_version == SCHEMA_VERSION
    assert loaded.path(loaded.graph("vision").file).is_file()
    assert (bundle / MANIFEST).read_text() == loaded.manifest.to_json()
    assert json.loads(loaded.manifest.to_json())["decoder"]["lambda"] == 1.0


def test_prefers_the_graph_made_for_an_engine(bundle: Path) -> None:
    loaded = Bundle.load(bundle)
    vision = loaded.manifest.graphs[0]
    own = vision.model_copy(update={"engine": "onnxruntime", "precision": "int8"})
    both = Bundle(bundle, loaded.manifest.model_copy(update={"graphs": [vision, own]}))
    assert both.graph("vision", "onnxruntime") is own
    assert both.graph("vision", "tensorrt") is vision
    assert both.graph("vision") is vision
    with pytest.raises(BundleError) as error:
        both.graph("decoder", "tensorrt")
    for value in ("'decoder'", "'tensorrt'", "vision for any", "vision for onnxruntime"):
        assert value in str(error.value)


PLAN = {
    "flavour": "tensorrt-rtx",
    "version": "1.7.1.116",
    "compute_capabilities": ["sm86", "sm89"],
    "profiles": [{"pixels": {"min": [1, 16, 16, 3], "opt": [1, 16, 16, 3], "max": [8, 16, 16, 3]}}],
    "source": "vision.onnx",
    "source_sha256": "0" * 64,
}


def test_plans(copy: Path) -> None:
    """A plan describes how it was built; other engines still run the bundle's other graphs."""

    def add(plan: object, engine: str = "tensorrt") -> Change:
        def change(content: dict[str, Any]) -> None:
            content["graphs"].append(content["graphs"][0] | {"engine": engine, "target": "sm86,sm89", "plan": plan})

        return change

    original = (copy / MANIFEST).read_text()
    rewrite(copy, add(PLAN))
    loaded = Bundle.load(copy)
    plan = loaded.graph("vision", "tensorrt").plan
    assert plan is not None
    assert plan.profiles[0]["pixels"].max == [8, 16, 16, 3]
    assert loaded.graph("vision", "onnxruntime").plan is None
    for change, field in (
        (add(None), "graphs.2: plan"),
        (add(PLAN, "any"), "graphs.2: plan"),
        (add(PLAN | {"profiles": []}), "plan.profiles"),
        (add(PLAN | {"compute_capabilities": ["8.6"]}), "plan.compute_capabilities.0"),
        (add(PLAN | {"source": "../vision.onnx"}), "plan.source"),
    ):
        (copy / MANIFEST).write_text(original)
        rewrite(copy, change)
        assert field in refusal(copy)


def test_not_a_bundle(tmp_path: Path) -> None:
    assert str(tmp_path / "absent" / MANIFEST) in refusal(tmp_path / "absent")
    assert str(tmp_path / MANIFEST) in refusal(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    assert "line 1 column 1" in refusal(tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).mkdir()
    assert str(tmp_path / MANIFEST) in refusal(tmp_path)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", 1.5, None, [1]])
def test_another_schema_version(copy: Path, version: object) -> None:
    # The version is named first, whatever else this one cannot read.
    rewrite(copy, lambda content: content.update(schema_version=version, tokens="?"))
    message = refusal(copy)
    assert f"schema_version: Input should be {SCHEMA_VERSION}, not {version!r}" in message
    assert "itune-export" in message


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda content: content.pop("image"), "image"),
        (lambda content: content["image"].update(size=[224, 0]), "image.size.1"),
        (lambda content: content["image"].update(size=["224", 224]), "image.size.0"),
        (lambda content: content["image"].update(resize="stretch"), "image.resize"),
        (lambda content: content["tokens"].update(begin=-1), "tokens.begin"),
        (lambda content: content["tokens"].update(end=10**6), "tokens"),
        (lambda content: content["decoder"].pop("lambda"), "decoder.lambda"),
        (lambda content: content["decoder"].pop("visual_tokens"), "decoder.visual_tokens"),
        (lambda content: content["tokens"].update(prefix=10**9), "tokens"),
        (lambda content: content["tokens"].update(prompt=[1] * 99), "tokens"),
        (lambda content: content["tokens"].update(vocab_size=10**30), "tokens.vocab_size"),
        (lambda content: content["image"].update(size=[10**9, 10**9]), "image.size.0"),
        (lambda content: content["image"].update(crop=[10**6, 10**6]), "image.crop.0"),
        (lambda content: content["image"].update(std=[0.0, 1.0, 1.0]), "image.std.0"),
        (lambda content: content["search"].update(num_beams=0), "search.num_beams"),
        (lambda content: content["search"].update(num_beams=1025), "search.num_beams"),
        (lambda content: content["search"].update(no_repeat_ngram_size=10**30), "search.no_repeat_ngram_size"),
        (lambda content: content["search"].update(beams=5), "search.beams"),
        (lambda content: content["graphs"][0].update(file=3), "graphs.0.file"),
        (lambda content: content["files"]["vision.onnx"].update(sha256="?"), "files.vision.onnx.sha256"),
        (lambda content: content.update(method="prefix"), "method"),
        (lambda content: content.update(extra=1), "extra"),
        (lambda content: content.update({"new\nline": 1}), r"new\nline"),
    ],
)
def test_a_broken_field_is_named(copy: Path, change: Change, field: str) -> None:
    rewrite(copy, change)
    assert f"bundle.json: {field}: " in refusal(copy)


def test_damaged_and_missing_files(copy: Path) -> None:
    graph = copy / "decoder.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    listed = Bundle.load(copy, verify=False).manifest.files["decoder.onnx"]
    assert f"{graph}: damaged ({len(content)} bytes; bundle.json lists {listed})" in refusal(copy)
    graph.write_bytes(content[:-1])
    assert f"{graph}: damaged ({len(content) - 1} bytes; bundle.json lists {listed})" in refusal(copy, verify=False)
    graph.unlink()
    assert str(graph) in refusal(copy, verify=False)
    graph.mkdir()
    assert str(graph) in refusal(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "vision.onnx"])
def test_every_used_file_needs_a_hash(copy: Path, name: str) -> None:
    rewrite(copy, lambda content: content["files"].pop(name))
    assert str(copy / name) in refusal(copy)
    assert str(copy / name) in refusal(copy, verify=False)


OUTSIDE = ["/etc/passwd", "../decoder.onnx", "a/../../b", "C:\\b", "C:b", "..\\b", "", ".", "a\nb", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("place", ["file", "external_data", "files"])
def test_names_that_leave_the_folder(copy: Path, place: str, name: str) -> None:
    def change(content: dict[str, Any]) -> None:
        graph = content["graphs"][0]
        if place == "file":
            graph["file"] = name
        elif place == "external_data":
            graph["external_data"] = [name]
        else:
            content["files"][name] = content["files"]["vision.onnx"]

    rewrite(copy, change)
    message = refusal(copy)
    assert repr(name) in message
    assert place in message


def test_a_folder_of_links_as_in_a_hub_cache(copy: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(copy.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    Bundle.load(copy)
    Bundle.load(copy, verify=False)
    graph = copy / "vision.onnx"
    content = bytearray(graph.read_bytes())
    content[-1] ^= 1
    graph.resolve().write_bytes(content)
    assert f"{graph}: damaged" in refusal(copy, verify=False)  # what lies outside the folder is always hashed
    graph.unlink()
    graph.symlink_to("vision.onnx")
    assert str(graph) in refusal(copy)


def test_the_folder_itself_may_be_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert Bundle.load(tmp_path / "link").manifest.name == "colours"


def test_what_no_program_reads_may_be_edited(copy: Path) -> None:
    (copy / "README.md").write_text("# Ours")
    rewrite(copy, lambda content: content["files"].update({"README.md": content["files"]["vision.onnx"]}))
    Bundle.load(copy)


def test_the_default_bundle_is_the_one_in_models(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "__file__", str(tmp_path / "bundle.py"))
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "models") in refusal(DEFAULT)
    shutil.copytree(bundle, tmp_path / "models" / "first")
    (tmp_path / "models" / "not-a-bundle").mkdir()
    shutil.copytree(bundle, tmp_path / "default")  # in the current directory
    assert Bundle.load(DEFAULT).folder == tmp_path / "models" / "first"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


def load_or_refuse(folder: Path, manifest: bytes) -> None:
    (folder / MANIFEST).write_bytes(manifest)
    try:
        Bundle.load(folder, verify=False)
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017 (loading it is right, too)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(junk=st.binary(max_size=64) | json_values.map(lambda value: json.dumps(value).encode()))
def test_junk_is_refused_in_a_sentence(copy: Path, junk: bytes) -> None:
    load_or_refuse(copy, junk)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_changed_value_is_accepted_or_refused_in_a_sentence(bundle: Path, copy: Path, data: st.DataObject) -> None:
    content = place = json.loads((bundle / MANIFEST).read_text())
    while True:
        keys = range(len(place)) if isinstance(place, list) else sorted(place)
        key = data.draw(st.sampled_from(keys))
        if not (isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans())):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    load_or_refuse(copy, json.dumps(content).encode())


@pytest.mark.parametrize("location", ["../secret", "{secret}", "link", "unlisted.data"])
def test_a_graph_reads_only_the_files_that_are_listed(location: str, copy: Path) -> None:
    secret = copy.parent / "secret"
    secret.write_bytes(bytes(2**16))
    (copy / "link").symlink_to(secret)
    shutil.copy(secret, copy / "unlisted.data")
    location = location.format(secret=secret)
    model = onnx.load(copy / "vision.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    onnx.save(model, copy / "vision.onnx")
    rewrite(
        copy, lambda content: content["files"].update({"vision.onnx": FileHash.of(copy / "vision.onnx").model_dump()})
    )
    message = refusal(copy)
    assert str(copy / "vision.onnx") in message
    assert location in message
