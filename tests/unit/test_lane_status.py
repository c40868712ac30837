"""When a lane that failed counts as well again: a lane that is not must be given up in the end."""

from dataclasses import replace

import pytest

from stormline.pipeline.lane import LaneStatus

FRESH = LaneStatus(0)


@pytest.mark.parametrize(
    ("changes", "further"),
    [
        ({}, False),
        ({"epoch": 7, "lag_records": 3}, False),  # the barrier that every life begins with; then it died again
        ({"epoch": 7, "lag_records": 3, "segments": 5}, False),
        ({"epoch": 8, "lag_records": 3, "segments": 5, "committed": 5}, True),
        ({"epoch": 7, "lag_records": 0}, True),
    ],
)
def test_lane_status_when_after_a_restart_then_only_progress_counts(changes, further):
    assert replace(FRESH, **changes).got_further_than(None) == further


def test_lane_status_when_nothing_more_was_committed_then_is_not_further():
    before = replace(FRESH, epoch=8, lag_records=3, committed=5)

    assert not replace(before, epoch=9).got_further_than(before)
    assert replace(before, committed=6).got_further_than(before)
