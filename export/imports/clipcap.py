"""Published checkpoints of other codebases, as checkpoints of ours.

A method is a function from a state dict to its model; which one it is, the tensors' names tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...backbones import LanguageModel, VisionTower, load_clip_projection, load_language_model, load_vision_tower
from ...checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError, ModelSource, VisionSource, save_config
from ...files import hash_files
from ...methods.base import CaptionModel
from ...methods.clipcap.model import ClipCapConfig, ClipCapModel, Pooling
from ...methods.schemas import CHECKPOINTS
from ...retrieval.encoder import load_head
from ...runtime.bundle import TOKENIZER
from ...runtime.settings import RetrievalSettings, SearchDefaults, TextSettings
from ..staging import staged_folder
from .smallcap import SEARCH, TEXT, is_smallcap, language_model_state, read_smallcap, retrieved_captions
from .state_dicts import State, fitted, read_state, weight

LANGUAGE_MODEL, VISION = "openai-community/gpt2", "openai/clip-vit-base-patch32"
"""What the published checkpoints were trained on, but for ClipCap's on CLIP's RN50x4."""
_FINE_TUNED = "language-model"
"""The folder, within the checkpoint's, of a language model that was trained, too."""
_BUFFERS = (".attn.bias", ".attn.masked_bias")
"""The causal masks that older releases of transformers saved with the weights."""
_EMBEDDING = "transformer.wte.weight"


@dataclass(frozen=True)
class ImportOptions:
    """What a state dict leaves open."""

    language_model: str = LANGUAGE_MODEL
    """Hub id or folder of the GPT-2; its weights are only used where the state dict has none of its own."""
    vision: str = VISION
    """Hub id or folder of the vision tower."""
    normalize: bool = False
    """ClipCap: it was trained with --normalize_prefix."""


@dataclass(frozen=True)
class Imported:
    """A model with its weights, and how its captions are written."""

    model: CaptionModel
    text: TextSettings
    fine_tuned: bool
    """The language model is no longer the one that `ImportOptions` names."""
    retrieval: RetrievalSettings | None = None
    """The retrieved captions that it was trained with."""
    search: SearchDefaults = field(default_factory=SearchDefaults)
    """How its authors search."""


def import_checkpoint(file: Path, output: Path, options: ImportOptions, *, force: bool = False) -> None:
    """Write the published checkpoint `file` (.pt, .bin or .safetensors) as a checkpoint of ours to `output`.

    The language model is referenced as always; only one that was fine-tuned is written into the folder.

    Raises:
        CheckpointError: the file is no state dict that is known here, or fits neither language model nor tower.
        ItuneError: `output` exists (`force` replaces a checkpoint).
    """
    state = read_state(file)
    read = next((read for knows, read in _IMPORTERS if any(map(knows, state))), None)
    if read is None:
        raise CheckpointError(
            f"--import {file}: is no checkpoint of ClipCap or SmallCap, whose tensors are named clip_project.* and "
            f"*.crossattention.*; the first one here is {next(iter(state))}"
        )
    with staged_folder(output, force=force, own=_imported) as folder:
        language = load_language_model(options.language_model)
        tower = load_vision_tower(options.vision)
        imported = read(file, state, language, tower, options)
        source = ModelSource.of_language_model(language, options.language_model, output)
        if imported.fine_tuned:
            language.model.save_pretrained(folder / _FINE_TUNED)
            language.tokenizer.save(str(folder / _FINE_TUNED / TOKENIZER))
            weights = sorted((folder / _FINE_TUNED).glob("*.safetensors"))
            source = ModelSource(source=_FINE_TUNED, sha256=hash_files(weights))
        imported.model.save_adapters(folder / WEIGHTS_FILE)
        config = CHECKPOINTS[imported.model.method](
            language_model=source,
            vision=VisionSource.of_tower(tower, options.vision, output),
            image=tower.image,
            text=imported.text,
            retrieval=imported.retrieval,
            search=imported.search,
            training={"imported": file.name},
            **imported.model.describe(),
        )
        save_config(config, folder)


def _imported(folder: Path) -> Collection[str]:
    """The names in a folder that something was imported to."""
    return (CONFIG_FILE, WEIGHTS_FILE, _FINE_TUNED) if (folder / CONFIG_FILE).is_file() else ()


def import_clipcap(
    file: Path, state: State, language: LanguageModel, tower: VisionTower, options: ImportOptions
) -> Imported:
    """The state dict of `ClipCaptionModel` and `ClipCaptionPrefix` of https://github.com/rmokady/CLIP_prefix_caption.

    Both have the language model in them, under `gpt.`; only the former's differs from the GPT-2 that it started from.
    Captions begin right after the prefix and end with a period, which is the end token and so none of the caption's.
    """
    fine_tuned = _load_gpt2(
        file, {n.removeprefix("gpt."): t for n, t in state.items() if n.startswith("gpt.")}, language
    )
    mapper = {n.replace("clip_project", "mapper", 1): t for n, t in state.items() if n.startswith("clip_project.")}
    shape = _clipcap_shape(file, mapper, language.model.config.n_embd)
    width = shape.pop("input_width")
    projection = load_clip_projection(options.vision)
    pooling: Pooling = "cls" if tower.kind == "clip" else "mean"
    if projection is not None and len(projection.weight) == width:
        pooling = "projected"
    elif tower.width != width:
        gives = f"{tower.width}" if projection is None else f"{len(projection.weight)} (projected) and {tower.width}"
        raise CheckpointError(
            f"--import {file}: its mapper reads image embeddings of {width}, and those of {options.vision} are of "
            f"{gives}: name the CLIP that it was trained on with --vision"
        )
    projected = projection if pooling == "projected" else None
    config = ClipCapConfig(
        hidden_size=language.model.config.n_embd,
        visual_width=tower.width,
        pooling=pooling,
        projected_width=None if projected is None else len(projected.weight),
        layer_norm_eps=1e-5 if projected is None else projected.epsilon,
        normalize=options.normalize,
        **shape,
    )
    model = ClipCapModel(language.model, config)
    if projected is not None:
        model.load_projection(projected)
    state = model.adapter_state()
    buffers = {name: tensor for name, tensor in state.items() if name.startswith("projection.")}
    expected = {name: tensor for name, tensor in state.items() if name not in buffers}
    model.load_adapter_state(fitted(file, mapper, expected, _clipcap_name) | buffers, file)
    return Imported(model, TextSettings(begin=None, end=".", strip_period=True), fine_tuned)


def import_smallcap(
    file: Path, state: State, language: LanguageModel, tower: VisionTower, options: ImportOptions
) -> Imported:
    """The state dict of `SmallCap` of https://github.com/RitaRamo/smallcap (see `export.import_smallcap`).

    Its prompt begins without a begin token. Captions were retrieved by another CLIP, RN50x64; here they are by the
    tower that the captioner has anyway.
    """
    fine_tuned = _load_gpt2(file, language_model_state(state), language, "decoder.")
    model = read_smallcap(file, state, language, tower)
    encoder = load_head(tower, options.vision).encoder
    k = retrieved_captions(file)
    retrieval = RetrievalSettings(k=k, encoder=encoder) if k else None
    return Imported(model, TEXT, fine_tuned, retrieval, SEARCH)


def _load_gpt2(file: Path, state: State, language: LanguageModel, prefix: str = "gpt.") -> bool:
    """Put the state dict's own language model into `language`; whether that changed it."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(_BUFFERS)}
    if not state:
        return False
    if _EMBEDDING in state:
        state.setdefault("lm_head.weight", state[_EMBEDDING])  # safetensors holds tied weights once
    own = language.model.state_dict()
    odd = next((n for n, t in own.items() if n not in state or state[n].shape != t.shape), None)
    odd = odd or next(iter(state.keys() - own.keys()), None)
    if odd is not None:
        found = list(state[odd].shape) if odd in state else "missing"
        wanted = list(own[odd].shape) if odd in own else "no such tensor"
        raise CheckpointError(
            f"--import {file}: its tensor {prefix}{odd} is {found}, and {language.folder} has {wanted}: name the GPT-2 "
            "that it was trained from with --language-model"
        )
    weights = {name: weight(file, f"{prefix}{name}", tensor, own[name].ndim) for name, tensor in state.items()}
    if all(torch.equal(tensor, own[name]) for name, tensor in weights.items()):
        return False
    language.model.load_state_dict(weights)
    return True


def _clipcap_name(name: str) -> str:
    """Of one of our mapper's weights, the name in ClipCap's own code."""
    return name.replace("mapper", "clip_project", 1)


def _clipcap_shape(file: Path, mapper: State, hidden_size: int) -> dict[str, Any]:
    """What the mapper's tensors tell of its shape: fields of `ClipCapConfig`, and `input_width`."""

    def matrix(name: str) -> Tensor:
        return weight(file, _clipcap_name(name), mapper[name], 2)

    if "mapper.prefix_const" in mapper and "mapper.linear.weight" in mapper:
        layers = {n.split(".")[3] for n in mapper if n.startswith("mapper.transformer.layers.")}
        (length, width), linear = matrix("mapper.prefix_const").shape, matrix("mapper.linear.weight")
        if not layers or len(linear) % width:
            raise CheckpointError(
                f"--import {file}: its clip_project has {len(layers)} layers and a linear.weight of {len(linear)} rows "
                f"for embeddings of {width}, and is none of ClipCap's"
            )
        shape: dict[str, Any] = {
            "mapper": "transformer",
            "prefix_length": length,
            "clip_length": len(linear) // width,
            "mapper_layers": len(layers),
            "mapper_heads": 8,  # that code has no other number
            "input_width": linear.shape[1],
        }
    elif "mapper.model.0.weight" in mapper and "mapper.model.2.weight" in mapper:
        first, second = matrix("mapper.model.0.weight"), matrix("mapper.model.2.weight")
        width = hidden_size if len(second) % hidden_size == 0 else len(second)
        shape = {"mapper": "mlp", "prefix_length": len(second) // width, "input_width": first.shape[1]}
    else:
        raise CheckpointError(f"--import {file}: its clip_project is neither of ClipCap's mappers")
    if width != hidden_size:
        raise CheckpointError(
            f"--import {file}: its mapper writes embeddings of {width}, and the language model's are of {hidden_size}: "
            "name the GPT-2 that it was trained with by --language-model"
        )
    return shape


Importer = Callable[[Path, State, LanguageModel, VisionTower, ImportOptions], Imported]
_IMPORTERS: tuple[tuple[Callable[[str], bool], Importer], ...] = (
    (lambda name: name.startswith("clip_project."), import_clipcap),
    (is_smallcap, import_smallcap),
)
"""How a method's tensors are told by a name of theirs, and what reads them."""
