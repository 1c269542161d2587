"""The settings and the checkpoint schema of each method, without torch."""

from __future__ import annotations

from ..checkpoint import CheckpointConfig
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
