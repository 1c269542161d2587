"""The search options of a request: from its query and its JSON part to a checked `SearchConfig`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..runtime.errors import SearchError
from ..runtime.search.config import SearchConfig
from ..runtime.search.options import OptionReader
from .refusal import Refusal
from .settings import Limits

_MOST_BYTES = 16_384


def from_query(parameters: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Numbers, true, false and null are read as in JSON, anything else is text. bad_words may be repeated."""
    options: dict[str, Any] = {}
    for name, value in parameters:
        if name == "bad_words":
            options.setdefault(name, []).append(value)
        elif name in options:
            raise Refusal(422, f"{name} is given twice")
        else:
            options[name] = _scalar(value)
    return options


def from_json(content: bytes) -> dict[str, Any]:
    """The JSON part of a multipart request."""
    if len(content) > _MOST_BYTES:
        raise Refusal(413, f"the options are larger than {_MOST_BYTES} bytes")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refusal(422, f"the options are not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refusal(422, 'the options must be a JSON object, such as {"num_beams": 3}')
    return value


def check(options: dict[str, Any], reader: OptionReader, limits: Limits) -> SearchConfig:
    """What the options mean for the model; Refusal if they are wrong, or ask for more than `limits` allows."""
    try:
        config = reader.read(options)
    except SearchError as error:
        raise Refusal(422, str(error)) from error
    most = {"num_beams": limits.max_beams, "num_return": limits.max_beams, "max_new_tokens": limits.max_tokens}
    for name in most.keys() & options.keys():  # the bundle's own defaults are the operator's choice
        if (getattr(config, name) or 0) > most[name]:
            raise Refusal(422, f"{name} must be at most {most[name]} here, not {getattr(config, name)}")
    return config


def _scalar(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
