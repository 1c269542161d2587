"""Take a bundle apart again: the language model, the vision tower and the adapters, to fine-tune or export anew.

Every fold of the export has its inverse here; int8 weights come back as the floats that they stand for, and
exporting those in int8 gives the same integers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from transformers import CLIPVisionConfig

from ..backbones import PREPROCESSOR
from ..checkpoint import CONFIG_FILE, WEIGHTS_FILE, parse_config, save_config
from ..files import hash_files
from ..runtime.bundle import MANIFEST, TOKENIZER, Bundle, RestoreSettings
from ..runtime.errors import BundleError
from ..runtime.settings import ImageSettings, SearchDefaults
from .graph.builder import Array
from .graph.clip import PREFIX as CLIP_PREFIX
from .graph.clip import unfold_clip
from .graph.embedding import projection_weights
from .graph.onnx_tower import extract_tower
from .methods.merge import Weights
from .methods.registry import restored_tower_weights, split_decoder, split_vision
from .quantize.rewrite import float_graph, read_weights
from .staging import staged_folder

_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic")  # in order of Pillow's numbers


def restore_bundle(source: Path, output: Path, *, force: bool = False) -> None:
    """Write `language-model/`, `vision/` and `checkpoint/` of the bundle `source` to the folder `output`.

    The parts are what `itune-train` and `itune-export` read. A CLIP tower comes back without its text side; its
    post-layernorm is an identity, and its projection is missing, unless the captioner uses them.

    Raises:
        BundleError: the bundle is damaged, or does not say how to restore it.
        ItuneError: `output` exists (`force` replaces what was restored before).
    """
    bundle = Bundle.load(source)
    settings = bundle.manifest.restore
    if bundle.manifest.tokens.shortlist is not None:
        raise BundleError(
            f"{source} was exported with --vocabulary: the rest of its language model is not in it; restore a bundle "
            "that was exported without"
        )
    if settings is None:
        raise BundleError(f"{source / MANIFEST}: has no field restore: this bundle cannot be restored")
    with staged_folder(output, force=force, own=_restored) as folder:
        adapters = _restore_language_model(bundle, settings, folder / "language-model")
        adapters |= _restore_vision(bundle, settings, folder / "vision")
        _save_tensors(adapters, folder / "checkpoint" / WEIGHTS_FILE)
        _restore_config(settings, bundle.manifest.search, folder)


def _restored(folder: Path) -> Collection[str]:
    """The names in a folder that something was restored to."""
    return ("language-model", "vision", "checkpoint") if (folder / "checkpoint" / CONFIG_FILE).is_file() else ()


def _restore_language_model(bundle: Bundle, settings: RestoreSettings, folder: Path) -> dict[str, Array]:
    """Write the language model; returns what of the adapters was merged into it."""
    weights, adapters = split_decoder(bundle.manifest, read_weights(bundle.path(_graph_file(bundle, "decoder"))))
    names = [name for name in weights if name.startswith(("transformer.", "lm_head."))]
    _save_tensors({name: weights[name] for name in names}, folder / "model.safetensors")
    _save_json(settings.language_model, folder / "config.json")
    shutil.copyfile(bundle.path(TOKENIZER), folder / TOKENIZER)
    return adapters


def _restore_vision(bundle: Bundle, settings: RestoreSettings, folder: Path) -> dict[str, Array]:
    """Write the tower; returns the adapters' weights in its graph."""
    graph = bundle.path(_graph_file(bundle, "vision"))
    weights = read_weights(graph)
    adapters = split_vision(bundle.manifest, weights)
    folder.mkdir()
    if settings.vision is None:
        extract_tower(float_graph(graph)).save(folder / "model.onnx")
    else:
        folded = {name.removeprefix(CLIP_PREFIX): w for name, w in weights.items() if name.startswith(CLIP_PREFIX)}
        config = CLIPVisionConfig.from_dict(settings.vision)
        state = unfold_clip(folded, config, bundle.manifest.image)
        tensors = {f"vision_model.{name}": w for name, w in state.items()}
        tensors |= restored_tower_weights(adapters) | projection_weights(weights)
        _save_tensors(tensors, folder / "model.safetensors")
        _save_json(settings.vision, folder / "config.json")
    _save_json(_preprocessor(bundle.manifest.image), folder / PREPROCESSOR)
    return adapters


def _restore_config(settings: RestoreSettings, search: SearchDefaults, folder: Path) -> None:
    config = parse_config(settings.checkpoint)
    parts = {
        field: getattr(config, field).model_copy(
            update={"source": f"../{name}", "revision": None, "sha256": _hash_weights(folder / name)}
        )
        for field, name in (("language_model", "language-model"), ("vision", "vision"))
    }
    retrieval = config.retrieval
    if retrieval is not None:  # by this tower, whose datastores are not those of the original
        vision = parts["vision"]
        encoder = retrieval.encoder.model_copy(update={"source": vision.source, "sha256": vision.sha256})
        retrieval = retrieval.model_copy(update={"encoder": encoder})
    save_config(config.model_copy(update={**parts, "retrieval": retrieval, "search": search}), folder / "checkpoint")


def _hash_weights(folder: Path) -> str:
    return hash_files([path for path in folder.iterdir() if path.suffix != ".json"])


def _preprocessor(image: ImageSettings) -> dict[str, Any]:
    """The Hugging Face image processor's configuration that says the same."""
    height, width = image.size
    squash = image.resize == "squash"
    crop = image.crop and {"height": image.crop[0], "width": image.crop[1]}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": height},
        "resample": _INTERPOLATIONS.index(image.interpolation),
        "do_center_crop": crop is not None,
        **({"crop_size": crop} if crop else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def _graph_file(bundle: Bundle, role: str) -> str:
    return bundle.graph(role, "onnxruntime").file


def _save_tensors(tensors: Weights, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    floats = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in tensors.items()}
    save_file(floats, path, metadata={"format": "pt"})


def _save_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
