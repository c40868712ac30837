"""The lane's source where its media are files: the work list in order, each video in ranges, and then the end.

What `kafka_source` is for Kafka: one read task, whose rows name a file and a range of it instead of carrying bytes.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ...operators.busy_time import BusyTime
from ...operators.errors import MediaError
from ...operators.media import check_unchanged
from ...operators.rows import Barrier, DeadLetter, FileRange, Position, Segment, SegmentMeta, block_of, table_text
from ..lane_source import BarrierTimer, LaneSource
from .feed import ArchivePlan
from .file_ranges import CutRange, cut_file
from .work_list import RANGES_PER_VIDEO, TOPIC, WorkItem, WorkList, by_partition

logger = logging.getLogger(__name__)

FOLLOW_S = 1.0  # between two looks at the list's end
PACE_POLL_S = 0.1  # each look costs two processes some CPU
REASONS = {
    "cut_short": "reading broke off before the file's end; what came before was used",
    "error": "an error of ours; the log has its traceback",
}
"""Every `reason` of a dead letter that the source writes, besides those of `operators.decode`."""


@dataclass
class Pace:
    """Keeps the source from running ahead of its lane: its rows weigh nothing, but the frames behind them do.

    A barrier that had to wait for a hundred videos would be late, too.
    """

    n_taken: Callable[[], int]  # rows that the lane has taken to its end
    max_ahead: int
    _known: int = 0  # what `n_taken` said last

    def wait_for(self, lane_seq: int) -> None:
        """Return when a row may leave."""
        while lane_seq - self._known > self.max_ahead:
            self._known = self.n_taken()
            if lane_seq - self._known > self.max_ahead:
                time.sleep(PACE_POLL_S)


@dataclass(frozen=True)
class LaneRows:
    """Asks a lane how many rows it has taken."""

    lane: Any  # the actor

    def __call__(self) -> int:
        """Return it."""
        import ray

        return ray.get(self.lane.n_taken.remote())


@dataclass(frozen=True)
class ArchiveSourcePlan:
    """What one lane reads, and from where."""

    archive: ArchivePlan
    partitions: tuple[int, ...]
    next_offsets: Mapping[int, int]  # from the checkpoint; others begin at 0
    barrier_interval_s: float
    pace: Pace


class ArchiveSource(LaneSource):
    """Read a lane's partitions of the work list, one video after the other, with a barrier every few seconds.

    It ends after the last video, with a final barrier, unless it is to follow.
    """

    def __init__(self, plan: ArchiveSourcePlan):
        super().__init__(read_archive, plan)


def read_archive(plan: ArchiveSourcePlan) -> Iterator[pa.Table]:
    """Yield blocks of one row each: a decoder takes one range at a time."""
    lane_seq = itertools.count()
    for item in ArchiveReader(plan).items():
        seq = next(lane_seq)
        plan.pace.wait_for(seq)
        yield block_of([item.to_row(seq)])


@dataclass
class ArchiveReader:
    """A lane's place in the work list.

    Args:
        plan: What to read, and from where.
    """

    plan: ArchiveSourcePlan
    next_offsets: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.next_offsets = {p: self.plan.next_offsets.get(p, 0) for p in self.plan.partitions}
        self._list = WorkList(self.plan.archive.root)
        self._parts: dict[int, list[WorkItem]] = {}
        self._reading = BusyTime()

    def items(self) -> Iterator[Segment | Barrier]:
        """Yield segments, a barrier first and whenever its time is due, and a final one at the end."""
        interval_s = self.plan.barrier_interval_s
        self._look_for_more()
        yield self.barrier()
        timer = BarrierTimer(interval_s)
        while True:
            for segment in self._segments():
                self.next_offsets[segment.meta.partition] = _offset_after(segment.meta)
                yield segment
                if timer.due:
                    yield self.barrier()
                    timer.restart()
            if not self.plan.archive.follow:
                yield self.barrier(final=True)
                return
            time.sleep(min(FOLLOW_S, interval_s))
            self._look_for_more()
            if timer.due:
                yield self.barrier()
                timer.restart()

    def _look_for_more(self) -> None:
        for partition, items in by_partition(self._list.follow()).items():
            self._parts.setdefault(partition, []).extend(items)

    def barrier(self, *, final: bool = False) -> Barrier:
        """Return one for the present place; its lag is in videos."""
        positions = tuple(
            Position(TOPIC, p, next_offset, lag=len(self._parts.get(p, ())) - next_offset // RANGES_PER_VIDEO)
            for p, next_offset in self.next_offsets.items()
        )
        return Barrier(positions, made_ns=time.time_ns(), busy_s={"read": self._reading.busy_s}, final=final)

    def _segments(self) -> Iterator[Segment]:
        """Yield what is left of all partitions, counting the time that finding it takes."""
        left = self._left()
        while True:
            with self._reading:
                segment = next(left, None)
            if segment is None:
                return
            yield segment

    def _left(self) -> Iterator[Segment]:
        for partition, next_offset in list(self.next_offsets.items()):
            number, n_ranges = divmod(next_offset, RANGES_PER_VIDEO)
            for item in self._parts.get(partition, ())[number:]:
                yield from segments_of(item, self.plan.archive.range_s, n_ranges)
                n_ranges = 0


def segments_of(item: WorkItem, range_s: float, skip: int = 0) -> Iterator[Segment]:
    """Yield one video's segments, the last one with `end`.

    A video that cannot be read, or only in part, ends with an empty segment and a dead letter.

    Args:
        item: The video.
        range_s: Length of a segment to aim at.
        skip: So many of the first ones are committed already.
    """
    next_seq = skip
    try:
        check_unchanged(item.uri, item.n_bytes, item.mtime_ns)
        if not item.n_bytes:
            raise MediaError("empty", f"{item.uri} has no bytes; expected a video")
        for seq, cut in enumerate(cut_file(item.uri, range_s)):
            if seq == next_seq:
                yield _segment(item, seq, cut)
                next_seq += 1
        if next_seq > skip:
            return
        reason, detail = "changed", f"{item.uri} has fewer ranges than when {skip} of them were committed"
    except MediaError as error:
        reason, detail = error.reason, str(error)
    except OSError as error:
        reason, detail = "unreadable", f"cannot read {item.uri}: {error.strerror or error}"
    except Exception as error:  # the edge of the worker: one file must not stop the others
        logger.exception("video not read uri=%s", item.uri)
        reason, detail = "error", f"{type(error).__name__}: {error}"
    yield _nothing_more(item, next_seq, reason, detail)


def _segment(item: WorkItem, seq: int, cut: CutRange) -> Segment:
    meta = _meta(item, seq, end=cut.last, start_ns=item.start_ns + cut.elapsed_ns, n_bytes=cut.n_bytes)
    pts = cut.start_pts, cut.keep_from_pts, cut.stop_pts, cut.origin_pts
    file = FileRange(item.uri, *pts, n_bytes=item.n_bytes, mtime_ns=item.mtime_ns)
    letters = (DeadLetter.of(meta, "cut_short", table_text(f"{item.uri}: {cut.broken}")),) if cut.broken else ()
    return Segment(meta, b"", letters, file)


def _nothing_more(item: WorkItem, seq: int, reason: str, detail: str) -> Segment:
    meta = _meta(item, seq, end=True, start_ns=item.start_ns, n_bytes=max(0, item.n_bytes))
    return Segment(meta, b"", (DeadLetter.of(meta, reason, table_text(detail)),))


def _meta(item: WorkItem, seq: int, *, end: bool, start_ns: int, n_bytes: int) -> SegmentMeta:
    return SegmentMeta(
        stream_id=item.stream_id,
        session=item.session,
        seq=seq,
        start_ns=start_ns,
        session_start_ns=item.start_ns,
        content_type="",
        end=end,
        gap_segments=0,
        topic=TOPIC,
        partition=item.partition,
        offset=item.first_offset + seq,
        append_ns=time.time_ns(),
        n_bytes=n_bytes,
    )


def _offset_after(meta: SegmentMeta) -> int:
    number = meta.offset // RANGES_PER_VIDEO
    return (number + 1) * RANGES_PER_VIDEO if meta.end else meta.offset + 1


def open_source(
    archive: ArchivePlan,
    partitions: Sequence[tuple[str, int]],
    positions: Sequence[Position],
    *,
    barrier_interval_s: float,
    pace: Pace,
) -> ArchiveSource:
    """Return a lane's source.

    Args:
        archive: Which list, and how.
        partitions: Of the lane.
        positions: Where they go on, from the checkpoint.
        barrier_interval_s: Time between commits.
        pace: How far to run ahead of the lane.
    """
    return ArchiveSource(
        ArchiveSourcePlan(
            archive=archive,
            partitions=tuple(partition for _, partition in partitions),
            next_offsets={p.partition: p.next_offset for p in positions if p.topic == TOPIC},
            barrier_interval_s=barrier_interval_s,
            pace=pace,
        )
    )
