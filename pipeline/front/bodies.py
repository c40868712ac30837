"""Reads the JSON of requests."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request

from .api_errors import ApiError
from .chat_request import bad_request


async def read_json(request: Request) -> Any:
    """Return a request's body.

    Raises:
        ApiError: 415 if it says to be something else, 400 if it is no JSON.
    """
    # Only JSON: what a form on a page elsewhere may send without asking first must not reach a service without keys.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "expected a body of Content-Type application/json", code="unsupported_media_type")
    try:
        body = json.loads(await request.body())
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair passes the first, and no answer
        return body
    except (ValueError, RecursionError):
        raise bad_request("the body is not JSON", code="invalid_json") from None
