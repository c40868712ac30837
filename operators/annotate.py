"""The annotate step: standing queries over each stream's tokens, answered by the LLM.

State is what the queries still need: where each stream's scene began, the chunks of open windows, and which alerts
hold. The windows advance in strict row order; the answers are waited for outside that order, so that those of many
streams are asked for together, while the rows leave in order with the results that they led to. Whether an alert is a
new occurrence needs the answers before it: each judgement waits for the one before it on the same stream, and a
barrier for those before it.

Queries may be changed while it runs. A change is taken up as a barrier passes, and counts from the next window on:
each open window is kept, also in the snapshot, with the definition that it began with. So every committed row follows
from one definition, the one that was in force when the row's window began in the run that committed it; what a crash
undoes is asked again as the queries are then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from ..models.prompts import VideoAnswer, VideoPrompt
from ..models.selection import VideoChunk, select_chunks
from .busy_time import BusyTime
from .errors import PromptError, StormlineError
from .ordering import Turnstile
from .queries import StandingQuery, by_id
from .rows import AnnotatedSegment, Barrier, Chunk, DeadLetter, EncodedSegment, Result, Row, block_of, rows_of
from .scenes import SceneSpec, SceneState, step_scenes
from .snapshots import StreamSnapshot, pack_snapshot, unpack_snapshot
from .windows import OpenWindow, add_chunk, close_session

logger = logging.getLogger(__name__)

STEP_NAME = "annotate"
SNAPSHOT_VERSION = 2
REASONS = {
    "not_asked": "a query's window does not fit the model, which no other try would change; its detail says how far",
}
"""Every `reason` of a dead letter that answering writes."""

Ask = Callable[[VideoPrompt], Awaitable[VideoAnswer]]
ReadQueries = Callable[[], Sequence[StandingQuery]]


@dataclass(frozen=True)
class _Judged:
    """What became of one closed window of an alert."""

    holds: StandingQuery | None  # the definition under which the alert holds after it; None: it does not
    result: Result | DeadLetter | None  # a row where it began or ceased to hold, or could not be asked about


_Verdict = _Judged | Awaitable[_Judged]


@dataclass
class _Stream:
    """What is kept of one stream."""

    scene: SceneState | None = None
    windows: dict[str, OpenWindow] = field(default_factory=dict)  # by query
    alerts: dict[str, _Verdict] = field(default_factory=dict)  # by query, of its newest window

    def copy(self) -> _Stream:
        return _Stream(self.scene, dict(self.windows), dict(self.alerts))

    def forget(self, query_ids: set[str]) -> None:
        self.windows = {name: window for name, window in self.windows.items() if name not in query_ids}
        self.alerts = {name: judged for name, judged in self.alerts.items() if name not in query_ids}

    @property
    def query_ids(self) -> set[str]:
        return {*self.windows, *self.alerts}

    @property
    def empty(self) -> bool:
        return self.scene is None and not self.windows and not self.alerts


_Streams = dict[tuple[str, int], dict[str, _Stream]]  # by partition, then stream


class TimedAsk:
    """Asks, and counts the time in which an answer is waited for.

    Args:
        ask: Asks one question.
    """

    def __init__(self, ask: Ask):
        self._ask_one = ask
        self.asking = BusyTime()

    async def __call__(self, prompt: VideoPrompt) -> VideoAnswer:
        """Return the answer."""
        with self.asking:
            return await self._ask_one(prompt)


class Annotate:
    """Answer standing queries; a Ray Data step over one-row blocks, one actor a lane, many calls at once.

    Takes `EncodedSegment` and `Barrier` rows, gives `AnnotatedSegment` and `Barrier` rows with the same
    `lane_seq`. A failed answer raises and fails the lane: a result is never left out silently. A question that does not
    fit the model at all is a dead letter.

    Args:
        read_queries: Gives the standing queries of the moment; called here, and as each barrier passes. Where it fails
            later on, those that were in force stay.
        ask: Gives the LLM's answer to one prompt; raises when there is none.
        model_name: Written into the results.
        scenes: How scenes are told apart.
        snapshots: This step's states to go on from, by partition.
    """

    def __init__(
        self,
        read_queries: ReadQueries,
        ask: Ask,
        model_name: str,
        scenes: SceneSpec,
        snapshots: Mapping[tuple[str, int], bytes] | None = None,
    ):
        self._read_queries = read_queries
        self._queries = by_id(read_queries())
        self._ask = ask if isinstance(ask, TimedAsk) else TimedAsk(ask)
        self._model_name = model_name
        self._scenes = scenes
        self._turnstile = Turnstile()
        self._streams: _Streams = {partition: _unpack(blob) for partition, blob in (snapshots or {}).items()}
        held = {query_id for stream in self._each() for query_id in stream.query_ids}
        self._forget(held - self._queries.keys())  # removed while no lane ran

    async def __call__(self, table: pa.Table) -> AsyncIterator[pa.Table]:
        """Handle the rows of one block, asking about all of them at once."""
        yield block_of(await asyncio.gather(*(self._handle(row) for row in rows_of(table))))

    async def _handle(self, row: Row) -> Row:
        async with self._turnstile.turn(row.lane_seq):
            if row.kind == Barrier.KIND:
                self._take_up_changes()
                streams = {key: {name: s.copy() for name, s in held.items()} for key, held in self._streams.items()}
            else:
                encoded = EncodedSegment.from_row(row)
                pending = self.advance(encoded)
        if row.kind == Barrier.KIND:
            barrier = Barrier.from_row(row).with_snapshots(STEP_NAME, await _pack(streams))
            return barrier.with_busy(llm=self._ask.asking.busy_s).to_row(row.lane_seq)
        found = await asyncio.gather(*pending)
        letters = tuple(each for each in found if isinstance(each, DeadLetter))
        if letters:
            encoded = replace(encoded, dead_letters=(*encoded.dead_letters, *letters))
        results = tuple(each for each in found if isinstance(each, Result))
        return AnnotatedSegment(encoded, results).to_row(row.lane_seq)

    def advance(self, encoded: EncodedSegment) -> list[Awaitable[Result | DeadLetter | None]]:
        """Take one record's chunks into the open windows; return what will come of the windows that they closed."""
        meta = encoded.meta
        streams = self._streams.setdefault((meta.topic, meta.partition), {})
        stream = streams.setdefault(meta.stream_id, _Stream())
        queries = {query_id: query for query_id, query in self._queries.items() if query.watches(meta.stream_id)}
        pending: list[Awaitable[Result | DeadLetter | None]] = []
        for session, chunks in _by_session(encoded):
            for chunk in chunks:
                stream.scene, cuts = step_scenes(stream.scene, chunk, self._scenes)
                stream.windows, closed = add_chunk(stream.windows, _owned(chunk), queries, cuts)
                pending += [self._ask_about(window, stream) for window in closed]
            if session in encoded.closed_sessions:
                stream.windows, closed = close_session(stream.windows, session)
                pending += [self._ask_about(window, stream) for window in closed]
                stream.scene = None
                stream.alerts = {}  # what holds at a session's end is told once more if the next one begins with it
        # Of an alert that watches no more, or is one no more, and whose last window is over, nothing is known of what
        # comes later.
        asked = (*queries.values(), *(window.query for window in stream.windows.values()))
        watching = {query.id for query in asked if query.kind == "alert"}
        stream.alerts = {query_id: verdict for query_id, verdict in stream.alerts.items() if query_id in watching}
        if stream.empty:
            del streams[meta.stream_id]
        return pending

    def _take_up_changes(self) -> None:
        try:
            queries = by_id(self._read_queries())
        except StormlineError as error:
            logger.warning("queries_not_read kept=%d error=%s", len(self._queries), error)
            return
        removed = self._queries.keys() - queries.keys()
        self._queries = queries
        self._forget(removed)

    def _forget(self, query_ids: set[str]) -> None:
        for stream in self._each():
            stream.forget(query_ids)

    def _each(self) -> Iterator[_Stream]:
        for streams in self._streams.values():
            yield from streams.values()

    def _ask_about(self, window: OpenWindow, stream: _Stream) -> Awaitable[Result | DeadLetter | None]:
        if window.query.kind != "alert":
            return asyncio.ensure_future(self._answer_or_letter(window))
        before = stream.alerts.get(window.query.id)
        judged = asyncio.ensure_future(self._judge(window, before))
        stream.alerts[window.query.id] = judged
        return _result_of(judged)

    async def _judge(self, window: OpenWindow, before: _Verdict | None) -> _Judged:
        """Have the LLM look at an alert's window; a row where it begins to hold, and where it no longer does."""
        query = window.query
        assert query.condition is not None
        answer = await self._answer_or_letter(window)
        held = None if before is None else (await _known(before)).holds
        held = held if held is not None and query.asks_as(held) else None
        if isinstance(answer, DeadLetter):
            return _Judged(held, answer)
        if query.condition.holds(answer.answer):
            return _Judged(query, replace(answer, alert=True) if held is None else None)
        return _Judged(None, answer if held is not None else None)

    async def _answer_or_letter(self, window: OpenWindow) -> Result | DeadLetter:
        try:
            return await self._answer(window)
        except PromptError as error:
            last = window.chunks[-1]
            return DeadLetter(
                reason="not_asked",
                detail=f"query {window.query.id!r} could not be asked: {error}",
                stream_id=last.stream_id,
                session=window.session,
                seq=0,
                topic=last.topic,
                partition=last.partition,
                offset=last.offset,
                start_ns=window.start_ns,
                n_bytes=0,
            )

    async def _answer(self, window: OpenWindow) -> Result:
        query = window.query
        origin_ns = window.origin_ns
        chunks = [
            VideoChunk(start_s=(c.start_ns - origin_ns) / 1e9, end_s=(c.end_ns - origin_ns) / 1e9, tokens=c.tokens)
            for c in window.chunks
        ]
        chosen = select_chunks(chunks, query.token_budget, query.token_policy)
        asked_s = time.monotonic()
        prompt = VideoPrompt(text=query.prompt, chunks=tuple(chosen), max_new_tokens=query.max_new_tokens)
        answer = await self._ask(prompt)
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


async def _known(verdict: _Verdict) -> _Judged:
    return verdict if isinstance(verdict, _Judged) else await verdict


async def _result_of(verdict: _Verdict) -> Result | DeadLetter | None:
    return (await _known(verdict)).result


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


async def _pack(partitions: _Streams) -> dict[tuple[str, int], bytes]:
    """Return the states as they were when their barrier passed, once the answers before it are there."""
    packed = {}
    for partition, streams in partitions.items():
        snapshots = {name: await _pack_stream(stream) for name, stream in streams.items()}
        packed[partition] = pack_snapshot(STEP_NAME, SNAPSHOT_VERSION, snapshots)
    return packed


async def _pack_stream(stream: _Stream) -> StreamSnapshot:
    # Windows of several queries share their chunks; each is written once.
    chunks = {(c.session, c.chunk_index): c for window in stream.windows.values() for c in window.chunks}
    place = {key: i for i, key in enumerate(chunks)}
    header: dict[str, Any] = {
        "scene": None if stream.scene is None else stream.scene.to_header(),
        "chunks": [{k: v for k, v in vars(c).items() if k != "tokens"} for c in chunks.values()],
        "windows": [
            {
                "query": window.query.model_dump(mode="json"),
                "session": window.session,
                "window_index": window.window_index,
                "passed": window.passed,
                "first_ns": window.first_ns,
                "chunks": [place[c.session, c.chunk_index] for c in window.chunks],
            }
            for window in stream.windows.values()
        ],
        "alerts": [
            judged.holds.model_dump(mode="json")
            for judged in [await _known(verdict) for verdict in stream.alerts.values()]
            if judged.holds is not None
        ],
    }
    return StreamSnapshot(header, {str(i): c.tokens for i, c in enumerate(chunks.values())})


def _unpack(blob: bytes) -> dict[str, _Stream]:
    return {name: _unpack_stream(s) for name, s in unpack_snapshot(STEP_NAME, SNAPSHOT_VERSION, blob).items()}


def _unpack_stream(snapshot: StreamSnapshot) -> _Stream:
    header, arrays = snapshot
    chunks = [Chunk(**c, tokens=arrays[str(i)]) for i, c in enumerate(header["chunks"])]
    stream = _Stream(None if header["scene"] is None else SceneState.from_header(header["scene"]))
    for w in header["windows"]:
        query = StandingQuery.model_validate(w["query"])
        mine = tuple(chunks[i] for i in w["chunks"])
        stream.windows[query.id] = OpenWindow(
            query, w["session"], w["window_index"], mine, w["passed"], w.get("first_ns")
        )
    for definition in header["alerts"]:
        query = StandingQuery.model_validate(definition)
        stream.alerts[query.id] = _Judged(query, None)
    return stream
