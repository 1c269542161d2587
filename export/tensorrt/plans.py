"""What `--target tensorrt` adds to an export: typed graphs in place of ONNX Runtime's own, and plans built of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...backbones import OnnxTower, VisionTower
from ...runtime.bundle import GraphEntry, Manifest, PlanSettings
from ...runtime.errors import ItuneError
from ..graph.builder import Graph
from ..options import ExportOptions, Precision
from .calibrate import Ranges, calibrate, calibration_images, choose_ranges
from .library import LayerReport, Library, PlanRequest, build_plan
from .profiles import MAX_BATCH, MAX_BEAMS, PlanLimits, plan_profile
from .typed_graph import FLOAT, HALF, cast_outputs, type_graph

Role = Literal["vision", "decoder"]
ENGINE = "tensorrt"


@dataclass(frozen=True)
class PlanWriter:
    """Writes the typed graphs of a bundle, and later its plans."""

    precisions: Mapping[Role, Precision]
    library: Library
    gpus: list[str]
    calibration: Path | None
    """A folder of photos, or `random`; int8 needs it."""
    limits: PlanLimits
    report: Callable[[str, LayerReport], None]
    """Called with what each graph became in TensorRT, before it is built."""

    @classmethod
    def prepare(
        cls,
        options: ExportOptions,
        precisions: Mapping[Role, Precision],
        report: Callable[[str, LayerReport], None],
    ) -> PlanWriter:
        """Find everything wrong with the options that can be found before a model is loaded.

        Raises:
            ItuneError: TensorRT is missing, a precision is not one of its own, a GPU is unknown, or int8 is asked for
                without photos.
        """
        library = Library.find()
        gpus = library.choose_gpus(options.gpu)
        if "int4" in precisions.values():
            raise ItuneError("--precision int4 is ONNX Runtime's: with --target tensorrt give fp16, int8 or fp32")
        if "int8" in precisions.values():
            if options.calibration_data is None:
                raise ItuneError(
                    "--precision int8 with --target tensorrt needs photos to find the activations' ranges: name a "
                    "folder with --calibration-data, or random"
                )
            calibration_images(options.calibration_data)
        elif options.calibration_data is not None:
            raise ItuneError("--calibration-data is for --precision int8: nothing else is calibrated")
        limits = PlanLimits(options.max_beams or MAX_BEAMS, options.max_batch or MAX_BATCH)
        return cls(precisions, library, gpus, options.calibration_data, limits, report)

    def for_tower(self, tower: VisionTower) -> PlanWriter:
        """What is best for a tower when nothing was said about it: fp32 for a convolutional one in place of fp16.

        Measured on an EfficientNet of 64 convolutions: rounding its weights alone to fp16 changed 4.5 % of 200
        captions at 5 beams, rounding the whole decoder none.
        """
        if self.precisions["vision"] != "fp16" or not isinstance(tower, OnnxTower):
            return self
        return replace(self, precisions={**self.precisions, "vision": "fp32"})

    def write_graphs(
        self, sources: Mapping[Role, Path], folder: Path, manifest: Manifest, progress: Callable[[str], None]
    ) -> tuple[dict[Role, list[Path]], dict[str, float]]:
        """Write the typed graphs of the fp32 graphs `sources`.

        Returns their files by role, the graph first, and by what int8 multiplied the visual values of each layer.
        """
        histograms = None
        if "int8" in self.precisions.values():
            assert self.calibration is not None
            images = calibration_images(self.calibration)

            def count(done: int, total: int) -> None:
                progress(f"calibrating on photo {done} of {total}")

            histograms = calibrate(sources["vision"], sources["decoder"], folder, manifest, images, count)
        graphs = {role: Graph.load(path) for role, path in sources.items()}
        ranges: Ranges | None = None
        scales: dict[str, float] = {}
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

    def build(self, manifest: Manifest, folder: Path, progress: Callable[[str], None]) -> list[GraphEntry]:
        """Build a plan of every graph in the folder; the manifest's entries for them.

        Raises:
            ItuneError: TensorRT cannot build one.
        """
        return [self._build(entry, manifest, folder, progress) for entry in manifest.graphs]

    def _build(
        self, entry: GraphEntry, manifest: Manifest, folder: Path, progress: Callable[[str], None]
    ) -> GraphEntry:
        name = f"{entry.role}.plan"
        profile = plan_profile(entry.inputs, self.limits, manifest.tokens, manifest.decoder.visual_tokens)
        request = PlanRequest(
            source=folder / entry.file,
            target=folder / name,
            profile=profile,
            compute_capabilities=self.gpus,
        )
        progress(f"building {name}")
        plan = build_plan(request, progress, lambda report: self.report(entry.role, report))
        check_types(entry, plan.report)
        settings = PlanSettings(
            flavour=self.library.flavour,
            version=self.library.version,
            compute_capabilities=self.gpus,
            profiles=[profile],
            source=entry.file,
            source_sha256=manifest.files[entry.file].sha256,
        )
        return entry.model_copy(
            update={
                "engine": ENGINE,
                "file": name,
                "external_data": [],
                "target": ",".join(self.gpus),
                "plan": settings,
            }
        )


def check_types(entry: GraphEntry, report: LayerReport) -> None:
    """Raise ItuneError if the plan's inputs and outputs are not those of its graph."""
    for specs, found in ((entry.inputs, report.inputs), (entry.outputs, report.outputs)):
        expected = {spec.name: spec.dtype for spec in specs}
        if expected != found:
            name = next(n for n in [*expected, *found] if expected.get(n) != found.get(n))
            raise ItuneError(f"{entry.file}: TensorRT makes {name} {found.get(name)} instead of {expected.get(name)}")
