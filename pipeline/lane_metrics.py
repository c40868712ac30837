"""A lane's numbers for Prometheus, through Ray's own metrics."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from ..operators.rows import Barrier


class LaneMetrics:
    """What a lane tells at each commit; Ray serves it on each node's metrics port, with ``ray_`` before the names.

    stormline_lag_records    by lane, topic and partition: records behind the end; -1 where unknown
    stormline_lag_seconds    by lane: the age of what is committed; -1 where unknown
    stormline_skipped_records_total    by lane: records that were too old
    """

    def __init__(self, lane: int):
        self._lane = {"lane": str(lane)}
        by_partition = ("lane", "topic", "partition")
        self._records = Gauge("stormline_lag_records", "Records behind the partition's end.", by_partition)
        self._seconds = Gauge("stormline_lag_seconds", "Age of what the lane has committed.", ("lane",))
        self._skipped = Counter("stormline_skipped_records_total", "Records that were too old.", ("lane",))
        self._n_skipped = 0

    def tell(self, barrier: Barrier, lag_s: float) -> None:
        """Take the numbers of a barrier that was committed."""
        for p in barrier.positions:
            self._records.set(p.lag, {**self._lane, "topic": p.topic, "partition": str(p.partition)})
        self._seconds.set(lag_s, self._lane)
        n_skipped = barrier.counters.get("skipped", 0)
        if n_skipped > self._n_skipped:
            self._skipped.inc(n_skipped - self._n_skipped, self._lane)
            self._n_skipped = n_skipped
