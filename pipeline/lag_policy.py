"""What becomes of records when a lane is slower than its feeds: they wait, or those that are too old are skipped.

The decision is made where records enter the lane, by a record's age (now minus its Kafka timestamp) and by stream.
Skipped records are told of with the barrier that steps over them, so that the rows that tell of them and the positions
behind them are committed together: after a crash the records since the last commit are decided on anew, and each one
is either in the tables or in one row that says that it was skipped, never in both and never in neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase

from ..operators.rows import DeadLetter, SegmentMeta
from .settings import LagRule

_StreamKey = tuple[str, int, str]  # topic, partition, stream


@dataclass(frozen=True)
class SkippedRecords:
    """Records of one stream that follow each other and were skipped."""

    rule: LagRule
    first: SegmentMeta
    last: SegmentMeta
    n_records: int
    n_bytes: int

    def dead_letter(self) -> DeadLetter:
        """Return the row that tells of them."""
        times = f"{_utc(self.first.start_ns)} to {_utc(self.last.start_ns)}"
        detail = (
            f"{self.n_records} records, offsets {self.first.offset} to {self.last.offset}, {times}, were older than "
            f"{self.rule.max_lag_s:g} s when their turn came; skipped to within {self.rule.resume_s:g} s"
        )
        return replace(DeadLetter.of(self.first, "skipped", detail), n_bytes=self.n_bytes)


class LagPolicy:
    """Decides for each record whether it is too old, and remembers what was skipped since the last barrier.

    Args:
        rules: The first one that a stream fits counts; none: it waits.
        clock_ns: The clock on the wall.
    """

    def __init__(self, rules: Sequence[LagRule], clock_ns: Callable[[], int] = time.time_ns):
        self._rules = tuple(rules)
        self._clock_ns = clock_ns
        self._rule_of: dict[str, LagRule | None] = {}
        self._skipping: set[_StreamKey] = set()
        self._open: dict[_StreamKey, SkippedRecords] = {}
        self._closed: list[SkippedRecords] = []

    def is_too_old(self, stream: _StreamKey, append_ns: int) -> bool:
        """Tell whether a stream's next record is to be skipped.

        Once one is, so are the following ones up to the rule's lower limit: else every few records would be a gap.
        One without a usable timestamp (0) has no age, and is taken.
        """
        rule = self._find(stream[2])
        if rule is None or rule.policy != "skip":
            return False
        limit_s = rule.resume_s if stream in self._skipping else rule.max_lag_s
        too_old = append_ns > 0 and self._clock_ns() - append_ns > limit_s * 1e9
        (self._skipping.add if too_old else self._skipping.discard)(stream)
        return too_old

    def skipped(self, meta: SegmentMeta) -> None:
        """Note a record that was skipped."""
        rule = self._find(meta.stream_id)
        assert rule is not None
        stream = (meta.topic, meta.partition, meta.stream_id)
        before = self._open.get(stream)
        if before is None:
            self._open[stream] = SkippedRecords(rule, meta, meta, 1, meta.n_bytes)
        else:
            n_records, n_bytes = before.n_records + 1, before.n_bytes + meta.n_bytes
            self._open[stream] = replace(before, last=meta, n_records=n_records, n_bytes=n_bytes)

    def taken(self, meta: SegmentMeta) -> None:
        """Note a record that was not: it ends what was skipped before it."""
        gap = self._open.pop((meta.topic, meta.partition, meta.stream_id), None)
        if gap is not None:
            self._closed.append(gap)

    def take_letters(self) -> list[DeadLetter]:
        """Return what tells of all that was skipped since the last call, for the barrier that steps over it."""
        gaps, self._closed, self._open = [*self._closed, *self._open.values()], [], {}
        return [gap.dead_letter() for gap in gaps]

    def _find(self, stream_id: str) -> LagRule | None:
        if stream_id not in self._rule_of:
            fitting = (r for r in self._rules if any(fnmatchcase(stream_id, pattern) for pattern in r.patterns))
            self._rule_of[stream_id] = next(fitting, None)
        return self._rule_of[stream_id]


def _utc(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, timezone.utc).isoformat(timespec="milliseconds")
