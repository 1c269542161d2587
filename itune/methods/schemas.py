"""The training settings and the checkpoint schema of each method, and `itune.json` read with them; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_FILE, CheckpointConfig, CheckpointError
from ..files import read_json
from ..runtime.errors import reading
from ..runtime.settings import Method
from .clipcap.settings import ClipCapCheckpoint, ClipCapSettings
from .ituning.settings import ITuningCheckpoint, ITuningSettings
from .settings import MethodSettings
from .smallcap.settings import SmallCapCheckpoint, SmallCapSettings

CHECKPOINTS: dict[str, type[CheckpointConfig]] = {
    "i-tuning": ITuningCheckpoint,
    "clipcap": ClipCapCheckpoint,
    "smallcap": SmallCapCheckpoint,
}
SETTINGS: dict[Method, type[MethodSettings]] = {
    "i-tuning": ITuningSettings,
    "clipcap": ClipCapSettings,
    "smallcap": SmallCapSettings,
}


def parse_config(content: dict[str, Any]) -> CheckpointConfig:
    """Validate the content of an `itune.json` with its method's schema; raises pydantic's ValidationError."""
    # The base class refuses an unknown method.
    method = str(content.get("method", "i-tuning")) if isinstance(content, dict) else ""
    return CHECKPOINTS.get(method, CheckpointConfig).model_validate(content)


def load_config(folder: Path) -> CheckpointConfig:
    """Read and validate `itune.json`."""
    path = folder / CONFIG_FILE
    mend = "give the folder of an adapter checkpoint"
    with reading(path, CheckpointError, mend):
        return parse_config(read_json(path, CheckpointError, mend))
