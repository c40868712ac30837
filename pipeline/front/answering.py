"""From a checked request to a prompt with video tokens, and to the answer as it grows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...models.last_used import LastUsed
from ...models.prompts import ChatTemplateError, VideoAnswer, VideoPrompt
from ...models.selection import VideoChunk, select_chunks
from ..chunk_index import choose_chunks, choose_policy
from ..durations import format_moment
from ..settings import ServeSettings
from ..token_source import RangeIndex, TokenSource
from ..video_llm import ModelDescription
from .api_errors import ApiError
from .chat_request import ChatRequest, bad_request, range_too_long
from .stream_urls import StreamRange

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # of an answer of which nothing was heard yet
RETRY_AFTER_S = 5  # a replica that died is back by about then
SELECTED_BYTES = 16 << 20  # of tokens as they were given to the model: several ask about the same range
NAMED_STREAMS = 10  # in the message about an unknown one


class Llm(Protocol):
    """What is asked of the LLM deployment; `pipeline.serving.LlmReader` is one."""

    async def describe(self) -> ModelDescription:
        """Return what the model is."""
        ...

    async def embed(self, text: str) -> np.ndarray:
        """Return a text's embedding (d_model,) float32."""
        ...

    async def answer(self, prompt: VideoPrompt) -> VideoAnswer:
        """Return the whole answer."""
        ...

    def stream(self, prompt: VideoPrompt) -> AsyncIterator[str | VideoAnswer]:
        """Yield the answer's pieces, and at last the whole answer."""
        ...


@dataclass(frozen=True)
class VideoUse:
    """Which range of which stream an answer looked at, and how closely."""

    stream_id: str
    start_ns: int  # the range that was meant; ``[00:00]`` in an answer is the earliest of these
    end_ns: int
    first_ns: int  # of the video that there is in it
    last_ns: int
    tokens_in_range: int
    tokens_used: int
    token_policy: str

    def to_json(self) -> dict[str, Any]:
        """Return it as the service says it."""
        return {
            "stream": self.stream_id,
            "start": format_moment(self.start_ns),
            "end": format_moment(self.end_ns),
            "first": format_moment(self.first_ns),
            "last": format_moment(self.last_ns),
            "tokens_in_range": self.tokens_in_range,
            "tokens_used": self.tokens_used,
            "token_policy": self.token_policy,
        }


@dataclass(frozen=True, eq=False)
class _Found:
    """A range that was asked for, with absolute times and what the source has of it."""

    start_ns: int
    end_ns: int
    index: RangeIndex


class Answerer:
    """Find the video that a request is about, and have the model answer.

    Args:
        source: The tokens of all streams.
        llm: The model.
        limits: The service's.
        retry_wait_s: Before a failed attempt is repeated; grows with each.
    """

    def __init__(self, source: TokenSource, llm: Llm, limits: ServeSettings, *, retry_wait_s: float = 0.5):
        self._source = source
        self._llm = llm
        self._limits = limits
        self._retry_wait_s = retry_wait_s
        self._model_name: str | None = None
        self._selected: LastUsed[tuple[object, ...], list[VideoChunk]] = LastUsed(SELECTED_BYTES, _n_bytes)

    async def look(self, request: ChatRequest) -> tuple[VideoPrompt, list[VideoUse]]:
        """Read and select the video tokens.

        The budget is shared equally between the ranges. The prompt has one range after the other, on one clock that
        starts with the earliest.

        Raises:
            ApiError: Where a stream is not known, or a range has no video or is too long.
        """
        found = [await self._find(asked) for asked in request.ranges]
        origin_ns = min(f.start_ns for f in found)
        budget = max(1, request.token_budget // len(found))
        chunks: list[VideoChunk] = []
        uses = []
        for f in found:
            policy = choose_policy(request.token_policy, f.index.chunks, budget)
            selected = await self._select(request, f.index, origin_ns, budget, policy)
            chunks += selected
            uses.append(_use_of(f, selected, policy))
        return (
            VideoPrompt(
                text=request.question,
                chunks=tuple(chunks),
                max_new_tokens=request.max_tokens,
                temperature=request.temperature,
                seed=request.seed,
                stop=request.stop,
                history=request.history,
            ),
            uses,
        )

    async def _select(
        self, request: ChatRequest, index: RangeIndex, origin_ns: int, budget: int, policy: str
    ) -> list[VideoChunk]:
        """Return the tokens of a range that are given to the model; those that were just given to it, at no cost."""
        chosen = choose_chunks(index.chunks, budget, policy)
        starts, ends = index.chunks.start_ns[chosen], index.chunks.end_ns[chosen]
        asked = request.question if policy == "relevant" else ""
        key = (index.stream_id, origin_ns, budget, policy, asked, starts.tobytes(), ends.tobytes())
        if (known := self._selected.get(key)) is not None:
            return known
        read = await self._source.read(index, chosen)
        chunks = [VideoChunk((c.start_ns - origin_ns) / 1e9, (c.end_ns - origin_ns) / 1e9, c.tokens) for c in read]
        try:
            question = await self._embed(asked) if policy == "relevant" else None
            selected = await asyncio.to_thread(select_chunks, chunks, budget, policy, question=question)
        except ValueError as error:
            raise bad_request(_message_of(error), "messages", "video_not_usable") from None
        if len(read) == len(chosen):  # all of it was found
            self._selected.put(key, selected)
        return selected

    async def _embed(self, text: str) -> np.ndarray:
        """Return a text's embedding.

        Raises:
            ApiError: 503 if the model cannot be reached.
        """
        try:
            return await asyncio.wait_for(self._llm.embed(text), self._limits.timeout_s)
        except Exception as error:  # noqa: BLE001 (the edge to another process)
            logger.warning("embed_failed error=%s", type(error).__name__)
            raise model_not_there() from None

    async def _find(self, asked: StreamRange) -> _Found:
        view = await self._source.look_up(asked.stream_id)
        end_ns = asked.end_ns if asked.end_ns is not None else await view.last_ns()
        if end_ns is None:
            raise await self._unknown_stream(asked.stream_id)
        start_ns = asked.start_ns if asked.last_s is None else end_ns - round(asked.last_s * 1e9)
        assert start_ns is not None
        if end_ns - start_ns > self._limits.max_range_s * 1e9:
            raise range_too_long((end_ns - start_ns) / 1e9, self._limits, "messages")
        index = await view.index(start_ns, end_ns)
        if not len(index.chunks):
            raise await self._no_video(asked.stream_id, start_ns, end_ns)
        return _Found(start_ns, end_ns, index)

    async def _unknown_stream(self, stream_id: str) -> ApiError:
        names = list(await self._source.streams())
        more = ", …" if len(names) > NAMED_STREAMS else ""
        known = f"known are {', '.join(names[:NAMED_STREAMS])}{more}" if names else "nothing has been seen yet"
        return ApiError(404, f"no stream {stream_id!r} here; {known}", code="stream_not_found", param="messages")

    async def _no_video(self, stream_id: str, start_ns: int, end_ns: int) -> ApiError:
        span = (await self._source.streams()).get(stream_id)
        if span is None:
            return await self._unknown_stream(stream_id)
        return bad_request(
            f"stream {stream_id!r} has no video from {format_moment(start_ns)} to {format_moment(end_ns)}; "
            f"it has some between {format_moment(span.start_ns)} and {format_moment(span.end_ns)}",
            "messages",
            "no_video_in_range",
        )

    def deadline_s(self) -> float:
        """Return by when a question that comes now has its answer or is given up, by the loop's clock."""
        return asyncio.get_running_loop().time() + self._limits.timeout_s

    async def answer(
        self, prompt: VideoPrompt, deadline_s: float, *, in_pieces: bool
    ) -> AsyncIterator[str | VideoAnswer]:
        """Yield the answer's text as it grows, and at last the whole answer; or that alone, which costs less.

        An attempt that failed before its first piece is repeated.

        Args:
            prompt: From `look`.
            deadline_s: From `deadline_s`, when the question came.
            in_pieces: Whether the text is wanted as it grows.

        Raises:
            ApiError: 400 if the prompt does not fit the model, 503 if the model cannot be reached, 504 if it is slow.
        """
        for attempt in range(ATTEMPTS):
            heard = False
            try:
                pieces = self._llm.stream(prompt) if in_pieces else _once(self._llm.answer(prompt))
                async for piece in _until(pieces, deadline_s):
                    heard = True
                    yield piece
                return
            except TimeoutError:
                limit_s = self._limits.timeout_s
                raise ApiError(504, f"no whole answer within {limit_s:.0f} s; ask for a shorter one, or try again",
                               code="timeout") from None  # fmt: skip
            except ValueError as error:
                code = "invalid_value" if isinstance(error, ChatTemplateError) else "context_length_exceeded"
                raise bad_request(_message_of(error), "messages", code) from None
            except Exception as error:  # noqa: BLE001 (the edge to another process: whatever came out of it)
                logger.warning("answer_failed attempt=%d heard=%s error=%s", attempt + 1, heard, type(error).__name__)
                if heard or attempt + 1 == ATTEMPTS:
                    raise model_not_there() from None
                await asyncio.sleep(self._retry_wait_s * 2**attempt)

    async def model_name(self) -> str:
        """Return the model's name, which is the same as long as the service runs.

        Raises:
            ApiError: 503 if it was never reached.
        """
        if self._model_name is None:
            self._model_name = (await self.describe()).name
        return self._model_name

    async def describe(self) -> ModelDescription:
        """Return what the model is.

        Raises:
            ApiError: 503 if it cannot be reached.
        """
        try:
            return await asyncio.wait_for(self._llm.describe(), self._limits.timeout_s)
        except Exception as error:  # noqa: BLE001 (the edge to another process)
            logger.warning("describe_failed error=%s", type(error).__name__)
            raise model_not_there() from None


async def _once(answer: Awaitable[VideoAnswer]) -> AsyncIterator[VideoAnswer]:
    yield await answer


async def _until(pieces: AsyncIterator[Any], deadline_s: float) -> AsyncIterator[Any]:
    """Yield the pieces; raise TimeoutError when the next one has not come by a time of the loop's clock."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            yield await asyncio.wait_for(anext(pieces), deadline_s - loop.time())
        except StopAsyncIteration:
            return


def model_not_there() -> ApiError:
    """Return the error for a model that died or does not answer; trying again helps."""
    message = "the model does not answer just now; it is started again by itself, so try again in a moment"
    return ApiError(503, message, code="model_unavailable", retry_after_s=RETRY_AFTER_S)


def _use_of(found: _Found, selected: Sequence[VideoChunk], policy: str) -> VideoUse:
    return VideoUse(
        stream_id=found.index.stream_id,
        start_ns=found.start_ns,
        end_ns=found.end_ns,
        first_ns=int(found.index.chunks.start_ns[0]),
        last_ns=int(found.index.chunks.end_ns.max()),
        tokens_in_range=found.index.chunks.total_tokens,
        tokens_used=sum(chunk.n_tokens for chunk in selected),
        token_policy=policy,
    )


def _n_bytes(chunks: Sequence[VideoChunk]) -> int:
    return sum(chunk.tokens.nbytes for chunk in chunks)


def _message_of(error: ValueError) -> str:
    """Return the message without Ray's account of where it came from."""
    return str(getattr(error, "cause", None) or error)
