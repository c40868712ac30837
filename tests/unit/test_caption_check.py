"""Captions of the generated feed against its truth."""

from datetime import datetime, timedelta, timezone

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stormline.models.training.shapes import ShapesSpec, ShapesWorld
from stormline.pipeline.caption_check import check_captions

SPEC = ShapesSpec(seed=3)
BEGAN = datetime(2026, 1, 1, tzinfo=timezone.utc)
TIME = pa.timestamp("us", tz="UTC")


def write(root, captions):
    """Write an output folder whose stream began at `BEGAN`; captions are (start in s, stop in s, text)."""
    at = [BEGAN + timedelta(seconds=start) for start, _, _ in captions]
    until = [BEGAN + timedelta(seconds=stop) for _, stop, _ in captions]
    n = len(captions)
    for name, columns in {
        "tokens": {"start_time": pa.array([BEGAN + timedelta(seconds=2 * i) for i in range(n)], TIME)},
        "results": {
            "start_time": pa.array(at, TIME),
            "end_time": pa.array(until, TIME),
            "answer": [text for _, _, text in captions],
            "kind": ["caption"] * n,
        },
    }.items():
        (root / name).mkdir()
        table = pa.table({"stream_id": ["shapes"] * n, "session": ["s"] * n, **columns})
        pq.write_table(table, root / name / "lane-000-epoch-00000001.parquet")


def clear_windows(n):
    world = ShapesWorld(SPEC)
    spans = ((4.0 * i, 4.0 * i + 4) for i in range(1000))
    return [(a, b, world.truth(a, b).caption) for a, b in spans if world.truth(a, b).clear][:n]


def test_captions_when_one_is_wrong_then_the_others_are_right(tmp_path):
    windows = clear_windows(5)
    windows[2] = (*windows[2][:2], "a small purple cat sleeps")
    write(tmp_path, windows)

    check = check_captions(tmp_path, "shapes", SPEC)

    assert (check.checked, check.right, check.left_out) == (5, 4, 0)
    assert check.clauses == pytest.approx(0.8)


def test_captions_when_something_happens_at_a_windows_end_then_left_out(tmp_path):
    world = ShapesWorld(SPEC)
    t_s = next(e.t_s for e in world.events(10.0, 500.0))
    write(tmp_path, [(t_s - 0.5, t_s + 3.5, "anything")])

    check = check_captions(tmp_path, "shapes", SPEC)

    assert (check.checked, check.left_out) == (0, 1)


def test_captions_when_no_run_has_written_then_none(tmp_path):
    assert check_captions(tmp_path, "shapes", SPEC).checked == 0
