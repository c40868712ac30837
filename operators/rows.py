"""The rows that travel through a lane, one record type per edge.

    source ─Segment─▶ decode ─DecodedSegment─▶ encode ─EncodedSegment─▶ annotate ─AnnotatedSegment─▶ commit
           ─Barrier─▶        ────────────────▶       (+ its snapshots) ▶         (+ its snapshots) ─▶

A row is a kind, the lane's own sequence number, a small JSON header, and bytes. It stands for one Kafka record or one
barrier and keeps its `lane_seq` from the source to the commit. Bytes are read back as views into the Arrow block,
without a copy.

A block (`BLOCK_SCHEMA`) is one Ray Data row that holds a few of these, since what Ray does for a block costs as much
as decoding a second of video: one row where they come one at a time, several where many are waiting.

Times are integer nanoseconds UTC, named `_ns`. The clock on the wall never enters a computation of frames or
tokens, only the times of the media do, so that a replay gives the same rows.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

_ROW_FIELDS = (
    pa.field("kind", pa.string(), nullable=False),
    pa.field("lane_seq", pa.int64(), nullable=False),
    pa.field("header", pa.string(), nullable=False),
    pa.field("parts", pa.list_(pa.large_binary()), nullable=False),
)
# A list, so that Ray Data, which hands a block on at once but cut into rows, has nothing to cut.
BLOCK_SCHEMA = pa.schema([pa.field("rows", pa.list_(pa.struct(_ROW_FIELDS)), nullable=False)])

Buffer = bytes | memoryview


@dataclass(frozen=True)
class Row:
    """One row of any edge, as its four columns."""

    kind: str
    lane_seq: int
    header: dict[str, Any]
    parts: tuple[Buffer, ...] = ()


def block_of(rows: Sequence[Row]) -> pa.Table:
    """Return a block of these rows, in order; the bytes of a lone row with one part are not copied."""
    if not rows:
        return BLOCK_SCHEMA.empty_table()
    columns = [
        pa.array([row.kind for row in rows], pa.string()),
        pa.array([row.lane_seq for row in rows], pa.int64()),
        pa.array([json.dumps(row.header, separators=(",", ":")) for row in rows], pa.string()),
        _lists_of_buffers([row.parts for row in rows]),
    ]
    structs = pa.StructArray.from_arrays(columns, fields=list(_ROW_FIELDS))
    return pa.table([pa.ListArray.from_arrays(_offsets([len(rows)]), structs)], schema=BLOCK_SCHEMA)


def _lists_of_buffers(lists: Sequence[Sequence[Buffer]]) -> pa.ListArray:
    parts = [part for each in lists for part in each]
    data = pa.py_buffer(parts[0]) if len(parts) == 1 else pa.py_buffer(b"".join(parts))
    offsets = pa.py_buffer(array("q", [0, *accumulate(memoryview(part).nbytes for part in parts)]))
    values = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(parts), [None, offsets, data])
    return pa.ListArray.from_arrays(_offsets([len(each) for each in lists]), values)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array([0, *accumulate(lengths)], pa.int32())


def rows_of(block: pa.Table) -> list[Row]:
    """Read the rows of a block; their parts are views into the block's memory."""
    kinds, seqs, headers, lists = block.column("rows").combine_chunks().flatten().flatten()
    return [
        Row(
            kind=kind.as_py(),
            lane_seq=seq.as_py(),
            header=json.loads(header.as_py()),
            parts=tuple(memoryview(part.as_buffer()) for part in parts.values),
        )
        for kind, seq, header, parts in zip(kinds, seqs, headers, lists, strict=True)
    ]


@dataclass(frozen=True)
class SegmentMeta:
    """Which piece of which stream this is, and where it came from."""

    stream_id: str
    session: str
    seq: int  # 0, 1, 2… within the session; counted by the source where the publisher sent none
    start_ns: int  # UTC time of its first frame
    session_start_ns: int  # origin of the session's sampling grid
    content_type: str  # as the publisher named it, or ""
    end: bool  # last segment of its session
    gap_segments: int  # segments missing just before this one, 0 where the sequence is whole
    topic: str
    partition: int
    offset: int  # of the record itself; a position to resume from is a `next_offset`
    append_ns: int  # the record's Kafka timestamp: for latency only
    n_bytes: int
    by_silence: bool = False  # an end that no record says; `offset` is that of the record whose time showed it

    @property
    def where(self) -> str:
        """Return ``topic[partition]@offset stream=… seq=…`` for messages."""
        place = f"{self.topic}[{self.partition}]@{self.offset}"
        return f"{place} stream={self.stream_id} session={self.session} seq={self.seq}"


@dataclass(frozen=True)
class DeadLetter:
    """Something that could not be used. `reason` is one word; `detail` says it in a sentence."""

    reason: str
    detail: str
    stream_id: str
    session: str
    seq: int
    topic: str
    partition: int
    offset: int
    start_ns: int
    n_bytes: int
    data: Buffer = field(repr=False, default=b"")  # the record's bytes, cut at the configured limit

    @classmethod
    def of(cls, meta: SegmentMeta, reason: str, detail: str, data: Buffer = b"") -> DeadLetter:
        """Build one from the segment that it happened to."""
        return cls(
            reason=reason,
            detail=detail,
            stream_id=meta.stream_id,
            session=meta.session,
            seq=meta.seq,
            topic=meta.topic,
            partition=meta.partition,
            offset=meta.offset,
            start_ns=meta.start_ns,
            n_bytes=meta.n_bytes,
            data=data,
        )


@dataclass(frozen=True)
class FileRange:
    """The part of a file that a segment of an archive is, in place of bytes. Times in the stream's own time base."""

    uri: str  # a local path, or an address that `pyarrow.fs` knows
    start_pts: int | None  # of the keyframe to decode from; None: the file's start
    keep_from_pts: int | None  # what is shown before belongs to the range before, and is decoded for reference only
    stop_pts: int | None  # of the keyframe that begins the next range; None: the file's end
    origin_pts: int | None  # of the frame at the session's start; None: the first one
    n_bytes: int  # of the whole file, and its time of change, as it was found: another file has other ranges
    mtime_ns: int


@dataclass(frozen=True)
class Segment:
    """One Kafka record, or a part of a file, source → decode."""

    meta: SegmentMeta
    data: Buffer = field(repr=False)
    dead_letters: tuple[DeadLetter, ...] = ()  # what the source saw: gaps before this record
    file: FileRange | None = None  # where the media is instead; then `data` is empty

    KIND = "segment"

    def to_row(self, lane_seq: int) -> Row:
        """Return its row."""
        dead, dead_parts = _pack_dead(self.dead_letters)
        header = {"meta": {**vars(self.meta)}, "dead": dead}
        if self.file is not None:
            header["file"] = asdict(self.file)
        return Row(self.KIND, lane_seq, header, (self.data, *dead_parts))

    @classmethod
    def from_row(cls, row: Row) -> Segment:
        """Read it back."""
        file = row.header.get("file")
        return cls(
            meta=SegmentMeta(**row.header["meta"]),
            data=row.parts[0],
            dead_letters=_unpack_dead(row.header["dead"], row.parts[1:]),
            file=None if file is None else FileRange(**file),
        )


@dataclass(frozen=True)
class DecodedSegment:
    """The frames of one segment that the sampling grid may need, decode → encode.

    Grid time g of a session is ``session_start_ns + g * 1e9 / fps``; the frame of g is the last one with
    time ≤ g. Inside a segment that is decided here. The segment's last frame, the *tail*, also covers grid
    times up to the next segment's first frame, which only the encoder can know: it keeps the tail in the
    stream's state.
    """

    meta: SegmentMeta
    grid_indices: np.ndarray  # (n,) int64, strictly rising: g with its frame inside this segment and decided
    frames: np.ndarray = field(repr=False)  # (n + 1, H, W, 3) uint8 RGB; the last one is the tail
    first_ns: int  # time of the segment's first frame
    tail_ns: int  # time of its last frame
    n_frames: int  # good frames, needed or not; 0 where the segment failed: then frames is (0, H, W, 3)
    dead_letters: tuple[DeadLetter, ...] = ()
    jpeg: Buffer = field(repr=False, default=b"")  # the tail as a small picture for people, where one was due
    decode_s: float = 0.0  # that a decoder was busy with it

    KIND = "frames"

    @property
    def failed(self) -> bool:
        """Whether nothing of the segment could be used."""
        return self.n_frames == 0

    def to_row(self, lane_seq: int) -> Row:
        """Return its row."""
        dead, dead_parts = _pack_dead(self.dead_letters)
        header = {
            "meta": {**vars(self.meta)},
            "grid": self.grid_indices.tolist(),
            "shape": list(self.frames.shape),
            "first_ns": self.first_ns,
            "tail_ns": self.tail_ns,
            "n_frames": self.n_frames,
            "dead": dead,
            "decode_s": self.decode_s,
        }
        return Row(self.KIND, lane_seq, header, (_view(self.frames), self.jpeg, *dead_parts))

    @classmethod
    def from_row(cls, row: Row) -> DecodedSegment:
        """Read it back; the frames are a read-only view."""
        h = row.header
        return cls(
            meta=SegmentMeta(**h["meta"]),
            grid_indices=np.array(h["grid"], np.int64),
            frames=np.frombuffer(row.parts[0], np.uint8).reshape(h["shape"]),
            first_ns=h["first_ns"],
            tail_ns=h["tail_ns"],
            n_frames=h["n_frames"],
            dead_letters=_unpack_dead(h["dead"], row.parts[2:]),
            jpeg=row.parts[1],
            decode_s=h["decode_s"],
        )


@dataclass(frozen=True)
class Chunk:
    """The tokens of K sampled frames of one session."""

    stream_id: str
    session: str
    chunk_index: int
    start_ns: int  # grid time of its first frame
    end_ns: int  # grid time of its last frame plus one grid step
    session_start_ns: int
    n_frames: int
    scene_score: float  # how much most of the picture differs from the chunk before, 0 to 2; nan for the first
    topic: str
    partition: int
    offset: int  # of the record that completed it
    append_ns: int  # that record's Kafka timestamp: for latency only
    tokens: np.ndarray = field(repr=False)  # (n_tokens, d_model) float16


@dataclass(frozen=True)
class Picture:
    """A stream's newest frame as a small JPEG, for people."""

    time_ns: int  # of the frame
    jpeg: bytes = field(repr=False)


@dataclass(frozen=True)
class LaneNews:
    """What the encoder tells at once, before it is committed; after a restart some of it comes again."""

    chunks: tuple[Chunk, ...] = ()
    ended: tuple[str, ...] = ()  # streams of which a session ended with these chunks, and no other began
    pictures: Mapping[str, Picture] = field(default_factory=dict)  # stream → its newest
    lags: Mapping[tuple[str, int], int] = field(default_factory=dict)  # (topic, partition) → records behind its end


@dataclass(frozen=True)
class EncodedSegment:
    """What one record completed, encode → annotate: usually no chunk or one, several for a long segment."""

    meta: SegmentMeta
    chunks: tuple[Chunk, ...]
    closed_sessions: tuple[str, ...] = ()  # sessions of this stream that end with these chunks
    dead_letters: tuple[DeadLetter, ...] = ()
    n_frames: int = 0  # good ones, needed or not
    n_sampled: int = 0  # taken on the grid

    KIND = "chunks"

    def to_row(self, lane_seq: int) -> Row:
        """Return its row."""
        dead, dead_parts = _pack_dead(self.dead_letters)
        chunk_headers, chunk_parts = _pack_chunks(self.chunks)
        header = {
            "meta": {**vars(self.meta)},
            "chunks": chunk_headers,
            "closed": list(self.closed_sessions),
            "n_frames": self.n_frames,
            "n_sampled": self.n_sampled,
            "dead": dead,
        }
        return Row(self.KIND, lane_seq, header, (*chunk_parts, *dead_parts))

    @classmethod
    def from_row(cls, row: Row) -> EncodedSegment:
        """Read it back; tokens are read-only views."""
        h = row.header
        n = len(h["chunks"])
        return cls(
            meta=SegmentMeta(**h["meta"]),
            chunks=_unpack_chunks(h["chunks"], row.parts[:n]),
            closed_sessions=tuple(h["closed"]),
            dead_letters=_unpack_dead(h["dead"], row.parts[n:]),
            n_frames=h["n_frames"],
            n_sampled=h["n_sampled"],
        )


ResultKind = Literal["caption", "alert"]
RESULT_KINDS: tuple[ResultKind, ...] = get_args(ResultKind)


@dataclass(frozen=True)
class Result:
    """One caption or alert: a row of the results table."""

    query_id: str
    kind: str  # of `RESULT_KINDS`; answers to `archive --ask` are captions of queries of their own
    stream_id: str
    session: str
    start_ns: int
    end_ns: int
    prompt: str
    answer: str
    alert: bool
    tokens_used: int  # video tokens given to the LLM
    token_policy: str
    latency_ms: float  # from asking the LLM to its answer
    model: str
    emitted_ns: int


@dataclass(frozen=True)
class AnnotatedSegment:
    """An encoded segment with the results that it led to, annotate → commit."""

    encoded: EncodedSegment
    results: tuple[Result, ...] = ()

    KIND = "results"

    def to_row(self, lane_seq: int) -> Row:
        """Return its row."""
        row = self.encoded.to_row(lane_seq)
        return Row(self.KIND, lane_seq, {**row.header, "results": [asdict(r) for r in self.results]}, row.parts)

    @classmethod
    def from_row(cls, row: Row) -> AnnotatedSegment:
        """Read it back."""
        return cls(EncodedSegment.from_row(row), tuple(Result(**r) for r in row.header["results"]))


@dataclass(frozen=True)
class Position:
    """Where a partition's reading goes on."""

    topic: str
    partition: int
    next_offset: int  # first not yet read
    lag: int = 0  # records behind the partition's end when the barrier was made; -1 where unknown
    until_ns: int = 0  # what was appended up to then was read when the barrier was made; 0 where unknown


class SnapshotKey(NamedTuple):
    """Whose state a snapshot holds: one step's, for the streams of one partition, so that it can move."""

    step: str
    topic: str
    partition: int


@dataclass(frozen=True)
class Barrier:
    """A cut through the lane: everything before it has passed each step when it reaches the commit.

    Each stateful step adds its snapshots under its own name as the barrier passes.
    """

    positions: tuple[Position, ...]
    made_ns: int
    snapshots: dict[SnapshotKey, Buffer] = field(default_factory=dict, repr=False)
    counters: dict[str, int] = field(default_factory=dict)  # what the source has seen since the lane started
    busy_s: dict[str, float] = field(default_factory=dict)  # of read, decode, encode, llm, since the lane started
    dead_letters: tuple[DeadLetter, ...] = ()  # of what it steps over without a row
    final: bool = False  # the source ends after this one

    KIND = "barrier"

    def with_snapshots(self, step: str, by_partition: Mapping[tuple[str, int], Buffer]) -> Barrier:
        """Return the barrier with one more step's states, one for each partition."""
        if any(key.step == step for key in self.snapshots):
            raise ValueError(f"step {step!r} added its snapshots to this barrier twice")
        mine = {SnapshotKey(step, topic, partition): data for (topic, partition), data in by_partition.items()}
        return replace(self, snapshots={**self.snapshots, **mine})

    def with_busy(self, **busy_s: float) -> Barrier:
        """Return the barrier with how long more steps have been busy."""
        return replace(self, busy_s={**self.busy_s, **busy_s})

    def to_row(self, lane_seq: int) -> Row:
        """Return its row."""
        header = {
            "positions": [asdict(p) for p in self.positions],
            "made_ns": self.made_ns,
            "counters": self.counters,
            "busy_s": self.busy_s,
            "snapshots": [list(key) for key in self.snapshots],
            "final": self.final,
        }
        dead, dead_parts = _pack_dead(self.dead_letters)
        return Row(self.KIND, lane_seq, {**header, "dead": dead}, (*self.snapshots.values(), *dead_parts))

    @classmethod
    def from_row(cls, row: Row) -> Barrier:
        """Read it back."""
        h = row.header
        n = len(h["snapshots"])
        return cls(
            positions=tuple(Position(**p) for p in h["positions"]),
            made_ns=h["made_ns"],
            counters=h["counters"],
            busy_s=h["busy_s"],
            snapshots=dict(zip((SnapshotKey(*key) for key in h["snapshots"]), row.parts[:n], strict=True)),
            dead_letters=_unpack_dead(h["dead"], row.parts[n:]),
            final=h["final"],
        )


def table_text(text: str) -> str:
    """Return text that a table can hold: a file's name may have bytes that are none."""
    return text.encode("utf-8", "backslashreplace").decode()


def _view(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _pack_dead(letters: Sequence[DeadLetter]) -> tuple[list[dict[str, Any]], list[Buffer]]:
    headers = [{k: v for k, v in vars(d).items() if k != "data"} for d in letters]
    return headers, [d.data for d in letters]


def _unpack_dead(headers: Sequence[dict[str, Any]], parts: Sequence[Buffer]) -> tuple[DeadLetter, ...]:
    return tuple(DeadLetter(**h, data=p) for h, p in zip(headers, parts, strict=True))


def _pack_chunks(chunks: Sequence[Chunk]) -> tuple[list[dict[str, Any]], list[Buffer]]:
    headers = [{**{k: v for k, v in vars(c).items() if k != "tokens"}, "shape": list(c.tokens.shape)} for c in chunks]
    return headers, [_view(c.tokens) for c in chunks]


def _unpack_chunks(headers: Sequence[dict[str, Any]], parts: Sequence[Buffer]) -> tuple[Chunk, ...]:
    chunks = []
    for header, part in zip(headers, parts, strict=True):
        fields = dict(header)
        shape = fields.pop("shape")
        chunks.append(Chunk(**fields, tokens=np.frombuffer(part, np.float16).reshape(shape)))
    return tuple(chunks)
