"""Write a bundle: both graphs, the tokenizer, a model card and the manifest, verified before it appears."""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from onnx import ValueInfoProto, helper

from .. import __version__
from ..backbones import ClipTower, VisionTower
from ..checkpoint import CONFIG_FILE, WEIGHTS_FILE, find_checkpoint
from ..data.records import Record
from ..files import hash_files, listed_files, staged_folder
from ..license import LICENSE_FILE, find_license
from ..loading import LoadedCheckpoint, eager_captioner
from ..methods.schemas import load_config
from ..retrieval.encoder import RetrievalHead, load_head
from ..runtime.bundle import (
    MANIFEST,
    TOKENIZER,
    GraphEntry,
    LanguageModelSettings,
    Manifest,
    TensorSpec,
    VisionModelSettings,
    square_grid,
)
from ..runtime.captioner import Captioner
from ..runtime.engines.base import Int64
from ..runtime.errors import ItuneError, reading
from ..runtime.manifest import FileHash
from ..runtime.search import SearchConfig
from ..runtime.settings import SearchDefaults, Size
from .card import MODEL_CARD, default_license, model_card
from .exportable import check_exportable
from .graph.builder import Graph
from .methods.registry import METHODS, build_decoder, build_vision
from .options import ExportOptions, Precision
from .quantize.integer_matmul import Blocks, Rows, Scheme
from .quantize.rewrite import halve_graph, quantize_graph
from .tensorrt.library import LayerReport
from .tensorrt.plans import PlanWriter, Role
from .verify.compare import VALUE_SCALES
from .verify.embedding import EmbeddingReference
from .verify.report import Check, VerificationError
from .verify.scenarios import pick_images
from .verify.verification import verify_bundle
from .vocabulary import Vocabulary

_SCHEMES: dict[tuple[Role, Precision], Scheme] = {
    ("vision", "int8"): Rows(),
    ("vision", "int4"): Blocks(4),
    ("decoder", "int8"): Blocks(8),
    ("decoder", "int4"): Blocks(4),
}


def export_bundle(
    checkpoint: Path,
    output: Path,
    options: ExportOptions,
    *,
    search: Mapping[str, Any] = {},
    dev: Sequence[Record] = (),
    progress: Callable[[str], None] = lambda _stage: None,
    report: Callable[[list[Check]], None] = lambda _checks: None,
    report_plan: Callable[[str, LayerReport], None] = lambda _role, _layers: None,
) -> Manifest:
    """Export a checkpoint (its folder, or a training's output folder) to the bundle `output`.

    The bundle appears as a whole; on failure nothing is written.
    `search` overrides the checkpoint's search defaults (None keeps one), `dev` are photos to score the graphs on.
    `progress` is called with every stage, `report` with the verification's results, and `report_plan` with the layers
    of each TensorRT plan before it is built.

    Raises:
        VerificationError: the graphs do not compute what the checkpoint does; no bundle is written.
        ItuneError: the checkpoint cannot be loaded or exported, or `output` exists (`force` replaces a bundle).
    """
    checkpoint = find_checkpoint(checkpoint)
    plan = _Plan.make(checkpoint, options)
    with staged_folder(output, force=options.force, written=lambda bundle: listed_files(bundle / MANIFEST)) as folder:
        progress("loading the checkpoint")
        loaded = LoadedCheckpoint.load(checkpoint)
        check_exportable(loaded.language, loaded.tower)
        if options.license and loaded.config.license:
            terms = f"{checkpoint / CONFIG_FILE}, whose weights have terms of their own: {loaded.config.license}"
            raise ItuneError(f"--license contradicts {terms}")
        plan = plan.for_model(loaded, search)
        fields = {"name": output.absolute().name} | _describe(loaded, checkpoint, plan, search)
        embeddings = None
        if plan.head is not None:
            photos = pick_images(loaded.config.image, options.images)
            embeddings = EmbeddingReference.record(loaded.tower, plan.head, photos)
        with reading(output / TOKENIZER, ItuneError, mend="make room, or choose another --output"):
            loaded.language.tokenizer.save(str(folder / TOKENIZER))
        if license := find_license(checkpoint, loaded.config.license):
            (folder / LICENSE_FILE).write_text(license.text, encoding="utf-8")
        fields["graphs"] = _write_graphs(loaded, plan, fields, folder, progress)
        manifest = _write_manifest(fields, folder, plan.card)
        if options.verify:
            checks = verify_bundle(
                checkpoint, folder, images=options.images, dev=dev, vocabulary=plan.token_ids, progress=progress
            )
            checks += [] if embeddings is None else [embeddings.check(folder, plan.precisions["vision"])]
            report(checks)
            if failed := [check for check in checks if not check.passed]:
                first, others = failed[0], f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
                raise VerificationError(
                    f"the graphs do not compute what the checkpoint does, so no bundle was written: {first.output} "
                    f"is {first.value:.2g} where {first.limit:.2g} is allowed, in {first.case}{others}"
                )
        if plan.writer is not None:
            fields["graphs"] += plan.writer.build(manifest, folder, progress, report_plan)
            manifest = _write_manifest(fields, folder, plan.card)
    return manifest


@dataclass(frozen=True)
class _Plan:
    """What an export will write."""

    options: ExportOptions
    precisions: Mapping[Role, Precision]
    card: str | None
    """The model card; None generates one."""
    vocabulary: Vocabulary | None
    writer: PlanWriter | None
    """Writes graphs for TensorRT, and plans; None exports to ONNX alone."""
    token_ids: Int64 | None = None
    """The tokens that the decoder keeps; None keeps all."""
    head: RetrievalHead | None = None
    """Embeds images to search a datastore; None for a captioner that does not retrieve."""

    @classmethod
    def make(cls, checkpoint: Path, options: ExportOptions) -> _Plan:
        """Decide what can be decided, and find what is wrong with the options, before a model is loaded."""
        tensorrt = options.target == "tensorrt"
        retrieves = options.retrieve is not None or load_config(checkpoint).retrieval is not None
        if retrieves and (tensorrt or options.vocabulary is not None):
            flag = "--target tensorrt" if tensorrt else "--vocabulary"
            raise ItuneError(f"{flag} does not support captioners that retrieve captions: leave it out")
        decoder = options.precision or ("fp16" if tensorrt else "fp32")
        # 4-bit weights do not speed up a tower, and they change its embeddings.
        vision = options.vision_precision or ("int8" if decoder == "int4" else decoder)
        precisions: dict[Role, Precision] = {"vision": vision, "decoder": decoder}
        card = None
        if options.model_card is not None:
            with reading(options.model_card, mend="give a file of UTF-8 text"):
                card = options.model_card.read_text(encoding="utf-8")
        vocabulary = None if options.vocabulary is None else Vocabulary.read(options.vocabulary, options.data)
        writer = PlanWriter.prepare(options, precisions) if tensorrt else None
        return cls(options, precisions, card, vocabulary, writer)

    def for_model(self, loaded: LoadedCheckpoint, search: Mapping[str, Any]) -> _Plan:
        """The plan, completed with what depends on the model."""
        config, plan = loaded.config, self
        if self.vocabulary is not None:
            tokens = eager_captioner(loaded).tokens
            plan = replace(plan, token_ids=self.vocabulary.token_ids(loaded.language.tokenizer, config.text, tokens))
        if self.writer is not None:
            tokens = eager_captioner(loaded, plan.token_ids).tokens
            limits = self.writer.limits.of(tokens, search.get("max_new_tokens"))
            writer = replace(self.writer, limits=limits)
            writer = writer if self.options.vision_precision else writer.for_tower(loaded.tower)
            plan = replace(plan, writer=writer, precisions=writer.precisions)
        if self.options.retrieve is not None or config.retrieval is not None:
            pooling = None if config.retrieval is None else config.retrieval.encoder.pooling
            plan = replace(plan, head=load_head(loaded.tower, config.vision.source, pooling))
        return plan


def _describe(loaded: LoadedCheckpoint, checkpoint: Path, plan: _Plan, search: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's fields that follow from the checkpoint and the options."""
    options, config, gpt2, tower = plan.options, loaded.config, loaded.language.model.config, loaded.tower
    captioner = eager_captioner(loaded, plan.token_ids)
    fields: dict[str, Any] = {
        "method": loaded.model.method,
        "image": config.image,
        "text": config.text,
        "tokens": captioner.tokens,
        "decoder": {
            "layers": gpt2.n_layer,
            "heads": gpt2.n_head,
            "head_dim": gpt2.n_embd // gpt2.n_head,
            "hidden_size": gpt2.n_embd,
            "visual_tokens": config.vision.tokens,
            "visual_width": config.vision.width,
            **METHODS[loaded.model.method].settings(loaded.model),
        },
        "search": _search_defaults(captioner, search, plan.writer),
        "patches": _patches(options.patch_grid, tower),
        "provenance": {
            "itune": __version__,
            "exported": datetime.now(UTC).isoformat(timespec="seconds"),
            "language_model": config.language_model.model_dump(),
            "vision": config.vision.model_dump(),
            "checkpoint": {file: hash_files([checkpoint / file]) for file in (WEIGHTS_FILE, CONFIG_FILE)},
            "training": config.training,
        },
        "license": config.license
        or options.license
        or default_license(config.language_model.source, config.vision.source),
    }
    if options.name:
        fields["name"] = options.name
    if plan.head is not None:
        k = {} if options.retrieve is None else {"k": options.retrieve}
        trained = {"k": 0, "encoder": plan.head.encoder} if config.retrieval is None else dict(config.retrieval)
        fields["retrieval"] = trained | k
    if plan.vocabulary is not None:  # without the other tokens' embeddings there is nothing to restore
        fields["provenance"]["vocabulary"] = plan.vocabulary.sha256
        fields["gpt2"] = LanguageModelSettings.model_validate(gpt2.to_dict())
        if isinstance(tower, ClipTower):
            fields["clip"] = VisionModelSettings.model_validate(tower.model.config.to_dict())
    else:
        fields["restore"] = {
            "language_model": json.loads(gpt2.to_json_string()),
            "vision": json.loads(tower.model.config.to_json_string()) if isinstance(tower, ClipTower) else None,
            "checkpoint": config.model_dump(mode="json", by_alias=True),
        }
    return fields


def _search_defaults(captioner: Captioner, chosen: Mapping[str, Any], writer: PlanWriter | None) -> SearchDefaults:
    """The chosen options, else the checkpoint's, within what the model and the TensorRT plans have room for."""
    chosen, room = {name: value for name, value in chosen.items() if value is not None}, captioner.tokens.room
    if chosen.get("max_new_tokens", 0) > room:
        raise ItuneError(f"--max-new-tokens {chosen['max_new_tokens']}: the language model has positions for {room}")
    options = captioner.search.model_dump() | chosen
    if writer is not None:
        options["num_beams"] = min(options["num_beams"], writer.limits.max_beams)
        options["max_new_tokens"] = min(options["max_new_tokens"], writer.limits.max_new_tokens)
    with reading("search options"):
        SearchConfig(**options)  # as the runtime will
    return SearchDefaults(**options)


def _patches(wanted: str | None, tower: VisionTower) -> Size | None:
    """The grid of patches that a tower's last embeddings form; None if it is unknown."""
    own = square_grid(tower.tokens - 1) if isinstance(tower, ClipTower) else None
    if wanted is None:
        return own or square_grid(tower.tokens)
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", wanted.lower())
    grid = None if match is None else (int(match[1]), int(match[2]))
    if grid is None or grid[0] * grid[1] > tower.tokens or grid != (own or grid):
        patches = f" ({own[0]}x{own[1]} patches)" if own else ""
        raise ItuneError(
            f"--patch-grid {wanted} does not fit the tower's {tower.tokens} embeddings{patches}: give ROWSxCOLUMNS"
        )
    return grid


def _write_graphs(
    loaded: LoadedCheckpoint, plan: _Plan, fields: dict[str, Any], folder: Path, progress: Callable[[str], None]
) -> list[GraphEntry]:
    """Write both graphs, by way of fp32; frees the checkpoint's weights, and notes in `fields` what int8 scaled."""
    with TemporaryDirectory(dir=folder) as fp32:
        progress("writing the vision graph in fp32")
        vision = build_vision(loaded.model, loaded.tower, plan.head).save(Path(fp32, "vision.onnx"))
        del loaded.tower
        progress("writing the decoder graph in fp32")
        # Integer products run on ONNX Runtime only, so such a decoder may as well have its fused attention.
        fused = plan.writer is None and plan.precisions["decoder"] in ("int8", "int4")
        decoder = build_decoder(loaded.model, plan.token_ids, fused=fused).save(Path(fp32, "decoder.onnx"))
        del loaded.model, loaded.language
        gc.collect()
        sources: dict[Role, list[Path]] = {"vision": vision, "decoder": decoder}
        if plan.writer is None:
            files = {role: _convert(role, source, folder, plan, progress) for role, source in sources.items()}
        else:
            manifest = Manifest(**fields, graphs=[], files={})
            graphs = {role: source[0] for role, source in sources.items()}
            files, scales = plan.writer.write_graphs(graphs, folder, manifest, progress)
            if scales:
                fields["provenance"][VALUE_SCALES] = scales
    return [_graph_entry(role, plan.precisions[role], written) for role, written in files.items()]


def _convert(role: Role, source: list[Path], folder: Path, plan: _Plan, progress: Callable[[str], None]) -> list[Path]:
    """Write an fp32 graph's files to `folder` in the plan's precision; returns them, the graph first."""
    precision = plan.precisions[role]
    if precision == "fp32":
        return [Path(shutil.move(file, folder / file.name)) for file in source]
    progress(f"writing the {role} graph in {precision}")
    target = folder / source[0].name
    if precision == "fp16":
        return halve_graph(source[0], target)
    return quantize_graph(source[0], target, _SCHEMES[role, precision])


def _graph_entry(role: Role, precision: Precision, files: list[Path]) -> GraphEntry:
    def spec(value: ValueInfoProto) -> TensorSpec:
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        return TensorSpec(
            name=value.name, dtype=dtype, shape=[dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        )

    graph = Graph.load(files[0])
    return GraphEntry(
        role=role,
        engine="any" if set(graph.opsets) == {""} else "onnxruntime",
        precision=precision,
        file=files[0].name,
        external_data=[path.name for path in files[1:]],
        inputs=list(map(spec, graph.inputs)),
        outputs=list(map(spec, graph.outputs)),
    )


def _write_manifest(fields: Mapping[str, Any], folder: Path, card: str | None) -> Manifest:
    """Hash the bundle's files, and write its model card and manifest."""
    names = {path.name for path in folder.iterdir()} - {MANIFEST, MODEL_CARD}
    files = {name: FileHash.of(folder / name) for name in sorted(names)}
    text = model_card(Manifest(**fields, files=files)) if card is None else card
    (folder / MODEL_CARD).write_text(text, encoding="utf-8")
    manifest = Manifest(**fields, files=files | {MODEL_CARD: FileHash.of(folder / MODEL_CARD)})
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
