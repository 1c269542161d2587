"""The errors that a user can mend. Command lines print them as one sentence, without a traceback."""


class ItuneError(Exception):
    """Something the user gave cannot be used; the message names the file, the field and the mend."""


class ImageError(ItuneError):
    """An image cannot be decoded, or is refused (too large, truncated, not an image)."""


class BundleError(ItuneError):
    """A bundle is missing, incomplete, damaged, or of another schema version."""


class DatastoreError(ItuneError):
    """A datastore is missing, incomplete, damaged, or of another encoder than the one that asks."""


class SearchError(ItuneError):
    """Search options contradict each other, or the engine's candidates cannot answer them exactly."""


class EngineError(ItuneError):
    """An engine cannot run here: no GPU, a library that is missing, or a plan for another machine."""
