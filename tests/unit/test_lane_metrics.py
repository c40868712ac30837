"""The numbers that a lane tells Ray's metrics at each commit."""

from typing import ClassVar

import pytest

from stormline.operators.rows import Barrier, Position
from stormline.pipeline import lane_metrics
from stormline.pipeline.lane_metrics import LaneMetrics


class FakeMetric:
    """Keeps what it is told by its tags, of which it takes those that it was made with and no others, as Ray's do."""

    made: ClassVar = {}  # by name; set anew by each test

    def __init__(self, name, description="", tag_keys=()):
        assert name not in self.made
        assert description
        self.made[name] = self
        self.tag_keys = tag_keys
        self.values = {}

    def _key(self, tags):
        assert set(tags) == set(self.tag_keys)
        assert all(isinstance(value, str) for value in tags.values())
        return tuple(tags[key] for key in self.tag_keys)


class FakeGauge(FakeMetric):
    def set(self, value, tags):
        self.values[self._key(tags)] = value


class FakeCounter(FakeMetric):
    def inc(self, value, tags):
        assert value > 0
        self.values[self._key(tags)] = self.values.get(self._key(tags), 0) + value


@pytest.fixture
def told(monkeypatch):
    """Return a function that gives what was told up to now, by metric and tags."""
    made = {}
    monkeypatch.setattr(FakeMetric, "made", made)
    monkeypatch.setattr(lane_metrics, "Gauge", FakeGauge)
    monkeypatch.setattr(lane_metrics, "Counter", FakeCounter)
    return lambda: {name: dict(metric.values) for name, metric in made.items()}


def barrier(*lags, **counters):
    return Barrier(tuple(Position("video", p, 10, lag) for p, lag in enumerate(lags)), 0, counters=counters)


def test_metrics_when_barriers_are_committed_then_lags_are_the_newest_and_skipped_records_add_up(told):
    metrics = LaneMetrics(3)

    metrics.tell(barrier(7, -1, skipped=4), 2.5)
    first = told()
    metrics.tell(barrier(5, 0, skipped=6), 1.25)
    metrics.tell(barrier(5, 0, skipped=6), -1)

    assert first == {
        "stormline_lag_records": {("3", "video", "0"): 7, ("3", "video", "1"): -1},
        "stormline_lag_seconds": {("3",): 2.5},
        "stormline_skipped_records_total": {("3",): 4},
    }
    assert told() == {
        "stormline_lag_records": {("3", "video", "0"): 5, ("3", "video", "1"): 0},
        "stormline_lag_seconds": {("3",): -1},
        "stormline_skipped_records_total": {("3",): 6},
    }


def test_metrics_when_nothing_was_skipped_then_nothing_is_counted(told):
    LaneMetrics(0).tell(barrier(0), 0.0)

    assert told()["stormline_skipped_records_total"] == {}
