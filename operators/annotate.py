"""The annotate step: standing queries over each stream's tokens, answered by the LLM.

State is only what a query still needs: the chunks of its open window. It advances in strict row order; the answers
are waited for outside that order, so that captions of many streams are asked for together, while the rows leave in
order with the answers that they led to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from ..models.prompts import VideoAnswer, VideoPrompt
from ..models.selection import VideoChunk, select_chunks
from .ordering import Turnstile
from .rows import AnnotatedSegment, Barrier, Chunk, EncodedSegment, Result, Row, block_of, rows_of
from .snapshots import StreamSnapshot, pack_snapshot, unpack_snapshot
from .windows import OpenWindow, add_chunk, close_session

STEP_NAME = "annotate"
SNAPSHOT_VERSION = 1

Ask = Callable[[VideoPrompt], Awaitable[VideoAnswer]]


class StandingQuery(Protocol):
    """What a standing query says; `pipeline.settings.CaptionQuery` is one."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def streams(self) -> str: ...  # noqa: D102
    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def window_s(self) -> float: ...  # noqa: D102
    @property
    def token_budget(self) -> int: ...  # noqa: D102
    @property
    def token_policy(self) -> str: ...  # noqa: D102
    @property
    def max_new_tokens(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class _Question:
    """A closed window that waits for its answer."""

    query: StandingQuery
    window: OpenWindow


class Annotate:
    """Answer standing queries; a Ray Data step over one-row blocks, one actor a lane, many calls at once.

    Takes `EncodedSegment` and `Barrier` rows, gives `AnnotatedSegment` and `Barrier` rows with the same
    `lane_seq`. A failed answer raises and fails the lane: a caption is never left out silently.

    Args:
        queries: The standing queries.
        ask: Gives the LLM's answer to one prompt; raises when there is none.
        model_name: Written into the results.
        snapshots: This step's states to go on from, by partition.
    """

    def __init__(
        self,
        queries: Sequence[StandingQuery],
        ask: Ask,
        model_name: str,
        snapshots: Mapping[tuple[str, int], bytes] | None = None,
    ):
        self._queries = list(queries)
        self._ask = ask
        self._model_name = model_name
        self._turnstile = Turnstile()
        # By partition, then stream, then query.
        self._open: dict[tuple[str, int], dict[str, dict[str, OpenWindow]]] = {
            partition: _restore(blob) for partition, blob in (snapshots or {}).items()
        }

    async def __call__(self, table: pa.Table) -> AsyncIterator[pa.Table]:
        """Handle the rows of one block, asking about all of them at once."""
        yield block_of(await asyncio.gather(*(self._handle(row) for row in rows_of(table))))

    async def _handle(self, row: Row) -> Row:
        async with self._turnstile.turn(row.lane_seq):
            if row.kind == Barrier.KIND:
                barrier = Barrier.from_row(row).with_snapshots(STEP_NAME, self.snapshot())
                return barrier.to_row(row.lane_seq)
            encoded = EncodedSegment.from_row(row)
            questions = self.advance(encoded)
        results = await asyncio.gather(*(self._answer(q) for q in questions))
        return AnnotatedSegment(encoded, tuple(results)).to_row(row.lane_seq)

    def advance(self, encoded: EncodedSegment) -> list[_Question]:
        """Take one record's chunks into the open windows; return the windows that they closed."""
        meta = encoded.meta
        streams = self._open.setdefault((meta.topic, meta.partition), {})
        windows = streams.setdefault(meta.stream_id, {})
        questions: list[_Question] = []
        for query in self._queries:
            if not fnmatchcase(meta.stream_id, query.streams):
                continue
            window = windows.pop(query.id, None)
            for session, chunks in _by_session(encoded):
                for chunk in chunks:
                    window, closed = add_chunk(window, _owned(chunk), round(query.window_s * 1e9))
                    questions += [_Question(query, closed)] if closed else []
                if session in encoded.closed_sessions:
                    window, closed = close_session(window, session)
                    questions += [_Question(query, closed)] if closed else []
            if window is not None:
                windows[query.id] = window
        if not windows:
            del streams[meta.stream_id]
        return questions

    async def _answer(self, question: _Question) -> Result:
        query, window = question.query, question.window
        origin_ns = window.chunks[0].session_start_ns + window.window_index * round(query.window_s * 1e9)
        chunks = [
            VideoChunk(start_s=(c.start_ns - origin_ns) / 1e9, end_s=(c.end_ns - origin_ns) / 1e9, tokens=c.tokens)
            for c in window.chunks
        ]
        chosen = select_chunks(chunks, query.token_budget, query.token_policy)
        asked_s = time.monotonic()
        answer = await self._ask(
            VideoPrompt(text=query.prompt, chunks=tuple(chosen), max_new_tokens=query.max_new_tokens)
        )
        return Result(
            query_id=query.id,
            kind=query.kind,
            stream_id=window.chunks[0].stream_id,
            session=window.session,
            start_ns=window.start_ns,
            end_ns=window.end_ns,
            prompt=query.prompt,
            answer=answer.text,
            alert=False,
            tokens_used=answer.video_tokens,
            token_policy=query.token_policy,
            latency_ms=(time.monotonic() - asked_s) * 1e3,
            model=self._model_name,
            emitted_ns=time.time_ns(),
        )

    def snapshot(self) -> dict[tuple[str, int], bytes]:
        """Return the open windows after the last row, by partition."""
        return {
            partition: pack_snapshot(
                STEP_NAME, SNAPSHOT_VERSION, {name: _pack_windows(windows) for name, windows in streams.items()}
            )
            for partition, streams in self._open.items()
        }


def _by_session(encoded: EncodedSegment) -> list[tuple[str, list[Chunk]]]:
    """Group the chunks by session, in order; a session that ends without a chunk here comes with none."""
    groups: dict[str, list[Chunk]] = {session: [] for session in encoded.closed_sessions[:1]}
    for chunk in encoded.chunks:
        groups.setdefault(chunk.session, []).append(chunk)
    for session in encoded.closed_sessions:
        groups.setdefault(session, [])
    return list(groups.items())


def _owned(chunk: Chunk) -> Chunk:
    """Copy the tokens out of the row's block, which must not be held in memory for a whole window."""
    return replace(chunk, tokens=chunk.tokens.copy())


def _pack_windows(windows: Mapping[str, OpenWindow]) -> StreamSnapshot:
    headers: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for n, (query_id, window) in enumerate(sorted(windows.items())):
        chunks = [{k: v for k, v in vars(c).items() if k != "tokens"} for c in window.chunks]
        headers.append(
            {"query": query_id, "session": window.session, "window_index": window.window_index, "chunks": chunks}
        )
        arrays |= {f"{n}/{i}": c.tokens for i, c in enumerate(window.chunks)}
    return StreamSnapshot({"windows": headers}, arrays)


def _restore(blob: bytes) -> dict[str, dict[str, OpenWindow]]:
    streams: dict[str, dict[str, OpenWindow]] = {}
    for stream_id, (header, arrays) in unpack_snapshot(STEP_NAME, SNAPSHOT_VERSION, blob).items():
        streams[stream_id] = {
            w["query"]: OpenWindow(
                w["session"],
                w["window_index"],
                tuple(Chunk(**c, tokens=arrays[f"{n}/{i}"]) for i, c in enumerate(w["chunks"])),
            )
            for n, w in enumerate(header["windows"])
        }
    return streams
