"""The checkpoint schema of each method, without torch."""

from __future__ import annotations

from ..checkpoint import CheckpointConfig
from ..runtime.settings import Method
from .clipcap.settings import ClipCapCheckpoint
from .ituning.settings import ITuningCheckpoint
from .smallcap.settings import SmallCapCheckpoint

CHECKPOINTS: dict[Method, type[CheckpointConfig]] = {
    "i-tuning": ITuningCheckpoint,
    "clipcap": ClipCapCheckpoint,
    "smallcap": SmallCapCheckpoint,
}
