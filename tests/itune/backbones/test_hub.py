"""Models from a hub: what is downloaded, and that the cache's links are as good as files. The hub is a local server."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

from itune.backbones import load_vision_tower
from tests.conftest import make_clip, make_language_model

COMMIT = "c" * 40
LOAD = """
import json, sys
import numpy as np
from itune.backbones import load_language_model, load_vision_tower
from itune.runtime.errors import ItuneError
try:
    if sys.argv[1] == "tower":
        tower = load_vision_tower(sys.argv[2], *sys.argv[3:])
        found = tower.embed(np.full((1, 4, 4, 3), 9, np.uint8)).sum().item()
    else:
        tower = load_language_model(sys.argv[2], *sys.argv[3:])
        found = tower.model.transformer.wte.weight.sum().item()
    print(json.dumps([tower.sha256, found]))
except ItuneError as error:
    print(json.dumps(str(error)))
"""


@contextmanager
def hub(repositories: dict[str, Path]) -> Iterator[str]:
    """A server with the parts of the hub's interface that a download uses."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            name = next((name for name in repositories if f"/{name}/" in path), "")
            root = repositories.get(name, Path("/nonexistent"))
            if "/revision/" in path and name:
                self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())
            elif "/tree/" in path and name:
                files = [file for file in sorted(root.rglob("*")) if file.is_file()]
                self.answer(json.dumps([self.entry(root, file) for file in files]).encode())
            elif "/resolve/" in path and (file := root / path.split(f"/{COMMIT}/")[-1]).is_file():
                self.answer(file.read_bytes())
            else:
                self.send_error(404)

        def entry(self, root: Path, file: Path) -> dict[str, object]:
            content = file.read_bytes()
            oid = hashlib.sha1(content).hexdigest()
            return {"type": "file", "path": str(file.relative_to(root)), "size": len(content), "oid": oid}

        def answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def make_external_tower(folder: Path, *locations: str) -> Path:
    """An ONNX tower that multiplies its pixels with weights in several files; there are other files beside them."""
    names = [f"w{i}" for i in range(len(locations))]
    weights = [numpy_helper.from_array(np.full((48, 48), i + 1, np.float32), name) for i, name in enumerate(names)]
    shape = numpy_helper.from_array(np.array([0, 1, 48]), "shape")
    nodes = [helper.make_node("Reshape", ["pixels", "shape"], ["x0"])]
    nodes += [helper.make_node("MatMul", [f"x{i}", name], [f"x{i + 1}"]) for i, name in enumerate(names)]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["B", 3, 4, 4])
    output = helper.make_tensor_value_info(f"x{len(names)}", TensorProto.FLOAT, ["B", 1, 48])
    for weight, location in zip(weights, locations, strict=True):
        file = folder / location
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    graph = helper.make_graph(nodes, "tower", [pixels], [output], [*weights, shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    size = {"height": 4, "width": 4}
    settings = {"size": size, "do_center_crop": False, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


LOCATIONS = ("model.onnx_data", "weights[1].bin", "sub/deeper/w.data")


def test_the_identity_of_a_tower_are_the_files_that_its_graph_names(tmp_path: Path) -> None:
    folder = make_external_tower(tmp_path / "tower", *LOCATIONS)
    found = load_vision_tower(str(folder)).sha256
    (folder / "unused.bin").write_bytes(b"unused")
    assert load_vision_tower(str(folder)).sha256 == found
    for location in LOCATIONS:
        before = (folder / location).read_bytes()
        (folder / location).unlink()
        (folder / location).write_bytes((np.frombuffer(before, np.float32) * 2).tobytes())
        assert load_vision_tower(str(folder)).sha256 != found
        (folder / location).unlink()
        (folder / location).write_bytes(before)


def test_an_identity_of_earlier_versions_is_unchanged(tmp_path: Path) -> None:
    folder = make_external_tower(tmp_path / "tower", "model.onnx.data")
    files = [folder / "model.onnx", folder / "model.onnx.data"]
    expected = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert load_vision_tower(str(folder)).sha256 == expected


def test_what_a_model_needs_is_downloaded(tmp_path: Path) -> None:
    tower = make_external_tower(tmp_path / "tower", *LOCATIONS)
    language_model = make_language_model(tmp_path / "gpt2")
    for folder in tower, language_model:
        (folder / "other.bin").write_bytes(b"unused")
    torch.save(load_file(language_model / "model.safetensors"), language_model / "pytorch_model.bin")
    (language_model / "model.safetensors").unlink()
    clip = make_clip(tmp_path / "clip")
    (clip / "sub").mkdir()
    (clip / "sub" / "model.safetensors").write_bytes(b"unused")
    repositories = {"user/tower": tower, "user/gpt2": language_model, "user/clip": clip}
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}

    def load(kind: str, source: str, **more: str) -> object:
        command = [sys.executable, "-c", LOAD, kind, source]
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    with hub(repositories) as endpoint:
        environment["HF_ENDPOINT"] = endpoint
        for name, kind in (("user/tower", "tower"), ("user/gpt2", "gpt2")):
            assert load(kind, name) == load(kind, str(repositories[name]))
        message = load("gpt2", "user/clip")  # it is no language model, but it is downloaded
        assert "clip" in str(message)
    cache = tmp_path / "cache" / "hub"
    downloaded = {
        name: sorted(
            str(file.relative_to(root))
            for root in [cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT]
            for file in root.rglob("*")
            if not file.is_dir()
        )
        for name in repositories
    }
    assert downloaded["user/tower"] == sorted(["model.onnx", "preprocessor_config.json", *LOCATIONS])
    assert "pytorch_model.bin" in downloaded["user/gpt2"]
    assert "other.bin" not in downloaded["user/gpt2"]
    assert downloaded["user/clip"] == ["config.json", "model.safetensors", "preprocessor_config.json"]
    # Without a network the cache is as good as the hub, and what it lacks is named with the command that gets it.
    assert load("tower", "user/tower", HF_HUB_OFFLINE="1") == load("tower", str(tower))
    assert "hf download user/missing" in str(load("gpt2", "user/missing", HF_HUB_OFFLINE="1"))
