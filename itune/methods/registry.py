"""The captioning methods by their names in `itune.json`."""

from __future__ import annotations

from ..runtime.settings import Method
from .base import CaptionModel
from .clipcap.model import ClipCapModel
from .ituning.model import ITuningModel
from .smallcap.model import SmallCapModel

MODELS: dict[Method, type[CaptionModel]] = {
    model.method: model for model in (ITuningModel, ClipCapModel, SmallCapModel)
}
