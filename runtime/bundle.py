"""The bundle: a folder that holds everything a captioner needs at run time, described by its `bundle.json`.

A bundle comes from anywhere, so nothing in it is believed: see `manifest.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from .errors import BundleError
from .manifest import Count, FileHash, FileName, ManifestFolder, Positive, Sha256
from .settings import ImageSettings, Method, RetrievalSettings, SearchDefaults, Settings, Size, TextSettings

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
DEFAULT = Path("default")
Finite = Annotated[float, Field(allow_inf_nan=False)]


class TensorSpec(Settings):
    """One input or output of a graph; a dimension is its size, or the name of what varies."""

    name: str
    dtype: str
    """As NumPy spells it: "float32", "int64", "uint8", "bool"..."""
    shape: list[int | str]


class ProfileRange(Settings):
    """What an optimisation profile lets an input be: its shape, or the values of a shape input (`k`)."""

    min: list[Count]
    opt: list[Count]
    max: list[Count]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        sizes = list(zip(self.min, self.opt, self.max, strict=False))
        if len({len(self.min), len(self.opt), len(self.max)}) > 1 or any(a > b or b > c for a, b, c in sizes):
            raise ValueError(f"min {self.min}, opt {self.opt} and max {self.max} do not ascend")
        return self


class PlanSettings(Settings):
    """What a TensorRT plan was built with: it runs with the same version, on those GPUs, within the profiles."""

    flavour: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    compute_capabilities: list[Annotated[str, Field(pattern="^sm[0-9]+$")]] = Field(min_length=1)
    """Such as "sm86"."""
    profiles: list[dict[str, ProfileRange]] = Field(min_length=1)
    """By the input's name, for each optimisation profile in the plan's order."""
    source: FileName
    """The ONNX graph that it was built from, in the same bundle."""
    source_sha256: Sha256


class Graph(Settings):
    """One graph file, what it does, and what can run it."""

    role: str
    """"vision" or "decoder"."""
    engine: str
    """"any" (standard ONNX operators), "onnxruntime" or "tensorrt"."""
    precision: str
    file: FileName
    external_data: list[FileName] = Field(default_factory=list)
    """The files with the weights of a graph that is over ONNX's 2 GB."""
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    target: str | None = None
    """The GPUs that a plan was built for, such as "sm86,sm89"; None when it runs anywhere."""
    plan: PlanSettings | None = None
    """How a TensorRT plan was built; None for ONNX graphs."""

    @model_validator(mode="after")
    def _plan_of_tensorrt(self) -> Self:
        if (self.engine == "tensorrt") != (self.plan is not None):
            raise ValueError(f"engine {self.engine!r} and plan: a TensorRT plan has both, another graph neither")
        return self


class TokenSettings(Settings):
    """The token ids around a caption, and the decoder's limits."""

    begin: Count | None
    """None where the image's embeddings themselves begin."""
    end: Count
    prompt: list[Count] = Field(default_factory=list)
    """The ids of the prompt text, between `begin` and the caption."""
    prefix: Count = 0
    """How many embeddings of the image stand before all of that; their ids are those that follow the vocabulary's."""
    vocab_size: Positive
    shortlist: Positive | None = None
    """How many tokens of the vocabulary the decoder can read and write; None is all of them."""
    max_positions: Positive

    @property
    def head(self) -> list[int]:
        """What stands before a caption: the image's prefix, begin, then the prompt."""
        return [*range(self.vocab_size, self.vocab_size + self.prefix), *self.text_head]

    @property
    def text_head(self) -> list[int]:
        """The same without the prefix: tokens of the vocabulary."""
        return [*([] if self.begin is None else [self.begin]), *self.prompt]

    @property
    def room(self) -> int:
        """The longest caption, in tokens: the last one is not fed back, so it needs no position."""
        return self.max_positions - len(self.head) + 1

    @property
    def candidates(self) -> int:
        """How many tokens a caption can be written with."""
        return self.shortlist or self.vocab_size

    @model_validator(mode="after")
    def _in_vocabulary(self) -> Self:
        before = self.prefix + len(self.text_head)
        if before > self.max_positions:
            raise ValueError(f"{before} tokens stand before a caption, and there are {self.max_positions} positions")
        if max([self.end, *self.text_head]) >= self.vocab_size:
            raise ValueError(f"a token id is outside the vocabulary of {self.vocab_size}")
        if not self.head:
            raise ValueError("nothing stands before a caption: begin, prompt and prefix are all missing")
        return self


class DecoderSettings(Settings):
    """The shape of the language model and its adapters: what a restore rebuilds, and a profile allows for."""

    layers: Positive
    heads: Positive
    head_dim: Positive
    hidden_size: Positive
    adapter_layers: list[Count]
    """The layers that attend to the image; none for ClipCap, whose fields below are None, too."""
    bottleneck: Positive | None
    """The width of their queries, keys and values, all heads together."""
    adapter_heads: Positive | None
    lambda_: Finite | None = Field(validation_alias="lambda", serialization_alias="lambda")
    """I-Tuning's alone."""
    score_scale: Finite | None
    """The factor on Q K^T, already folded into the graph's weights, as lambda is."""
    visual_tokens: Positive
    visual_width: Positive


class RestoreSettings(Settings):
    """What `itune-export --restore` needs besides the graphs' weights; nothing at run time reads it."""

    language_model: dict[str, Any]
    """Its `config.json`."""
    vision: dict[str, Any] | None
    """The `config.json` of a CLIP tower; None for an ONNX tower, which is in the vision graph as it was."""
    checkpoint: dict[str, Any]
    """The adapters' `itune.json`."""


class Manifest(Settings):
    """The content of `bundle.json`."""

    schema_version: int = SCHEMA_VERSION
    name: str
    method: Method = "i-tuning"
    graphs: list[Graph]
    image: ImageSettings
    text: TextSettings
    tokens: TokenSettings
    decoder: DecoderSettings
    search: SearchDefaults = SearchDefaults()
    patches: Size | None = None
    """(rows, columns) of the image's patches, which the last visual tokens stand for, row by row; those before them
    (CLS, registers) have no place. None: not told by the export, see `patch_grid`."""
    retrieval: RetrievalSettings | None = None
    """How captions of a datastore are put before a caption; None where the vision graph gives no embedding."""
    files: dict[FileName, FileHash]
    """Every file of the bundle but the manifest itself."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    restore: RestoreSettings | None = None
    license: str
    """Of the weights, which is not the code's."""

    @model_validator(mode="after")
    def _patches_are_tokens(self) -> Self:
        if self.patches and self.patches[0] * self.patches[1] > self.decoder.visual_tokens:
            raise ValueError(f"patches {self.patches} are more than the {self.decoder.visual_tokens} visual tokens")
        return self

    @property
    def patch_grid(self) -> Size | None:
        """`patches`, or the square that all visual tokens make, or all but a CLS; None if they make none."""
        return self.patches or square_grid(self.decoder.visual_tokens)

    def to_json(self) -> str:
        """The text of `bundle.json`."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


FOLDER = ManifestFolder(
    noun="bundle",
    manifest=MANIFEST,
    model=Manifest,
    version_field="schema_version",
    version=SCHEMA_VERSION,
    error=BundleError,
    maker="itune-export",
    rebuild="export the bundle again",
)


def square_grid(visual_tokens: int) -> Size | None:
    """The grid of a tower that gives a square of patches, alone or behind a CLS; None if it does not."""
    for patches in (visual_tokens, visual_tokens - 1):
        side = isqrt(patches)
        if side and side * side == patches:
            return side, side
    return None


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read and whose files were checked."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, folder: Path, *, verify: bool = True) -> Bundle:
        """Read and check a bundle; `verify=False` skips the hashes (sizes are always compared).

        The folder `default`, where there is none of that name, is the model that is installed with the package.

        Raises:
            BundleError: not a bundle, another schema version, a broken field, a file that is missing, damaged
                or outside the folder.
        """
        if folder == DEFAULT and not folder.exists():
            folder = default_bundle()
        bundle = cls(folder, FOLDER.read(folder))
        files = bundle.manifest.files
        graphs = bundle.manifest.graphs
        used = {TOKENIZER} | {name for graph in graphs for name in (graph.file, *graph.external_data)}
        if unlisted := sorted(used - files.keys()):
            raise BundleError(f"{folder / MANIFEST}: files: {unlisted[0]!r} is not listed; export the bundle again")
        for name, expected in files.items():
            FOLDER.check(folder, name, expected, verify=verify)
        return bundle

    def path(self, name: str) -> Path:
        """Where a file of the bundle is."""
        return self.folder / name

    def graph(self, role: str, engine: str = "any") -> Graph:
        """The graph of `role` that `engine` runs: one made for it, else one that any engine runs.

        Raises:
            BundleError: the bundle has no such graph.
        """
        for wanted in (engine, "any"):
            for graph in self.manifest.graphs:
                if graph.role == role and graph.engine == wanted:
                    return graph
        there = ", ".join(f"{graph.role} for {graph.engine}" for graph in self.manifest.graphs) or "none"
        raise BundleError(
            f"{self.folder / MANIFEST}: graphs: no {role!r} graph for engine {engine!r} (there are: {there})"
        )


def default_bundle() -> Path:
    """The folder of the model that is installed with the package.

    Raises:
        BundleError: the package was built without a model.
    """
    models = Path(__file__).parent / "models"
    found = sorted(manifest.parent for manifest in models.glob(f"*/{MANIFEST}"))
    if len(found) != 1:
        raise BundleError(f"{models} holds {len(found)} models instead of one; give the folder of a bundle instead")
    return found[0]
