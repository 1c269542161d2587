"""Write the published checkpoint of another project as one of ours; the names of its tensors decide the method."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from ...backbones import LanguageModel, VisionTower, load_language_model, load_vision_tower
from ...checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError, ModelSource, VisionSource, save_config
from ...files import hash_files, staged_folder
from ...license import LICENSE_FILE, find_license, inherit
from ...methods.base import write_tensors
from ...methods.schemas import CHECKPOINTS
from ...runtime.bundle import TOKENIZER
from ...runtime.errors import reading
from ..options import ImportOptions
from .clipcap import import_clipcap
from .smallcap import import_smallcap
from .state_dict import Imported, State, read_state

Importer = Callable[[Path, State, LanguageModel, VisionTower, ImportOptions], Imported]
IMPORTERS: dict[str, Importer] = {"clip_project.": import_clipcap, ".crossattention.": import_smallcap}
"""By a part that only this method's tensors have in their names."""
_FINE_TUNED = "language-model"
"""Subfolder of the checkpoint for a fine-tuned language model."""
_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LICENSE_FILE,
    *(f"{_FINE_TUNED}/{name}" for name in ("config.json", "generation_config.json", "model.safetensors", TOKENIZER)),
)
"""What an import may write."""


def _written(folder: Path) -> Collection[str]:
    return _FILES if (folder / CONFIG_FILE).is_file() else ()


def import_checkpoint(file: Path, output: Path, options: ImportOptions, *, force: bool = False) -> None:
    """Write the published checkpoint `file` (.pt, .bin or .safetensors) as a checkpoint of ours to `output`.

    A fine-tuned language model is written into the folder; any other is referenced.

    Raises:
        CheckpointError: no importer knows the file, or it does not fit the language model or the tower.
        ItuneError: `output` exists (`force` replaces a checkpoint).
    """
    state = read_state(file)
    importer = next((importer for part, importer in IMPORTERS.items() if any(part in name for name in state)), None)
    if importer is None:
        raise CheckpointError(
            f"--import {file}: is no checkpoint of ClipCap or SmallCap: no tensor is named {' or '.join(IMPORTERS)}, "
            f"the first is {next(iter(state), 'missing')}; save the model's state_dict() alone"
        )
    with staged_folder(output, force=force, written=_written) as folder:
        language = load_language_model(options.language_model)
        tower = load_vision_tower(options.vision)
        with reading(
            f"--import {file}", CheckpointError, "name the models it was trained with: --language-model, --vision"
        ):
            imported = importer(file, state, language, tower, options)
        source = ModelSource.of_language_model(language, options.language_model, output)
        if imported.fine_tuned:
            language.model.save_pretrained(folder / _FINE_TUNED)
            language.tokenizer.save(str(folder / _FINE_TUNED / TOKENIZER))
            weights = list((folder / _FINE_TUNED).glob("*.safetensors"))
            source = ModelSource(source=_FINE_TUNED, sha256=hash_files(weights))
        write_tensors(dict(imported.tensors), folder / WEIGHTS_FILE)
        license = inherit([find_license(source) for source in (file.parent, language.folder, tower.folder)])
        if license is not None:
            (folder / LICENSE_FILE).write_text(license.text, encoding="utf-8")
        config = CHECKPOINTS[imported.model.method](
            language_model=source,
            vision=VisionSource.of_tower(tower, options.vision, output),
            image=tower.image,
            text=imported.text,
            retrieval=imported.retrieval,
            search=imported.search,
            license=None if license is None else license.terms,
            training={"imported": file.name},
            **imported.model.describe(),
        )
        save_config(config, folder)
