"""The OpenAPI 3.1 description, made from the models that check requests and the classes that hold answers."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import TypeAdapter

from .. import __version__
from ..runtime.caption import Caption
from ..runtime.search.config import SearchConfig
from ..runtime.search.options import BadWords
from ..runtime.settings import describe
from .settings import Limits

_REFUSALS = {
    400: "the multipart body is damaged",
    401: "the bearer token is missing or wrong",
    408: "the body did not arrive in time",
    413: "the body or the number of photos is over its limit",
    415: "the Content-Type is none of those below",
    422: "the photo cannot be read, or the options are wrong",
    503: "the queue is full, the model is not loaded, or the worker ended; Retry-After says when to try again",
}


def describe_service(limits: Limits, *, authorised: bool) -> dict[str, Any]:
    """The document of `/openapi.json`."""
    describe(SearchConfig)
    options = SearchConfig.model_json_schema()["properties"] | BadWords.model_json_schema()["properties"]
    for name, most in {"num_beams": limits.max_beams, "max_new_tokens": limits.max_tokens}.items():
        options[name]["maximum"] = most
    for option in options.values():  # the bundle's count, not these
        option.pop("default", None)
    adapter = TypeAdapter(Caption)
    answer = adapter.json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    schemas = answer.pop("$defs")
    answer["properties"] |= {"image": _text("The photo's file name."), "engine": _text("What ran the model.")}
    answer["properties"]["kernels"] = _text("The instruction set of the native engine.")
    failed = {"image": _text("The photo's file name."), "error": _text("Why."), "status": {"type": "integer"}}
    schemas |= {
        "Captioned": answer,
        "Failed": {"type": "object", "properties": failed, "required": ["error"]},
        "Options": {"type": "object", "properties": options, "additionalProperties": False},
        "Result": {"anyOf": [_ref("Captioned"), _ref("Failed")]},
    }
    results = {"type": "object", "properties": {"results": {"type": "array", "items": _ref("Result")}}}
    photo = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "properties": {
            "image": {"type": "array", "items": photo, "maxItems": limits.max_images},
            "options": _ref("Options"),
        },
        "required": ["image"],
    }
    caption: dict[str, Any] = {
        "operationId": "caption",
        "summary": "Caption photos",
        "parameters": [
            {"name": name, "in": "query", "schema": schema, "description": schema.get("description", "")}
            for name, schema in options.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": form, "encoding": {"options": {"contentType": "application/json"}}},
                "image/*": {"schema": photo},
                "application/octet-stream": {"schema": photo},
            },
        },
        "responses": {
            "200": {
                "description": "The caption of one photo, or the results of several in their order.",
                "content": {
                    "application/json": {"schema": {"anyOf": [_ref("Captioned"), results]}},
                    "application/x-ndjson": {"schema": _ref("Result")},
                },
            },
            **{
                str(status): {
                    "description": f"{HTTPStatus(status).phrase}: {meaning}.",
                    "content": {"application/json": {"schema": _ref("Failed")}},
                }
                for status, meaning in _REFUSALS.items()
            },
        },
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "itune-serve", "version": __version__, "description": "Captions photos."},
        "paths": {
            "/v1/caption": {"post": caption},
            "/healthz": {"get": _plain("Whether the service runs")},
            "/readyz": {"get": _plain("Whether a worker can caption", also=503)},
            "/metrics": {"get": _plain("Metrics for Prometheus")},
        },
        "components": {"schemas": schemas},
    }
    if authorised:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        caption["security"] = document["paths"]["/metrics"]["get"]["security"] = [{"token": []}]
    return document


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _plain(summary: str, also: int | None = None) -> dict[str, Any]:
    text = {"text/plain": {"schema": {"type": "string"}}}
    responses: dict[str, Any] = {"200": {"description": "Yes." if also else "It is.", "content": text}}
    if also:
        responses[str(also)] = {"description": "Not yet.", "content": {"application/json": {"schema": _ref("Failed")}}}
    return {"summary": summary, "responses": responses}
