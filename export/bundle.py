"""Write a bundle: both graphs, the tokenizer, a model card and the manifest, verified before it appears."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onnx import ValueInfoProto, helper
from pydantic import ValidationError

from .. import __version__
from ..backbones import ClipTower, VisionTower
from ..checkpoint import CONFIG_FILE, WEIGHTS_FILE, find_checkpoint, load_config
from ..data.records import Record
from ..files import hash_files, listed_files
from ..loading import LoadedCheckpoint, eager_captioner
from ..retrieval.encoder import RetrievalHead, load_head
from ..runtime.bundle import (
    MANIFEST,
    TOKENIZER,
    DecoderSettings,
    Manifest,
    RestoreSettings,
    TensorSpec,
    square_grid,
)
from ..runtime.bundle import Graph as GraphEntry
from ..runtime.engines.base import Int64
from ..runtime.errors import ItuneError
from ..runtime.manifest import FileHash
from ..runtime.search import SearchConfig
from ..runtime.settings import RetrievalSettings, SearchDefaults, Size
from .card import MODEL_CARD, default_license, model_card
from .graph.builder import Graph
from .graph.embedding import EmbeddingReference
from .methods.registry import build_decoder, build_vision, decoder_settings
from .options import ExportOptions
from .quantize.products import Blocks, Form, Rows
from .quantize.rewrite import Precision, halve_graph, quantize_graph
from .staging import staged_folder
from .tensorrt.plans import PlanWriter, Report, Role
from .tensorrt.profiles import PlanLimits
from .verify.compare import VALUE_SCALES
from .verify.report import Check, VerificationError
from .verify.scenarios import pick_images
from .verify.verification import verify_bundle
from .vocabulary import Vocabulary

ROLES: tuple[Role, ...] = ("vision", "decoder")
_FORMS: dict[tuple[Role, Precision], Form] = {
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
    search: Mapping[str, Any] | None = None,
    dev: Sequence[Record] = (),
    progress: Callable[[str], None] = lambda _stage: None,
    report: Callable[[list[Check]], None] = lambda _checks: None,
    report_plan: Report = lambda _role, _layers: None,
) -> Manifest:
    """Export a checkpoint (its folder, or a training's output folder) to the bundle `output`.

    The bundle appears whole or not at all. `search` are search defaults that differ from what the training evaluated
    with (None is not given); `dev` are photos to score the graphs on; `progress` is told every stage, `report` what the
    verification measured, and `report_plan` what each graph became in TensorRT.

    Raises:
        VerificationError: the graphs do not compute what the checkpoint does; there is no bundle then.
        ItuneError: the checkpoint cannot be loaded or exported, or `output` exists (`force` replaces a bundle).
    """
    tensorrt, retrieve, vision_precision = options.target == "tensorrt", options.retrieve, options.vision_precision
    precision: Precision = options.precision or ("fp16" if tensorrt else "fp32")
    vocabulary = None if options.vocabulary is None else Vocabulary.read(options.vocabulary, options.data)
    patches = None if options.patch_grid is None else _parse_grid(options.patch_grid)
    images = options.images
    checkpoint = find_checkpoint(checkpoint)
    trained = load_config(checkpoint).retrieval
    if tensorrt and (retrieve is not None or trained is not None):
        raise ItuneError("--target tensorrt: plans of captioners that retrieve are not supported; export --target onnx")
    if vocabulary is not None and (retrieve is not None or trained is not None):
        raise ItuneError(
            "--vocabulary: retrieved captions may hold any token, which a shortlist cannot read; leave it out"
        )
    default: Precision = "int8" if precision == "int4" else precision
    precisions: dict[Role, Precision] = {"vision": vision_precision or default, "decoder": precision}
    text = None if options.model_card is None else _read_card(options.model_card)
    writer = None
    if tensorrt:
        writer = PlanWriter.prepare(options, precisions, report_plan)
        writer = replace(writer, limits=replace(writer.limits, max_new_tokens=(search or {}).get("max_new_tokens")))
    with staged_folder(output, force=options.force, own=_exported) as folder:
        progress("loading the checkpoint")
        loaded = LoadedCheckpoint.load(checkpoint)
        manifest = _describe(loaded, checkpoint, search or {}, options.name or output.absolute().name, options.license)
        manifest = manifest.model_copy(update={"patches": _patches(loaded.tower, patches)})
        head, reference = None, None
        if retrieve is not None or trained is not None:
            pooling = None if trained is None else trained.encoder.pooling
            head = load_head(loaded.tower, loaded.config.vision.source, pooling)
            retrieval = trained or RetrievalSettings(k=0, encoder=head.encoder)
            if retrieve is not None:
                retrieval = retrieval.model_copy(update={"k": retrieve})
            manifest = manifest.model_copy(update={"retrieval": retrieval})
            reference = EmbeddingReference.record(loaded.tower, head, pick_images(loaded.config.image, images))
        token_ids = None
        if vocabulary is not None:
            token_ids = vocabulary.token_ids(loaded.language.tokenizer, manifest.text, manifest.tokens)
            manifest = _shortlisted(manifest, vocabulary, len(token_ids))
        loaded.language.tokenizer.save(str(folder / TOKENIZER))
        if writer is not None:
            manifest = _within(manifest, writer.limits.of(manifest.tokens))
        if writer is not None and vision_precision is None:
            writer = writer.for_tower(loaded.tower)
            precisions = dict(writer.precisions)
        if writer is None:
            files = _write_graphs(loaded, folder, precisions, token_ids, progress, head)
        else:
            files, scales = _write_typed(writer, loaded, folder, manifest, token_ids, progress)
            if scales:
                manifest = manifest.model_copy(update={"provenance": manifest.provenance | {VALUE_SCALES: scales}})
        del loaded
        gc.collect()  # the checks below load their own copies

        graphs = [_graph_entry(role, precisions[role], files[role]) for role in ROLES]
        manifest = manifest.model_copy(update={"graphs": graphs})
        manifest = _write_manifest(manifest, folder, text)
        if options.verify:
            checks = verify_bundle(checkpoint, folder, images=images, dev=dev, vocabulary=token_ids, progress=progress)
            checks += [] if reference is None else [reference.check(folder, precisions["vision"])]
            report(checks)
            _raise_if_failed(checks)
        if writer is not None:
            built = writer.build(manifest, folder, progress)
            manifest = _write_manifest(manifest.model_copy(update={"graphs": [*graphs, *built]}), folder, text)
    return manifest


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ItuneError(f"--model-card {path}: is not UTF-8 text (byte {error.start})") from None


def _write_manifest(manifest: Manifest, folder: Path, card: str | None) -> Manifest:
    """Hash the bundle's files and write its model card and manifest."""
    files = {path.name: FileHash.of(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    manifest = manifest.model_copy(update={"files": files})
    (folder / MODEL_CARD).write_text(card or model_card(manifest), encoding="utf-8")
    manifest = manifest.model_copy(update={"files": files | {MODEL_CARD: FileHash.of(folder / MODEL_CARD)}})
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _within(manifest: Manifest, limits: PlanLimits) -> Manifest:
    """The manifest with search defaults that the plans have room for."""
    search = manifest.search
    room = {"num_beams": limits.max_beams, "max_new_tokens": limits.max_new_tokens}
    defaults = search.model_copy(update={name: min(getattr(search, name), most) for name, most in room.items()})
    return manifest.model_copy(update={"search": defaults})


def _write_typed(
    writer: PlanWriter,
    loaded: LoadedCheckpoint,
    folder: Path,
    manifest: Manifest,
    vocabulary: Int64 | None,
    progress: Callable[[str], None],
) -> tuple[dict[Role, list[Path]], dict[str, float]]:
    """The same for TensorRT, from fp32 graphs that are there together: photos are captioned with them in between.

    With the files comes what `PlanWriter.write_graphs` scaled.
    """
    fp32 = folder / "fp32"
    fp32.mkdir()
    progress("writing the graphs in fp32")
    sources: dict[Role, Path] = {"vision": build_vision(loaded.model, loaded.tower).save(fp32 / "vision.onnx")[0]}
    del loaded.tower
    sources["decoder"] = build_decoder(loaded.model, vocabulary).save(fp32 / "decoder.onnx")[0]
    del loaded.model, loaded.language
    gc.collect()
    written = writer.write_graphs(sources, folder, manifest, progress)
    shutil.rmtree(fp32)
    return written


def _write_graphs(
    loaded: LoadedCheckpoint,
    folder: Path,
    precisions: dict[Role, Precision],
    vocabulary: Int64 | None,
    progress: Callable[[str], None],
    head: RetrievalHead | None = None,
) -> dict[Role, list[Path]]:
    """Both graphs' files by role, the graph first; the checkpoint's weights are let go as they are written."""
    fp32 = folder / "fp32"
    fp32.mkdir()
    files: dict[Role, list[Path]] = {}

    def write(role: Role, graph: Graph) -> None:
        precision, path = precisions[role], folder / f"{role}.onnx"
        if precision == "fp32":
            files[role] = graph.save(path)
            return
        (source, *_) = graph.save(fp32 / path.name)
        if precision == "fp16":
            files[role] = halve_graph(source, path)
        else:
            files[role] = quantize_graph(source, path, _FORMS[role, precision])

    progress(f"writing the vision graph in {precisions['vision']}")
    write("vision", build_vision(loaded.model, loaded.tower, head))
    del loaded.tower
    progress(f"writing the decoder graph in {precisions['decoder']}")
    # Integer products run on ONNX Runtime only, so such a decoder may as well have its attention.
    fused = precisions["decoder"] in ("int8", "int4")
    write("decoder", build_decoder(loaded.model, vocabulary, fused=fused))
    del loaded.model, loaded.language
    gc.collect()
    shutil.rmtree(fp32)
    return files


def _describe(
    loaded: LoadedCheckpoint, checkpoint: Path, search: Mapping[str, Any], name: str, license: str | None
) -> Manifest:
    """The manifest, but for its graphs and files."""
    config, gpt2, tower = loaded.config, loaded.language.model.config, loaded.tower
    tokens = eager_captioner(loaded).tokens
    return Manifest(
        name=name,
        method=loaded.model.method,
        graphs=[],
        files={},
        image=config.image,
        text=config.text,
        tokens=tokens,
        decoder=DecoderSettings(
            layers=gpt2.n_layer,
            heads=gpt2.n_head,
            head_dim=gpt2.n_embd // gpt2.n_head,
            hidden_size=gpt2.n_embd,
            **decoder_settings(loaded.model),
            visual_tokens=config.vision.tokens,
            visual_width=config.vision.width,
        ),
        search=_search_defaults(config.search, search, tokens.room),
        provenance={
            "itune": __version__,
            "exported": datetime.now(UTC).isoformat(timespec="seconds"),
            "language_model": config.language_model.model_dump(),
            "vision": config.vision.model_dump(),
            "checkpoint": {file: hash_files([checkpoint / file]) for file in (WEIGHTS_FILE, CONFIG_FILE)},
            "training": config.training,
        },
        restore=RestoreSettings(
            language_model=_config_json(gpt2),
            vision=_config_json(tower.model.config) if isinstance(tower, ClipTower) else None,
            checkpoint=config.model_dump(mode="json", by_alias=True),
        ),
        license=license or default_license(config.language_model.source, config.vision.source),
    )


def _patches(tower: VisionTower, given: Size | None) -> Size | None:
    """How a tower's last embeddings lie in the image; None if nobody knows."""
    if isinstance(tower, ClipTower):
        own = square_grid(tower.tokens - 1)
        if given not in (None, own):
            raise ItuneError(
                f"--patch-grid {_times(given)} contradicts the CLIP tower, whose patches are {_times(own)}"
            )
        return own
    if given and given[0] * given[1] > tower.tokens:
        raise ItuneError(f"--patch-grid {_times(given)}: the vision tower gives {tower.tokens} embeddings only")
    return given or square_grid(tower.tokens)


def _parse_grid(text: str) -> Size:
    rows, _, columns = text.lower().replace("×", "x").partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise ItuneError(f"--patch-grid {text!r} is not ROWSxCOLUMNS, such as 9x9")
    return int(rows), int(columns)


def _times(grid: Size | None) -> str:
    return "x".join(map(str, grid or ()))


def _shortlisted(manifest: Manifest, vocabulary: Vocabulary, size: int) -> Manifest:
    return manifest.model_copy(
        update={
            "tokens": manifest.tokens.model_copy(update={"shortlist": size}),
            "provenance": manifest.provenance | {"vocabulary": vocabulary.sha256},
            "restore": None,  # the other tokens' embeddings are not in the bundle
        }
    )


def _exported(folder: Path) -> Collection[str]:
    """The names in a folder that was exported to."""
    return listed_files(folder / MANIFEST)


def _search_defaults(trained: SearchDefaults, given: Mapping[str, Any], room: int) -> SearchDefaults:
    """What is given, else the checkpoint's; `room` is how many tokens the decoder has positions for."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen.get("max_new_tokens", 0) > room:
        raise ItuneError(f"--max-new-tokens {chosen['max_new_tokens']}: the language model has positions for {room}")
    try:
        found = SearchDefaults(**(trained.model_dump() | chosen)).within(room)
    except ValidationError as error:
        first = error.errors()[0]
        raise ItuneError(f"search option {first['loc'][0]}: {first['msg']}") from None
    SearchConfig(**found.model_dump())  # which the runtime will ask for: raises SearchError
    return found


def _config_json(config: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config.to_json_string())
    return content


def _graph_entry(role: Role, precision: Precision, files: list[Path]) -> GraphEntry:
    graph = Graph.load(files[0])
    return GraphEntry(
        role=role,
        engine="any" if set(graph.opsets) == {""} else "onnxruntime",
        precision=precision,
        file=files[0].name,
        external_data=[path.name for path in files[1:]],
        inputs=[_tensor_spec(value) for value in graph.inputs],
        outputs=[_tensor_spec(value) for value in graph.outputs],
    )


def _tensor_spec(value: ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    return TensorSpec(
        name=value.name,
        dtype=helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        shape=[dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    )


def _raise_if_failed(checks: list[Check]) -> None:
    failed = [check for check in checks if not check.passed]
    if failed:
        first, others = failed[0], f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise VerificationError(
            f"the graphs do not compute what the checkpoint does, so no bundle was written: {first.output} "
            f"is {first.value:.2g} where {first.limit:.2g} is allowed, in {first.case}{others}"
        )
