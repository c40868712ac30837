"""The HTTP interface: OpenAI's models and chat completions, and what streams there are."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...models.prompts import VideoAnswer
from ..query_registry import QueryRegistry
from ..result_feed import ResultFeed
from ..settings import ServeSettings
from ..token_source import TokenSource
from .access import Admission, check_host, check_key
from .answering import Answerer, VideoUse
from .api_errors import ApiError, error_answers
from .bodies import read_json
from .chat_request import ChatRequest, bad_request, read_chat_request
from .description import CHAT_PATH, describe_with
from .events import NO_BUFFER, EventSource, event_routes, prepend
from .page_files import FILES, page_routes
from .queries import QueryRules, query_routes
from .streams import stream_routes

logger = logging.getLogger(__name__)
T = TypeVar("T")

SEND_TIMEOUT_S = 60.0  # of what a client does not take; it may be gone without a word
MODEL_ALIAS = "stormline"  # whatever model is there, so that a client need not know its name


@dataclass(frozen=True)
class Backend:
    """What the interface stands on."""

    answerer: Answerer
    source: TokenSource
    out: Path  # the output folder, for captions
    limits: ServeSettings
    rules: QueryRules = field(default_factory=QueryRules)


def build_app(backend: Backend) -> FastAPI:
    """Return the ASGI application."""
    app = FastAPI(title="stormline", docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    admission = Admission(backend.limits.max_concurrent, backend.limits.max_queued)
    started_s = int(time.time())

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the model, under its name and as `stormline`."""
        name = (await backend.answerer.describe()).name
        return {"object": "list", "data": [_model(name, started_s), _model(MODEL_ALIAS, started_s)]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        """Show one of the models."""
        await _check_model(name, backend)
        return _model(name, started_s)

    @app.post(
        CHAT_PATH,
        response_class=JSONResponse,
        responses={
            200: {"content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}},
            **error_answers(400, 404, 413, 415, 429, 503, 504),
        },
    )
    async def chat(request: Request) -> Response:
        """Answer a question about video; see the README for its form."""
        asked = read_chat_request(await read_json(request), backend.limits)
        model = await _check_model(asked.model, backend)
        completion = _Completion(backend.answerer, admission, asked, model)
        if not asked.stream:
            return JSONResponse(await _unless_left(request, completion.whole()))
        events = completion.events()
        # What is wrong before the first word is an error with a status of its own.
        first = await _unless_left(request, anext(events))
        return StreamingResponse(prepend(first, events), media_type="text/event-stream", headers=NO_BUFFER)

    app.include_router(stream_routes(backend.source, backend.out))
    registry = QueryRegistry(backend.out)
    events = EventSource(ResultFeed(backend.out), backend.limits.max_listeners, hidden=registry.hidden)
    app.include_router(event_routes(events, backend.out))
    app.include_router(query_routes(registry, backend.rules))
    app.include_router(page_routes())
    app.add_exception_handler(ApiError, _say_api_error)
    app.add_exception_handler(HTTPException, _say_http_error)
    app.add_exception_handler(RequestValidationError, _say_invalid)
    app.openapi = describe_with(app)  # type: ignore[method-assign]
    app.add_middleware(Guard, settings=backend.limits)
    return app


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """Return what the work gives; where the client leaves first, the work ends.

    Raises:
        ClientDisconnect: If it leaves.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())  # the body was read
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()


class Guard:
    """Stands before everything: keys, hosts, the size of bodies, clients that take nothing, no error's text in a log.

    Args:
        app: The application behind it.
        settings: With the keys and limits.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings):
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_on(message: Message) -> None:
            nonlocal begun
            begun = True
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send(message)

        try:
            self._check(Request(scope))
            await self._app(scope, self._counted(receive), send_on)
        except ApiError as error:
            await _error_response(error)(scope, receive, send)
        except ClientDisconnect:
            pass  # nobody is there to be told anything
        except Exception as error:  # noqa: BLE001 (the edge of the service)
            logger.error("request_failed path=%s error=%s", scope["path"], type(error).__name__)
            if begun:
                raise ConnectionError("the answer broke off") from None
            await _error_response(ApiError(500, "something went wrong here; it is logged", code="internal_error"))(
                scope, receive, send
            )

    def _check(self, request: Request) -> None:
        if not self._settings.keys:
            check_host(request.headers.get("host"))
        if request.url.path not in FILES:
            check_key(request.headers.get("authorization"), self._settings.keys)
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._settings.max_body_bytes:
            raise _too_large(self._settings.max_body_bytes)

    def _counted(self, receive: Receive) -> Receive:
        n_bytes = 0

        async def receive_some() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._settings.max_body_bytes:
                raise _too_large(self._settings.max_body_bytes)
            return message

        return receive_some


def _too_large(limit_bytes: int) -> ApiError:
    return ApiError(413, f"the body is too large; expected {limit_bytes} bytes or fewer", code="body_too_large")


async def _check_model(name: str | None, backend: Backend) -> str:
    """Return the model's name, if that is what was asked for.

    Raises:
        ApiError: 404 if another model was.
    """
    there = await backend.answerer.model_name()
    if name not in (None, there, MODEL_ALIAS):
        message = f"no model {name!r} here; expected {there!r} or {MODEL_ALIAS!r}"
        raise ApiError(404, message, code="model_not_found", param="model")
    return there


def _model(name: str, started_s: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": started_s, "owned_by": "stormline"}


class _Completion:
    """One question on its way to its answer."""

    def __init__(self, answerer: Answerer, admission: Admission, asked: ChatRequest, model: str):
        self._answerer = answerer
        self._admission = admission
        self._asked = asked
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self) -> dict[str, Any]:
        """Return the answer in one piece."""
        deadline_s = self._answerer.deadline_s()
        async with self._admission.slot(deadline_s):
            prompt, uses = await self._answerer.look(self._asked)
            (answer,) = [whole async for whole in self._answerer.answer(prompt, deadline_s, in_pieces=False)]
        assert isinstance(answer, VideoAnswer)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": answer.finish_reason,
            "logprobs": None,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(answer),
            "stormline": _notes(uses),
        }

    async def events(self) -> AsyncGenerator[str]:
        """Yield the answer as server-sent events, the first one when its first piece is there.

        Raises:
            ApiError: Before the first event alone; later ones are events themselves.
        """
        deadline_s = self._answerer.deadline_s()
        async with self._admission.slot(deadline_s):
            prompt, uses = await self._answerer.look(self._asked)
            begun = False
            try:
                async for piece in self._answerer.answer(prompt, deadline_s, in_pieces=True):
                    if not begun:
                        yield self._event({"role": "assistant", "content": ""})
                        begun = True
                    if isinstance(piece, str):
                        yield self._event({"content": piece})
                    else:
                        yield self._event({}, piece.finish_reason, stormline=_notes(uses))
                        if self._asked.include_usage:
                            yield _sse({**self._head, **_CHUNK, "choices": [], "usage": _usage(piece)})
            except ApiError as error:
                if not begun:
                    raise
                yield _sse(error.body())
                return
            yield "data: [DONE]\n\n"

    def _event(self, delta: Mapping[str, str], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _sse({**self._head, **_CHUNK, "choices": [choice], **more})


_CHUNK = {"object": "chat.completion.chunk"}


def _sse(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _usage(answer: VideoAnswer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.generated_tokens,
        "total_tokens": answer.prompt_tokens + answer.generated_tokens,
        "prompt_tokens_details": {"video_tokens": answer.video_tokens},
    }


def _notes(uses: list[VideoUse]) -> dict[str, Any]:
    return {"video": [use.to_json() for use in uses]}


def _error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


async def _say_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _say_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    answer = _error_response(ApiError(error.status_code, message, code="not_found"))
    answer.headers.update(error.headers or {})
    return answer


async def _say_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(place) for place in first["loc"])
    return _error_response(bad_request(f"{where}: {first['msg']}", where))
