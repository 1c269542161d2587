"""The bundle: a folder with everything that a captioner needs at run time, described by its `bundle.json`."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isqrt
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import BundleError, reading
from .manifest import Count, FileHash, FileName, ManifestFolder, Positive
from .onnx_files import check_external_files
from .settings import (
    ACTIVATIONS,
    Finite,
    ImageSettings,
    Method,
    RetrievalSettings,
    SearchDefaults,
    Settings,
    Sha256,
    Size,
    TextSettings,
)

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
DEFAULT = Path("default")


class TensorSpec(Settings):
    """One input or output of a graph; a dimension is a size, or a name if it varies."""

    name: str
    dtype: str
    """As NumPy spells it: "float32", "int64", "uint8", "bool"..."""
    shape: list[int | str]


class ProfileRange(Settings):
    """The range of an input in an optimisation profile: of its shape, or of the values of a shape input (`k`)."""

    min: list[Count]
    opt: list[Count]
    max: list[Count]


class PlanSettings(Settings):
    """How a TensorRT plan was built: it runs only with the same version, on these GPUs, within these profiles."""

    flavour: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    compute_capabilities: list[Annotated[str, Field(pattern="^sm[0-9]+$")]] = Field(min_length=1)
    """Such as "sm86"."""
    profiles: list[dict[str, ProfileRange]] = Field(min_length=1)
    """One for each optimisation profile of the plan, in its order; keys are the inputs' names."""
    source: FileName
    """The ONNX graph in the same bundle that the plan was built from."""
    source_sha256: Sha256


class GraphEntry(Settings):
    """An entry of the manifest: one graph file, its role, and the engines that can run it."""

    role: str
    """"vision" or "decoder"."""
    engine: str
    """"any" (standard ONNX operators), "onnxruntime" or "tensorrt"."""
    precision: str
    file: FileName
    external_data: list[FileName] = Field(default_factory=list)
    """Files with the weights of a graph over ONNX's limit of 2 GB."""
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    target: str | None = None
    """The GPUs that a plan was built for, such as "sm86,sm89"; None: any."""
    plan: PlanSettings | None = None
    """None for ONNX graphs."""

    @model_validator(mode="after")
    def _plan_of_tensorrt(self) -> Self:
        if (self.engine == "tensorrt") != (self.plan is not None):
            raise ValueError(
                f"plan does not fit engine {self.engine!r}: TensorRT needs a plan, other engines have none"
            )
        return self


class TokenSettings(Settings):
    """The prompt and end tokens of a caption, and the decoder's limits."""

    begin: Count | None
    """None: no token comes between the image's embeddings and the prompt text."""
    end: Count
    prompt: list[Count] = Field(default_factory=list)
    """The ids of the prompt text, between `begin` and the caption."""
    prefix: Count = 0
    """How many embeddings of the image come before `begin` (ClipCap); the ids after the vocabulary's stand for them."""
    vocab_size: Positive
    shortlist: Positive | None = None
    """How many tokens of the vocabulary the decoder can read and write; None: all."""
    max_positions: Positive

    @property
    def prompt_tokens(self) -> list[int]:
        """Everything before a caption: the image's prefix, begin, and the prompt text."""
        return [*range(self.vocab_size, self.vocab_size + self.prefix), *self.text_prompt_tokens]

    @property
    def text_prompt_tokens(self) -> list[int]:
        """The prompt tokens without the image's prefix."""
        return [*([] if self.begin is None else [self.begin]), *self.prompt]

    @property
    def room(self) -> int:
        """Maximum length of a caption in tokens: the last one is not fed back, so it needs no position."""
        return self.max_positions - self.prefix - len(self.text_prompt_tokens) + 1

    @property
    def candidates(self) -> int:
        """How many different tokens the decoder can write."""
        return self.shortlist or self.vocab_size

    @model_validator(mode="after")
    def _fits_the_decoder(self) -> Self:
        before, largest = self.prefix + len(self.text_prompt_tokens), max([self.end, *self.text_prompt_tokens])
        if not 0 < before <= self.max_positions or largest >= self.vocab_size:
            raise ValueError(
                f"{before} prompt tokens need 1 to {self.max_positions} positions, and the largest token id {largest} "
                f"a vocabulary of more than {self.vocab_size}"
            )
        return self


class DecoderSettings(Settings):
    """The shape of the language model and its adapters."""

    layers: Positive
    heads: Positive
    head_dim: Positive
    hidden_size: Positive
    adapter_layers: list[Count]
    """The layers that attend to the image; empty for ClipCap, whose next four fields are None."""
    bottleneck: Positive | None
    """Width of the adapters' queries, keys and values, all heads together."""
    adapter_heads: Positive | None
    lambda_: Finite | None = Field(validation_alias="lambda", serialization_alias="lambda")
    """I-Tuning only."""
    score_scale: Finite | None
    """The factor on Q K^T; like lambda, it is already folded into the graph's weights."""
    visual_tokens: Positive
    visual_width: Positive


class LanguageModelSettings(BaseModel):
    """What the native engine needs of a GPT-2's `config.json`, with its names and defaults."""

    model_config = ConfigDict(frozen=True)

    n_inner: Positive | None = None
    activation_function: Annotated[str, Field(pattern=f"^({'|'.join(ACTIVATIONS)})$")] = "gelu_new"
    layer_norm_epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False


class VisionModelSettings(BaseModel):
    """What the native engine needs of a CLIP vision tower's `config.json`, with its names and defaults."""

    model_config = ConfigDict(frozen=True)

    hidden_size: Positive = 768
    intermediate_size: Positive = 3072
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    image_size: Positive = 224
    patch_size: Positive = 32
    hidden_act: Annotated[str, Field(pattern=f"^({'|'.join(ACTIVATIONS)})$")] = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5


class RestoreSettings(Settings):
    """What `itune-export --restore` needs besides the graphs' weights."""

    language_model: dict[str, Any]
    """`config.json` of the language model; the native engine reads it, too."""
    vision: dict[str, Any] | None
    """`config.json` of a CLIP tower; None for an ONNX tower, which the vision graph contains unchanged."""
    checkpoint: dict[str, Any]
    """`itune.json` of the adapters."""


class Manifest(Settings):
    """The content of `bundle.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION  # first, so that another version is the first error
    name: str
    method: Method = "i-tuning"
    graphs: list[GraphEntry]
    image: ImageSettings
    text: TextSettings
    tokens: TokenSettings
    decoder: DecoderSettings
    search: SearchDefaults = SearchDefaults()
    patches: Size | None = None
    """(rows, columns) of the image's patches: the last visual tokens, row by row; those before them (CLS, registers)
    have no position in the image. None: unknown, see `patch_grid`."""
    retrieval: RetrievalSettings | None = None
    """How retrieved captions become the prompt; None where the vision graph has no embedding output."""
    files: dict[FileName, FileHash]
    """Every file of the bundle except the manifest."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    restore: RestoreSettings | None = None
    license: str
    """Of the weights; the code has its own."""
    gpt2: LanguageModelSettings | None = None
    """Of a bundle without `restore`."""
    clip: VisionModelSettings | None = None
    """The same of its tower, if that is a CLIP."""

    @property
    def language_model(self) -> LanguageModelSettings | None:
        """What the native engine needs of the language model's configuration; None: the bundle does not say.

        Raises:
            ValueError: a field is wrong.
        """
        if self.gpt2 is None and self.restore is not None:
            return LanguageModelSettings.model_validate(self.restore.language_model)
        return self.gpt2

    @property
    def vision_model(self) -> VisionModelSettings | None:
        """The same of the CLIP tower; None: the tower is another one, or the bundle does not say.

        Raises:
            ValueError: a field is wrong.
        """
        if self.restore is None or self.restore.vision is None:
            return self.clip
        return VisionModelSettings.model_validate(self.restore.vision)

    @property
    def patch_grid(self) -> Size | None:
        """`patches`, or the square that all visual tokens form, with or without a CLS; None if neither fits."""
        grid = self.patches or square_grid(self.decoder.visual_tokens)
        return grid if grid and grid[0] * grid[1] <= self.decoder.visual_tokens else None

    def to_json(self) -> str:
        """The text of `bundle.json`."""
        # So that earlier versions can read the bundle.
        unneeded = {name for name in ("gpt2", "clip") if getattr(self, name) is None}
        return self.model_dump_json(by_alias=True, indent=2, exclude=unneeded) + "\n"


BUNDLE_FOLDER = ManifestFolder(MANIFEST, Manifest, BundleError, "copy the bundle again, or export it with itune-export")


def square_grid(visual_tokens: int) -> Size | None:
    """The square grid of a tower's patches, with or without a CLS token; None if they form no square."""
    for patches in (visual_tokens, visual_tokens - 1):
        side = isqrt(patches)
        if side and side * side == patches:
            return side, side
    return None


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest and files were checked."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, folder: Path, *, verify: bool = True) -> Bundle:
        """Read and check a bundle; `verify=False` skips the hashes (sizes are always compared).

        The name `default` stands for the model that is installed with the package, even if a folder has that name.
        Only the graphs, their weights and the tokenizer are checked: a README may be edited.

        Raises:
            BundleError: not a bundle, another schema version, a broken field, or a file that is missing or damaged.
        """
        if folder == DEFAULT:
            folder = default_bundle()
        manifest = BUNDLE_FOLDER.read(folder)
        used = {TOKENIZER} | {name for graph in manifest.graphs for name in (graph.file, *graph.external_data)}
        BUNDLE_FOLDER.check(folder, manifest.files, used, hash_up_to=inf if verify else -1)
        for graph in manifest.graphs:
            with reading(folder / graph.file, BundleError, BUNDLE_FOLDER.mend):
                if graph.plan is None:
                    check_external_files(folder, graph.file, graph.external_data)
        return cls(folder, manifest)

    def path(self, name: str) -> Path:
        """Path of a file of the bundle."""
        return self.folder / name

    def graph(self, role: str, engine: str = "any") -> GraphEntry:
        """The graph of `role` for `engine`, or else one that any engine can run.

        Raises:
            BundleError: the bundle has no such graph.
        """
        for wanted in (engine, "any"):
            for graph in self.manifest.graphs:
                if graph.role == role and graph.engine == wanted:
                    return graph
        found = ", ".join(f"{graph.role} for {graph.engine}" for graph in self.manifest.graphs) or "none"
        raise BundleError(
            f"{self.folder / MANIFEST}: graphs: no {role!r} graph for engine {engine!r} (found: {found}); export the "
            "bundle again"
        )


def default_bundle() -> Path:
    """Folder of the model that is installed with the package; without one, a folder that `Bundle.load` refuses."""
    models = Path(__file__).parent / "models"
    return min((manifest.parent for manifest in models.glob(f"*/{MANIFEST}")), default=models)
