"""The interface's description, `/openapi.json`: what FastAPI finds out, and what only we know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI

from ..query_settings import Query
from .api_errors import ErrorBody
from .chat_request import ChatBody

_REFERENCE = "#/components/schemas/{model}"
_VALIDATION = ("HTTPValidationError", "ValidationError")  # FastAPI's own form of errors, which is never given
CHAT_PATH = "/v1/chat/completions"
_BODIES: dict[tuple[str, str], Any] = {  # which are read by hand
    (CHAT_PATH, "post"): ChatBody,
    ("/v1/queries", "post"): Query,
    ("/v1/queries/{query_id}", "put"): Query,
}


def describe_with(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Return a function for `app.openapi` that adds to the application's own description.

    That is the bodies that are read by hand, the form of errors, and the key.
    """
    described = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(described())
        return app.openapi_schema

    return openapi


def _completed(description: dict[str, Any]) -> dict[str, Any]:
    components = description.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for model in {ErrorBody, *_BODIES.values()}:
        schema = model.model_json_schema(ref_template=_REFERENCE)
        schemas |= schema.pop("$defs", {}) | {model.__name__: schema}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    description["security"] = [{"key": []}, {}]  # none where the service has no keys
    error = {"description": "What went wrong", "content": {"application/json": {"schema": _ref(ErrorBody)}}}
    for operation in _operations(description):
        operation["responses"].pop("422", None)
        operation["responses"]["default"] = error
    for (path, method), model in _BODIES.items():
        body = {"required": True, "content": {"application/json": {"schema": _ref(model)}}}
        description["paths"][path][method]["requestBody"] = body
    for name in _VALIDATION:
        schemas.pop(name, None)
    return description


def _operations(description: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in description["paths"].values():
        yield from path.values()


def _ref(model: type) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}
