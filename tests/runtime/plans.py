"""Bundles with "plans" for `fake_gpu`: copies of the bundle's ONNX graphs under another name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from itune.export.bundle import export_bundle
from itune.export.options import ExportOptions
from itune.runtime.bundle import MANIFEST, Bundle, GraphEntry, PlanSettings, ProfileRange, TensorSpec
from itune.runtime.manifest import FileHash

BATCH, BEAMS, PROMPT, POSITIONS, K = 3, 5, 4, 14, 40
VERSION = "1.7.1.116"


def profiles_of(graph: GraphEntry, tokens: int) -> list[dict[str, ProfileRange]]:
    """One for the vision graph; for the decoder one of the first step and one of those that follow."""
    rows, later = BATCH * BEAMS, POSITIONS - 1
    if graph.role == "vision":
        named = [{"images": (1, BATCH)}]
    else:
        common = {"images": (1, BATCH), "N": (tokens, tokens)}
        one_image = {"rows": (1, BATCH), "past_rows": (1, BATCH)}
        named = [
            common | one_image | {"T": (1, PROMPT), "P": (0, 0), "P + T": (1, PROMPT)},
            common | {"rows": (1, rows), "past_rows": (1, rows), "T": (1, 1), "P": (1, later), "P + T": (2, POSITIONS)},
        ]

    def allowed(spec: TensorSpec, names: dict[str, tuple[int, int]]) -> ProfileRange:
        if spec.name == "k":
            return ProfileRange(min=[1], opt=[10], max=[K])
        low, high = ([dim if isinstance(dim, int) else names[dim][side] for dim in spec.shape] for side in (0, 1))
        return ProfileRange(min=low, opt=high, max=high)

    return [{spec.name: allowed(spec, names) for spec in graph.inputs} for names in named]


def add_plans(folder: Path) -> Path:
    """Add to a bundle what an export for TensorRT adds."""
    bundle = Bundle.load(folder)
    content = json.loads((folder / MANIFEST).read_text())
    for graph in bundle.manifest.graphs:
        source, plan = bundle.path(graph.file), folder / f"{graph.role}.plan"
        shutil.copy(source, plan)
        settings = PlanSettings(
            flavour="tensorrt-rtx",
            version=VERSION,
            compute_capabilities=["sm86", "sm89"],
            profiles=profiles_of(graph, bundle.manifest.decoder.visual_tokens),
            source=graph.file,
            source_sha256=bundle.manifest.files[graph.file].sha256,
        )
        entry = graph.model_copy(
            update={"engine": "tensorrt", "file": plan.name, "target": "sm86,sm89", "plan": settings}
        )
        content["graphs"].append(entry.model_dump(mode="json"))
        content["files"][plan.name] = FileHash.of(plan).model_dump()
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder


def make_plan_bundle(checkpoint: Path, folder: Path, *, half: bool = False) -> Path:
    """`half`: visual state and cache are float16, as in an export for TensorRT."""
    export_bundle(checkpoint, folder, ExportOptions(verify=False))
    if half:
        _halve(folder)
    return add_plans(folder)


def _halve(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    for entry in content["graphs"]:
        path = folder / entry["file"]
        model = onnx.load(path)
        before, after = [], []
        for value in [*model.graph.input, *model.graph.output]:
            if not value.name.startswith(("visual", "past_key_values", "present")):
                continue
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
            inner = f"{value.name}.float"
            is_input = any(value is each for each in model.graph.input)
            names, to = ([value.name], [inner]), TensorProto.FLOAT
            if not is_input:
                names, to = ([inner], [value.name]), TensorProto.FLOAT16
            for node in model.graph.node:
                for field in (node.input, node.output):
                    field[:] = [inner if name == value.name else name for name in field]
            (before if is_input else after).append(helper.make_node("Cast", *names, to=to))
        nodes = [*before, *model.graph.node, *after]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        _describe(entry, model)
        content["files"][entry["file"]] = FileHash.of(path).model_dump()
    (folder / MANIFEST).write_text(json.dumps(content))


def _describe(entry: dict[str, Any], model: onnx.ModelProto) -> None:
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]}
    for spec in [*entry["inputs"], *entry["outputs"]]:
        spec["dtype"] = np.dtype(helper.tensor_dtype_to_np_dtype(types[spec["name"]])).name
