"""The TensorRT part of an export: graphs with explicit types, and the plans that are built from them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from ...backbones import OnnxTower, VisionTower
from ...runtime.bundle import GraphEntry, Manifest, PlanSettings
from ...runtime.errors import ItuneError
from ..graph.builder import Graph
from ..options import ExportOptions, Precision
from .calibrate import calibrate, calibration_images, choose_ranges
from .library import LayerReport, Library, PlanRequest, build_plan
from .profiles import PlanLimits, plan_profile
from .typed_graph import FLOAT, HALF, cast_outputs, type_graph

Role = Literal["vision", "decoder"]
Report: TypeAlias = Callable[[str, LayerReport], None]
"""Receives a graph's role and its layers in TensorRT, before the build."""


@dataclass(frozen=True)
class PlanWriter:
    """Writes the typed graphs of a bundle, and later its plans."""

    precisions: Mapping[Role, Precision]
    limits: PlanLimits
    library: Library
    gpus: list[str]
    calibration: Path | None
    """A folder of photos, or `random`; only int8 is calibrated."""

    @classmethod
    def prepare(cls, options: ExportOptions, precisions: Mapping[Role, Precision]) -> PlanWriter:
        """Check the options before any model is loaded.

        Raises:
            ItuneError: TensorRT is missing, does not support a precision or a GPU, or the calibration photos are
                missing or useless.
        """
        library = Library.find()
        gpus = library.choose_gpus(options.gpu)
        photos, kinds = options.calibration_data, precisions.values()
        if "int4" in kinds or ("int8" in kinds) != (photos is not None):
            raise ItuneError(
                f"--target tensorrt: --precision {'/'.join(dict.fromkeys(kinds))} with --calibration-data {photos}: "
                "plans are fp32, fp16 or int8, and only int8 is calibrated, on a folder of photos or random"
            )
        if photos is not None:
            calibration_images(photos)
        limits = PlanLimits(options.max_beams or PlanLimits.max_beams, options.max_batch or PlanLimits.max_batch)
        return cls(precisions, limits, library, gpus, photos)

    def for_tower(self, tower: VisionTower) -> PlanWriter:
        """The writer with fp32 in place of fp16 for an ONNX tower, whose convolutions lose too much.

        Measured on an EfficientNet of 64 convolutions: rounding its weights alone to fp16 changed 4.5 % of 200 captions
        at 5 beams; rounding the whole decoder changed none.
        """
        if self.precisions["vision"] != "fp16" or not isinstance(tower, OnnxTower):
            return self
        return replace(self, precisions={**self.precisions, "vision": "fp32"})

    def write_graphs(
        self, sources: Mapping[Role, Path], folder: Path, manifest: Manifest, progress: Callable[[str], None]
    ) -> tuple[dict[Role, list[Path]], dict[str, float]]:
        """Write the typed graphs of the fp32 graphs `sources`.

        Returns their files by role, the graph first, and int8's factor on the visual values of each layer.
        """
        histograms, ranges = None, None
        scales: dict[str, float] = {}
        if self.calibration is not None:
            histograms = calibrate(
                sources["vision"],
                sources["decoder"],
                folder,
                manifest,
                calibration_images(self.calibration),
                lambda done, total: progress(f"calibrating on photo {done} of {total}"),
            )
        graphs = {role: Graph.load(path) for role, path in sources.items()}
        if histograms is not None:
            ranges, scales = choose_ranges(graphs["vision"], graphs["decoder"], histograms)
        files = {}
        for role in sources:
            progress(f"writing the {role} graph in {self.precisions[role]}")
            graph = graphs.pop(role)
            type_graph(graph, self.precisions[role], ranges)
            if role == "vision":
                cast_outputs(graph, FLOAT if self.precisions["decoder"] == "fp32" else HALF)
            files[role] = graph.save(folder / f"{role}.onnx")
            del graph
            gc.collect()
        return files, scales

    def build(
        self, manifest: Manifest, folder: Path, progress: Callable[[str], None], report: Report
    ) -> list[GraphEntry]:
        """Build a plan of every graph in the folder; returns their entries in the manifest."""
        entries = []
        for graph in manifest.graphs:
            name = f"{graph.role}.plan"
            profile = plan_profile(graph.inputs, self.limits, manifest.tokens, manifest.decoder.visual_tokens)
            progress(f"building {name}")
            request = PlanRequest(
                source=folder / graph.file, target=folder / name, profile=profile, compute_capabilities=self.gpus
            )
            build_plan(request, progress, partial(report, graph.role))
            settings = PlanSettings(
                flavour=self.library.flavour,
                version=self.library.version,
                compute_capabilities=self.gpus,
                profiles=[profile],
                source=graph.file,
                source_sha256=manifest.files[graph.file].sha256,
            )
            plan = {"engine": "tensorrt", "file": name, "external_data": [], "target": ",".join(self.gpus)}
            entries.append(GraphEntry.model_validate(graph.model_dump() | plan | {"plan": settings}))
        return entries
