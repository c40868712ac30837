"""Standing queries over HTTP: list, add, change, remove.

What is added or changed is taken up by running lanes with their next commit, from the next window's start on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError

from ...operators.errors import SettingsError
from ..query_registry import QueryConflictError, QueryNotFoundError, QueryRegistry, StoredQuery
from ..query_settings import Query, check_sinks
from .api_errors import ApiError, error_answers
from .bodies import read_json
from .chat_request import bad_request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryRules:
    """What a query over the API may not do."""

    allow_private: bool = False  # webhooks on this machine or in a private network
    input_topics: tuple[str, ...] = ()  # where results must not go


def query_routes(registry: QueryRegistry, rules: QueryRules) -> APIRouter:
    """Return the routes below ``/v1/queries``."""
    routes = APIRouter()

    @routes.get("/v1/queries", responses=error_answers(500))
    async def list_queries() -> dict[str, Any]:
        """List the standing queries: those of the settings, and those that were added here."""
        stored = await _in_thread(registry.stored)
        return {"object": "list", "data": [_shown(each) for each in stored]}

    @routes.post("/v1/queries", status_code=201, responses=error_answers(400, 409, 413, 415, 500))
    async def add_query(request: Request) -> dict[str, Any]:
        """Add a standing query; see the README for its fields."""
        query = read_query(await read_json(request), rules)
        return _shown(await _in_thread(registry.add, query))

    @routes.get("/v1/queries/{query_id}", responses=error_answers(404, 500))
    async def show_query(query_id: str) -> dict[str, Any]:
        """Show a standing query."""
        return _shown(await _in_thread(registry.get, query_id))

    @routes.put("/v1/queries/{query_id}", responses=error_answers(400, 404, 409, 413, 415, 500))
    async def change_query(query_id: str, request: Request) -> dict[str, Any]:
        """Put a standing query in the place of the one of this id. What is left out is as if it were new."""
        body = await read_json(request)
        if isinstance(body, dict):
            if body.get("id", query_id) != query_id:
                raise bad_request(f"id: expected {query_id!r}, as in the path, or none", "id")
            body["id"] = query_id
        return _shown(await _in_thread(registry.replace, read_query(body, rules)))

    @routes.delete("/v1/queries/{query_id}", responses=error_answers(404, 409, 500))
    async def remove_query(query_id: str) -> dict[str, Any]:
        """Remove a standing query. Its results stay; what of them is not sent yet is not sent any more."""
        await _in_thread(registry.remove, query_id)
        return {"id": query_id, "object": "query", "deleted": True}

    return routes


def read_query(body: Any, rules: QueryRules) -> Query:
    """Check a query's JSON.

    Raises:
        ApiError: 400, with `param` naming the place.
    """
    if not isinstance(body, dict):
        raise bad_request(f"the body is a JSON {type(body).__name__}; expected an object with `id` and `prompt`")
    # Written as the answer has it, so that one can be changed and sent back.
    body = {name: value for name, value in body.items() if name not in _ADDED}
    try:
        query = Query.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(place) for place in first["loc"])
        raise bad_request(_message_of(where, first), where or None) from None
    try:
        check_sinks(query, allow_private=rules.allow_private, input_topics=rules.input_topics)
    except ValueError as error:
        raise bad_request(str(error), str(error).partition(":")[0]) from None
    return query


_ADDED = ("object", "source", "created", "changed")


def _message_of(where: str, error: Mapping[str, Any]) -> str:
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        said = "unknown field; see GET /v1/queries for those that there are"
    return f"{where}: {said}" if where else said


def _shown(stored: StoredQuery) -> dict[str, Any]:
    return {
        "object": "query",
        **stored.query.model_dump(mode="json"),
        "source": stored.source,
        **stored.model_dump(mode="json", include={"created", "changed"}),
    }


async def _in_thread(function: Any, *args: Any) -> Any:
    """Run a registry's function, its errors as those of the API."""
    try:
        return await asyncio.to_thread(function, *args)
    except QueryNotFoundError as error:
        raise ApiError(404, str(error), code="query_not_found", param="id") from None
    except QueryConflictError as error:
        raise ApiError(409, str(error), code="query_conflict", param="id") from None
    except SettingsError as error:
        logger.error("queries_unreadable error=%s", error)
        message = "the list of standing queries cannot be read; the service's log says why"
        raise ApiError(500, message, code="queries_unreadable") from None
