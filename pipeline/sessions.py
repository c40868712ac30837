"""From Kafka records to segments: whose record it is, which session, which place in it.

The source is the one place that sees a stream's records in order, so it decides here what is new, repeated or
missing. The decision needs a small state for each stream, which travels with the barriers and is restored with
the offsets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from ..operators.errors import CheckpointError
from ..operators.rows import DeadLetter, Segment, SegmentMeta

CURSOR_VERSION = 2
# The year 2200: later times are mistakes, as of microseconds for milliseconds. Those near the end of 64 bits could not
# be written, and those after the year 9999 not be read by Python.
MAX_TIME_NS = 7_258_118_400 * 10**9
MAX_TIME_MS = MAX_TIME_NS // 10**6
MAX_SEQ = 2**63 - 2


@dataclass(frozen=True)
class StreamCursor:
    """Where one stream stands."""

    session: str
    session_start_ns: int  # start_ns of the first segment seen of the session
    next_seq: int
    ended: bool = False
    previous_session: str | None = None  # its late records are dropped, not taken for a new session
    skipped: int = 0  # segments that were skipped since the newest one taken
    said: str | None = None  # the session as its publisher calls it, where it ended one of that name before


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


class SessionTracker:
    """Turn records of some partitions into segments, in order.

    A record may carry the headers `session`, `seq`, `start_ns`, `content-type` and `end`. Each may be missing:
    the session is then one that never ends, the sequence is counted, the time is the record's timestamp.

    Guarantee: the same records after the same restored cursors give the same segments.
    """

    def __init__(self, cursors: Mapping[tuple[str, int], Mapping[str, StreamCursor]] | None = None):
        self._cursors: dict[tuple[str, int], dict[str, StreamCursor]] = {
            partition: dict(streams) for partition, streams in (cursors or {}).items()
        }
        counted = ("records", "bytes", "duplicates", "gaps", "bad_headers", "skipped")
        self.counters: dict[str, int] = dict.fromkeys(counted, 0)

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
        streams = self._cursors.setdefault((record.topic, record.partition), {})
        cursor = streams.get(name)

        placed = _place(cursor, headers, record)
        if placed is None:
            self.counters["duplicates"] += 1
            return None
        cursor, seq, missing = placed
        start_ns = headers.start_ns if headers.start_ns is not None else record.append_ns
        if cursor.session_start_ns < 0:
            cursor = replace(cursor, session_start_ns=start_ns)
        gap_segments = cursor.skipped + missing
        skipped = gap_segments + 1 if skip else 0
        streams[name] = replace(cursor, next_seq=seq + 1, ended=headers.end, skipped=skipped)
        self.counters["skipped"] += skip
        meta = SegmentMeta(
            stream_id=name,
            session=cursor.session,
            seq=seq,
            start_ns=start_ns,
            session_start_ns=cursor.session_start_ns,
            content_type=headers.content_type,
            end=headers.end,
            gap_segments=gap_segments,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            append_ns=record.append_ns,
            n_bytes=len(value),
        )
        notices = [DeadLetter.of(meta, "bad_header", f"{text}; went on without it") for text in bad]
        if missing:
            self.counters["gaps"] += 1
            detail = f"segments {seq - missing} to {seq - 1} never arrived before {meta.where}"
            notices.append(DeadLetter.of(meta, "gap", detail))
        return Segment(meta, b"" if skip else value, tuple(notices))

    def snapshot(self) -> dict[tuple[str, int], bytes]:
        """Return each partition's cursors after the last record taken."""
        return {
            partition: json.dumps(
                {"version": CURSOR_VERSION, "streams": {name: asdict(c) for name, c in sorted(streams.items())}}
            ).encode()
            for partition, streams in self._cursors.items()
        }

    @classmethod
    def restore(cls, snapshots: Mapping[tuple[str, int], bytes]) -> SessionTracker:
        """Build a tracker that goes on after the snapshots.

        Raises:
            CheckpointError: If a snapshot is of another version.
        """
        cursors = {}
        for (topic, partition), data in snapshots.items():
            state = json.loads(bytes(data))
            if state["version"] != CURSOR_VERSION:
                raise CheckpointError(
                    f"source state of {topic}[{partition}] has version {state['version']}, expected {CURSOR_VERSION}: "
                    "it was written by another stormline; use that one, or a new output folder"
                )
            cursors[topic, partition] = {name: StreamCursor(**c) for name, c in state["streams"].items()}
        return cls(cursors)


@dataclass(frozen=True)
class _Headers:
    session: str | None = None
    seq: int | None = None
    start_ns: int | None = None
    content_type: str = ""
    end: bool = False


def _place(cursor: StreamCursor | None, headers: _Headers, record: Record) -> tuple[StreamCursor, int, int] | None:
    """Return the cursor to go on with, the record's seq and the segments missing before it; None for a repeat."""
    session = headers.session if headers.session is not None else (cursor.session if cursor else "")
    if cursor is not None and cursor.said is not None and session == cursor.said:
        session = cursor.session
    is_new = cursor is None or session != cursor.session or (cursor.ended and headers.seq is None)
    if cursor is not None and session == cursor.previous_session:
        return None
    if is_new:
        seq = headers.seq or 0
        # Two sessions that their publisher did not name, or named alike, are told apart by where they began.
        said = None
        if cursor is not None and session == cursor.session:
            said = headers.session
            session = f"{said or ''}@{record.topic}-{record.partition}-{record.offset}"
        fresh = StreamCursor(session, -1, seq, previous_session=cursor.session if cursor else None, said=said)
        return fresh, seq, seq
    assert cursor is not None
    seq = headers.seq if headers.seq is not None else cursor.next_seq
    if seq < cursor.next_seq:
        return None
    return cursor, seq, seq - cursor.next_seq


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
