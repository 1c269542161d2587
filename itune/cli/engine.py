"""How a bundle is loaded: the options that the programs share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from .program import Options

if TYPE_CHECKING:
    from ..runtime.captioner import Captioner


class EngineOptions(Options, title="Model"):
    """The keyword arguments of `Captioner.load`."""

    datastore: Path | None = None
    """Folder of itune-datastore, for a bundle that retrieves. Default: datastore/ in the bundle."""
    retrieve: Annotated[int, Field(ge=0)] | None = None
    """Captions of similar images in the prompt; 0 is none. Default: the bundle's."""
    engine: str = "auto"
    """auto, tensorrt, onnxruntime-cuda, native or onnxruntime (the CPU)."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads. Default: the engine's choice."""

    def loader(self, bundle: Path | None) -> Callable[[], Captioner]:
        """Load a bundle with these options; can be pickled."""
        from ..runtime.captioner import Captioner

        given = {name: getattr(self, name) for name in EngineOptions.model_fields}
        return partial(Captioner.load, bundle, **given)
