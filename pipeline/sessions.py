"""From Kafka records to segments: whose record it is, which session, which place in it.

The source is the one place that sees a stream's records in order, so it decides here what is new, repeated or
missing, and which session has fallen silent and is over. The decision needs a small state for each stream, which
travels with the barriers and is restored with the offsets. The time is that of the partition's records: a replay
decides the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..operators.errors import CheckpointError
from ..operators.rows import DeadLetter, Segment, SegmentMeta

CURSOR_VERSION = 4
READABLE_VERSIONS = (2, 3, CURSOR_VERSION)
SESSION_IDLE_S = 3600.0
MOST_EARLIER = 8  # sessions of a stream that are remembered behind its newest: no record comes more restarts late
MOST_ENDED = 1000  # streams of a partition that are remembered after their end
# The year 2200: later times are mistakes, as of microseconds for milliseconds. Those near the end of 64 bits could not
# be written, and those after the year 9999 not be read by Python.
MAX_TIME_NS = 7_258_118_400 * 10**9
MAX_TIME_MS = MAX_TIME_NS // 10**6
MAX_SEQ = 2**62  # tables hold 64 bits, and records without `seq` are counted on from it


class EarlierSession(NamedTuple):
    """One that another session of its stream has followed: its late records are dropped, not taken for a new one."""

    said: str  # its publisher's name for it
    session: str  # ours
    next_seq: int  # records from there on were never taken


@dataclass(frozen=True)
class StreamCursor:
    """Where one stream stands."""

    session: str
    session_start_ns: int  # start_ns of the first segment seen of the session
    next_seq: int
    ended: bool = False
    earlier: tuple[EarlierSession, ...] = ()  # the newest last, `MOST_EARLIER` at most
    skipped: int = 0  # segments that were skipped since the newest one taken
    said: str | None = None  # the session as its publisher calls it, where it ended one of that name before
    heard_ns: int = 0  # its partition's time at its newest record
    silent: bool = False  # silence ended the session, not its publisher

    def find_earlier(self, said: str | None) -> EarlierSession | None:
        """Return the session that a record's header names, where that is one of those before."""
        if said in (None, self.session, self.said):
            return None
        return next((e for e in reversed(self.earlier) if said in (e.said, e.session)), None)

    def followed(self) -> tuple[EarlierSession, ...]:
        """Return the earlier sessions of a session that follows this one."""
        mine = EarlierSession(self.session if self.said is None else self.said, self.session, self.next_seq)
        return (*self.earlier, mine)[-MOST_EARLIER:]


@dataclass(frozen=True)
class Record:
    """What we use of one Kafka record."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int  # as Kafka gives it; -1 for none
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()

    @property
    def append_ns(self) -> int:
        """Return the timestamp in nanoseconds; 0 where there is none, or none that can be."""
        return self.timestamp_ms * 1_000_000 if 0 <= self.timestamp_ms <= MAX_TIME_MS else 0


@dataclass
class _Partition:
    """The streams of one partition, those that were heard of last at the end."""

    streams: dict[str, StreamCursor] = field(default_factory=dict)
    clock_ns: int = 0  # what its records' timestamps have come to
    forgot: bool = False  # a stream that had ended: an unknown one is not certain to be new

    def __post_init__(self) -> None:
        self._n_ended = sum(cursor.ended for cursor in self.streams.values())
        self._none_silent_until_ns = 0

    def put(self, name: str, cursor: StreamCursor) -> None:
        before = self.streams.get(name)
        self._n_ended += cursor.ended - (before is not None and before.ended)
        if before is None or cursor.heard_ns != before.heard_ns:
            self.streams.pop(name, None)
        self.streams[name] = cursor
        while self._n_ended > MOST_ENDED:
            del self.streams[next(name for name, each in self.streams.items() if each.ended)]
            self._n_ended -= 1
            self.forgot = True

    def advance(self, append_ns: int, most_ns: int) -> None:
        """Let time pass up to a record's timestamp, but not far: one that is wrong must not end all that is there."""
        if not append_ns:
            return
        if not self.clock_ns:
            self.clock_ns = append_ns
            self.streams = {name: replace(each, heard_ns=append_ns) for name, each in self.streams.items()}
        self.clock_ns = max(self.clock_ns, min(append_ns, self.clock_ns + most_ns))

    def fallen_silent(self, idle_ns: int) -> list[str]:
        """Return the streams whose session goes on and that were not heard of for so long, sorted."""
        if self.clock_ns <= self._none_silent_until_ns:
            return []
        names = []
        self._none_silent_until_ns = self.clock_ns + idle_ns
        for name, cursor in self.streams.items():
            if cursor.ended:
                continue
            if self.clock_ns - cursor.heard_ns <= idle_ns:
                self._none_silent_until_ns = cursor.heard_ns + idle_ns
                break
            names.append(name)
        return sorted(names)


class SessionTracker:
    """Turn records of some partitions into segments, in order.

    A record may carry the headers `session`, `seq`, `start_ns`, `content-type` and `end`. Each may be missing:
    the session is then one that only silence ends, the sequence is counted, the time is the record's timestamp.

    Guarantee: the same records after the same restored snapshots give the same segments.

    Args:
        idle_s: A session without a record for so long, by the timestamps of its partition's records, is over.
    """

    def __init__(self, idle_s: float = SESSION_IDLE_S):
        self._idle_ns = round(idle_s * 1e9)
        self._partitions: dict[tuple[str, int], _Partition] = {}
        # Of records beside their stream's session, by stream and by the session that they are of.
        self._strays: dict[tuple[str, int, str, str], DeadLetter] = {}
        counted = ("records", "bytes", "duplicates", "gaps", "bad_headers", "skipped", "strays")
        self.counters: dict[str, int] = dict.fromkeys(counted, 0)

    def end_silent(self, record: Record) -> list[Segment]:
        """Return the ends of the sessions that are over by the time of this record, which is to be taken next."""
        partition = self._partition_of(record)
        partition.advance(record.append_ns, self._idle_ns // 20)
        ends = []
        for name in partition.fallen_silent(self._idle_ns):
            cursor = partition.streams[name]
            partition.put(name, replace(cursor, ended=True, silent=True, skipped=0))
            meta = _meta(name, cursor, record, seq=cursor.next_seq, gap_segments=cursor.skipped, n_bytes=0, end=True)
            ends.append(Segment(replace(meta, by_silence=True), b""))
        return ends

    def _partition_of(self, record: Record) -> _Partition:
        key = (record.topic, record.partition)
        if key not in self._partitions:
            self._partitions[key] = _Partition()
        return self._partitions[key]

    def take(self, record: Record) -> Segment | None:
        """Return the record's segment, or None for one that was seen before (counted as a duplicate)."""
        return self._advance(record, skip=False)

    def skip(self, record: Record) -> Segment | None:
        """Step over a record as if it had been taken: the stream's next segment comes after a gap.

        Returns:
            What would have been taken, without its bytes, or None for one that was seen before.
        """
        return self._advance(record, skip=True)

    def _advance(self, record: Record, *, skip: bool) -> Segment | None:
        self.counters["records"] += 1
        value = record.value or b""
        self.counters["bytes"] += len(value)
        headers, bad = _read_headers(record)
        self.counters["bad_headers"] += len(bad)
        name = stream_id(record)
        partition = self._partition_of(record)
        before = partition.streams.get(name)

        earlier = before.find_earlier(headers.session) if before is not None else None
        if before is not None and earlier is not None and _is_stray(earlier, headers):
            self._note_stray(name, before, earlier, record)
            partition.put(name, _after_stray(before, earlier, headers))
            return None
        placed = _place(before, headers, record, partition.forgot) if earlier is None else None
        if placed is None:
            self.counters["duplicates"] += 1
            return None
        cursor, seq, missing = placed
        start_ns = headers.start_ns if headers.start_ns is not None else record.append_ns
        if cursor.session_start_ns < 0:
            cursor = replace(cursor, session_start_ns=start_ns)
        gap_segments = cursor.skipped + missing
        skipped = gap_segments + 1 if skip else 0
        taken = replace(cursor, next_seq=seq + 1, ended=headers.end, silent=False, skipped=skipped)
        partition.put(name, replace(taken, heard_ns=partition.clock_ns))
        self.counters["skipped"] += skip
        meta = _meta(
            name,
            cursor,
            record,
            seq=seq,
            start_ns=start_ns,
            gap_segments=gap_segments,
            n_bytes=len(value),
            content_type=headers.content_type,
            end=headers.end,
        )
        notices = [DeadLetter.of(meta, "bad_header", f"{text}; went on without it") for text in bad]
        if missing:
            self.counters["gaps"] += 1
            detail = f"segments {seq - missing} to {seq - 1} never arrived before {meta.where}"
            notices.append(DeadLetter.of(meta, "gap", detail))
        return Segment(meta, b"" if skip else value, tuple(notices))

    def take_letters(self) -> list[DeadLetter]:
        """Return what tells of the records, since the last call, that were of another session than their stream's."""
        letters, self._strays = [*self._strays.values()], {}
        return letters

    def _note_stray(self, name: str, cursor: StreamCursor, earlier: EarlierSession, record: Record) -> None:
        self.counters["strays"] += 1
        key = (record.topic, record.partition, name, earlier.session)
        n_bytes = len(record.value or b"")
        if key in self._strays:
            self._strays[key] = replace(self._strays[key], n_bytes=self._strays[key].n_bytes + n_bytes)
            return
        detail = (
            f"records of session {earlier.session!r} came from offset {record.offset} on, after session "
            f"{cursor.session!r} had begun, and were left out; do two publishers send as stream {name!r}?"
        )
        meta = replace(_meta(name, cursor, record, seq=earlier.next_seq, n_bytes=n_bytes), session=earlier.session)
        self._strays[key] = DeadLetter.of(meta, "two_sessions", detail)

    def snapshot(self) -> dict[tuple[str, int], bytes]:
        """Return each partition's state after the last record taken."""
        return {key: _pack(partition) for key, partition in self._partitions.items()}

    @classmethod
    def restore(cls, snapshots: Mapping[tuple[str, int], bytes], idle_s: float = SESSION_IDLE_S) -> SessionTracker:
        """Build a tracker that goes on after the snapshots.

        Raises:
            CheckpointError: If a snapshot is of another version.
        """
        tracker = cls(idle_s)
        for (topic, partition), data in snapshots.items():
            state = json.loads(bytes(data))
            if state["version"] not in READABLE_VERSIONS:
                raise CheckpointError(
                    f"source state of {topic}[{partition}] has version {state['version']}, expected {CURSOR_VERSION}: "
                    "it was written by another stormline; use that one, or a new output folder"
                )
            streams = {name: _unpack_cursor(cursor) for name, cursor in state["streams"].items()}
            tracker._partitions[topic, partition] = _Partition(
                streams, state.get("clock_ns", 0), state.get("forgot", False)
            )
        return tracker


def _meta(
    name: str,
    cursor: StreamCursor,
    record: Record,
    *,
    seq: int,
    n_bytes: int,
    start_ns: int | None = None,
    gap_segments: int = 0,
    content_type: str = "",
    end: bool = False,
) -> SegmentMeta:
    """Return which piece of which stream this is; without `start_ns` it begins when the record came."""
    return SegmentMeta(
        stream_id=name,
        session=cursor.session,
        seq=seq,
        start_ns=record.append_ns if start_ns is None else start_ns,
        session_start_ns=cursor.session_start_ns,
        content_type=content_type,
        end=end,
        gap_segments=gap_segments,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        append_ns=record.append_ns,
        n_bytes=n_bytes,
    )


def _pack(partition: _Partition) -> bytes:
    streams = {name: vars(cursor) for name, cursor in partition.streams.items()}
    state = {
        "version": CURSOR_VERSION,
        "clock_ns": partition.clock_ns,
        "forgot": partition.forgot,
        "streams": streams,
    }
    return json.dumps(state).encode()


def _unpack_cursor(state: dict[str, Any]) -> StreamCursor:
    earlier = state.pop("earlier", [])
    # Before version 4 a cursor had one earlier session, by our name alone.
    previous, previous_next_seq = state.pop("previous_session", None), state.pop("previous_next_seq", 0)
    if previous is not None:
        earlier = [(previous, previous, previous_next_seq)]
    return StreamCursor(**state, earlier=tuple(EarlierSession(*each) for each in earlier))


@dataclass(frozen=True)
class _Headers:
    session: str | None = None
    seq: int | None = None
    start_ns: int | None = None
    content_type: str = ""
    end: bool = False


def _place(
    cursor: StreamCursor | None, headers: _Headers, record: Record, forgot: bool
) -> tuple[StreamCursor, int, int] | None:
    """Place a record of its stream's session, or of one that begins with it.

    Returns:
        The cursor to go on with, the record's seq and the segments missing before it; None for a repeat.
    """
    session = headers.session if headers.session is not None else (cursor.session if cursor else "")
    if cursor is not None and cursor.said is not None and session == cursor.said:
        session = cursor.session
    is_new = cursor is None or session != cursor.session or (cursor.ended and (headers.seq is None or cursor.silent))
    if is_new:
        seq = headers.seq or 0
        said = None
        # Two sessions that their publisher did not name, or named alike, are told apart by where they began.
        before = cursor if cursor is not None and session == cursor.session else None
        if before is not None or (cursor is None and forgot and (headers.session is None or headers.seq != 0)):
            said = headers.session
            session = f"{said or ''}@{record.topic}-{record.partition}-{record.offset}"
        fresh = StreamCursor(
            session,
            session_start_ns=-1,
            next_seq=seq,
            earlier=cursor.followed() if cursor else (),
            said=said,
        )
        return fresh, seq, seq - before.next_seq if before is not None and seq >= before.next_seq else seq
    assert cursor is not None
    seq = headers.seq if headers.seq is not None else cursor.next_seq
    if seq < cursor.next_seq:
        return None
    return cursor, seq, seq - cursor.next_seq


def _is_stray(earlier: EarlierSession, headers: _Headers) -> bool:
    """Tell whether a record of an earlier session, which is dropped, was never taken.

    Without `seq` nothing shows that it was, and each offset comes once.
    """
    return headers.seq is None or headers.seq >= earlier.next_seq


def _after_stray(cursor: StreamCursor, earlier: EarlierSession, headers: _Headers) -> StreamCursor:
    """Return the cursor that knows a stray: should its seq come once more, it is a repeat."""
    if headers.seq is None:
        return cursor
    told = earlier._replace(next_seq=headers.seq + 1)
    return replace(cursor, earlier=tuple(told if e is earlier else e for e in cursor.earlier))


def ends_session(record: Record) -> bool:
    """Tell whether a record says that it is its session's last."""
    return _is_end(dict(record.headers))


def _is_end(headers: Mapping[str, bytes | None]) -> bool:
    return "end" in headers and (headers["end"] or b"").lower() not in (b"0", b"false")


def stream_id(record: Record) -> str:
    """Return whose record it is."""
    if record.key is None:
        return f"{record.topic}-{record.partition}"
    return record.key.decode("utf-8", "backslashreplace")


def _read_headers(record: Record) -> tuple[_Headers, list[str]]:
    raw = {name: value or b"" for name, value in record.headers}
    bad: list[str] = []

    def number(name: str, most: int) -> int | None:
        if name not in raw:
            return None
        try:
            value = int(raw[name])
        except ValueError:
            value = -1
        if not 0 <= value <= most:
            bad.append(f"header {name} is {raw[name][:40]!r}, expected a whole number from 0 to {most}")
            return None
        return value

    if record.timestamp_ms > MAX_TIME_MS:
        bad.append(f"the record's timestamp is {record.timestamp_ms}, expected milliseconds, {MAX_TIME_MS} at most")
    session = raw["session"].decode("utf-8", "backslashreplace") if "session" in raw else None
    headers = _Headers(
        session=session,
        seq=number("seq", MAX_SEQ),
        start_ns=number("start_ns", MAX_TIME_NS),
        content_type=raw.get("content-type", b"").decode("utf-8", "replace"),
        end=_is_end(raw),
    )
    return headers, bad
