"""Take a bundle apart: the language model, the vision tower and the adapters, to fine-tune or to export again.

Every fold of the export has its inverse here. int8 weights come back as floats; exporting those in int8 gives the same
integers.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from transformers import CLIPVisionConfig

from ..backbones.image_processor import PREPROCESSOR
from ..checkpoint import CONFIG_FILE, WEIGHTS_FILE, save_config
from ..files import hash_files, staged_folder, write_json
from ..license import LICENSE_FILE, find_license
from ..methods.schemas import parse_config
from ..runtime.bundle import MANIFEST, TOKENIZER, Bundle
from ..runtime.errors import BundleError, ItuneError, reading
from ..runtime.settings import ImageSettings
from .card import MODEL_CARD
from .graph.builder import Weights
from .graph.clip import PREFIX as CLIP_PREFIX
from .graph.clip import unfold_clip
from .graph.embedding import clip_projection
from .graph.onnx_tower import extract_tower
from .methods.registry import METHODS
from .quantize.rewrite import float_graph, read_weights

_FILES = (
    *(f"language-model/{name}" for name in ("config.json", "model.safetensors", TOKENIZER, LICENSE_FILE)),
    *(f"vision/{name}" for name in ("config.json", "model.safetensors", "model.onnx", "model.onnx.data", PREPROCESSOR)),
    *(f"checkpoint/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE, LICENSE_FILE)),
    MODEL_CARD,
)
"""What a restore may write."""


def _written(folder: Path) -> Collection[str]:
    return _FILES if (folder / "checkpoint" / CONFIG_FILE).is_file() else ()


_CARD = """# {name}, restored

The parts of the bundle {name}, to train on or to export again.

## Licence of the weights

{terms} LICENSE.md has the text. What is trained from these parts inherits it.
"""
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic")  # Pillow's numbers


def restore_bundle(source: Path, output: Path, *, force: bool = False) -> None:
    """Write `language-model/`, `vision/` and `checkpoint/` of the bundle `source` to the folder `output`.

    `itune-train` and `itune-export` read these parts. A CLIP tower comes back without its text side; its
    post-layernorm is an identity and its projection is missing, unless the captioner uses them.

    Raises:
        BundleError: the bundle is damaged, or lacks weights or settings that a restore needs.
        ItuneError: `output` exists (`force` replaces an earlier restore).
    """
    bundle = Bundle.load(source)
    manifest, settings = bundle.manifest, bundle.manifest.restore
    if settings is None:
        raise BundleError(
            f"{source / MANIFEST}: field restore is missing, so this bundle cannot be restored: export it again, "
            "without --vocabulary, which leaves out a part of the language model"
        )
    graphs = [bundle.path(bundle.graph(role, "onnxruntime").file) for role in ("vision", "decoder")]
    method = METHODS[manifest.method]
    with (
        staged_folder(output, force=force, written=_written) as folder,
        reading(source, BundleError, mend="export or copy it again"),
    ):
        vision, decoder = map(read_weights, graphs)
        language_model, adapters = method.split_decoder(manifest.decoder, decoder)
        adapters |= method.split_vision(manifest.decoder, vision)
        language_model = {n: w for n, w in language_model.items() if n.startswith(("transformer.", "lm_head."))}
        _save_part(folder / "language-model", language_model, settings.language_model)
        shutil.copyfile(bundle.path(TOKENIZER), folder / "language-model" / TOKENIZER)
        if settings.vision is None:
            extract_tower(float_graph(graphs[0])).save(folder / "vision" / "model.onnx")
        else:
            folded = {name.removeprefix(CLIP_PREFIX): w for name, w in vision.items() if name.startswith(CLIP_PREFIX)}
            state = unfold_clip(folded, CLIPVisionConfig.from_dict(settings.vision), manifest.image)
            tower = {f"vision_model.{name}": weight for name, weight in state.items()} | clip_projection(vision)
            _save_part(folder / "vision", tower, settings.vision)
        write_json(folder / "vision" / PREPROCESSOR, _preprocessor(manifest.image))
        _save_tensors(adapters, folder / "checkpoint" / WEIGHTS_FILE)
        content = parse_config(settings.checkpoint).model_dump(mode="json", by_alias=True)
        license = find_license(bundle.folder, manifest.license) if (bundle.folder / LICENSE_FILE).is_file() else None
        if license is not None:
            content["license"] = license.terms
        content["search"] = manifest.search.model_dump(mode="json")
        for field, name in (("language_model", "language-model"), ("vision", "vision")):
            weights = hash_files([path for path in (folder / name).iterdir() if path.suffix != ".json"])
            content[field] |= {"source": f"../{name}", "revision": None, "sha256": weights}
        if content.get("retrieval"):  # a datastore of the original tower does not fit this one
            content["retrieval"]["encoder"] |= {name: content["vision"][name] for name in ("source", "sha256")}
        save_config(parse_config(content), folder / "checkpoint")
        if license is not None:  # after the weights were hashed
            for part in ("language-model", "checkpoint"):
                (folder / part / LICENSE_FILE).write_text(license.text, encoding="utf-8")
            (folder / MODEL_CARD).write_text(_CARD.format(name=manifest.name, terms=license.terms), encoding="utf-8")


def _preprocessor(image: ImageSettings) -> dict[str, Any]:
    """The same settings as a Hugging Face image processor's configuration."""
    height, width = image.size
    cropped = image.crop or (image.size if image.resize == "shortest_edge" else None)
    crop = cropped and {"height": cropped[0], "width": cropped[1]}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width} if image.resize == "squash" else {"shortest_edge": height},
        "resample": _INTERPOLATIONS.index(image.interpolation),
        "do_center_crop": crop is not None,
        **({"crop_size": crop} if crop else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def _save_part(folder: Path, tensors: Weights, config: dict[str, Any]) -> None:
    _save_tensors(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", config)


def _save_tensors(tensors: Weights, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    floats = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in tensors.items()}
    with reading(path, ItuneError, mend="make room, or choose another --output"):
        save_file(floats, path, metadata={"format": "pt"})
