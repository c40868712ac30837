"""`stormline archive` as a command, as far as it needs no lane: its options about times, and its exit status."""

import signal
import sqlite3
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest
from output_folder import Folder
from typer.testing import CliRunner

from stormline.operators.errors import SettingsError
from stormline.operators.rows import DeadLetter
from stormline.pipeline import supervisor
from stormline.pipeline.archive.feed import ArchiveFeed, ArchiveOptions
from stormline.pipeline.archive.work_list import RANGES_PER_VIDEO
from stormline.pipeline.cli import app
from stormline.pipeline.commands.archive import archive_times, exit_status

NOON_NS = 1_769_860_800 * 10**9  # 2026-01-31T12:00:00Z


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ({}, 0),
        ({"done": 5, "damaged": 2}, 0),
        ({"done": 5, "failed": 1}, 3),
        ({"done": 5, "waiting": 1}, 130),
        ({"failed": 1, "waiting": 1}, 130),  # the same command goes on; what failed is told of at the end
        ({"done": 5, "failed": 0, "waiting": 0}, 0),
    ],
)
def test_exit_status_when_videos_failed_or_are_still_to_do_then_it_says_so(states, status):
    assert exit_status(states) == status


@pytest.mark.parametrize(
    ("every", "window_s"), [("30s", 30.0), ("10m", 600.0), ("7", 7.0), ("video", 86_400.0), ("scenes", None)]
)
def test_every_when_a_time_scenes_or_the_video_then_the_length_of_a_window(every, window_s):
    assert archive_times(every, "0", None).window_s == window_s


@pytest.mark.parametrize(
    ("start", "start_ns"),
    [
        ("0", 0),
        ("mtime", None),
        ("2026-01-31T12:00", NOON_NS),
        ("2026-01-31T13:00:00.5+01:00", NOON_NS + 5 * 10**8),
        ("1970-01-01", 0),
    ],
)
def test_start_when_a_moment_or_the_files_own_then_the_time_of_the_first_frame(start, start_ns):
    assert archive_times("30s", start, None).start_ns == start_ns


def test_watch_when_wanted_then_how_often_to_look_and_else_once():
    assert archive_times("30s", "0", "2m").watch_s == 120.0
    assert archive_times("30s", "0", None).watch_s == 0.0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--every", "often"], "'often' is no length of time"),
        (["--start", "noon"], "'noon' is no time"),
        (["--watch", "--watch-every", "soon"], "'soon' is no length of time"),
        (["--watch", "--watch-every", "0"], "--watch-every 0: expected more than 0"),
    ],
)
def test_archive_when_a_time_is_none_then_refused_before_anything_is_made(option, said, tmp_path):
    run = CliRunner().invoke(app, ["archive", str(tmp_path), "--out", str(tmp_path / "out"), *option])

    assert isinstance(run.exception, SettingsError)
    assert said in str(run.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        ("outcomes.write_videos", OSError(28, "disk is full")),
        ("report.write_report", sqlite3.OperationalError("disk is full")),
    ],
)
def test_archive_when_the_disk_is_full_at_its_end_then_what_failed_and_the_exit_status_are_told_all_the_same(
    writer, error, tmp_path, monkeypatch
):
    def full(*args, **kwargs):
        raise error

    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"no video")
    ArchiveFeed(out, ArchiveOptions([str(videos)]), lambda text: None).partitions(1)
    letter = DeadLetter("not_media", "no", "a.mp4", "v1", 0, "archive", 0, 0, 0, 0)
    Folder(out, topic="archive").commit(dead_letters=[letter], next_offset=RANGES_PER_VIDEO)
    monkeypatch.setattr(f"stormline.pipeline.archive.{writer}", full)

    run = CliRunner().invoke(app, ["archive", str(videos), "--out", str(out)])

    assert run.exit_code == 3, run.output
    assert "a.mp4: not_media: no" in run.output
    assert "disk is full" in run.output


@pytest.fixture
def stopped_while_ray_starts(monkeypatch):
    """Have a stop signal come while Ray starts."""

    @contextmanager
    def starting(settings, *others):
        signal.raise_signal(signal.SIGTERM)
        yield

    monkeypatch.setattr(supervisor, "embedded_ray", starting)


@pytest.mark.parametrize("options", [[], ["--watch"]])
def test_archive_when_stopped_while_ray_starts_then_its_exit_status_says_that_all_is_to_do(
    stopped_while_ray_starts, options, tmp_path
):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"no video")

    run = CliRunner().invoke(app, ["archive", str(videos), "--out", str(out), *options])

    assert run.exit_code == 130, run.output
    assert "stopped before it began" in run.output
    assert not (out / "report.html").exists()
    assert not (out / "archive").exists()


def test_archive_when_stopped_while_ray_starts_and_earlier_videos_are_finished_then_not_taken_for_done(
    stopped_while_ray_starts, tmp_path
):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"no video")
    ArchiveFeed(out, ArchiveOptions([str(videos)]), lambda text: None).partitions(1)
    Folder(out, topic="archive").commit(next_offset=RANGES_PER_VIDEO)
    (videos / "b.mp4").write_bytes(b"new")

    run = CliRunner().invoke(app, ["archive", str(videos), "--out", str(out)])

    assert run.exit_code == 130, run.output


@pytest.mark.parametrize(("reason", "status", "state"), [("not_media", 3, "failed"), (None, 0, "done")])
def test_archive_when_run_again_and_nothing_is_new_then_its_exit_status_tells_how_the_videos_fared(
    reason, status, state, tmp_path
):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"no video")
    ArchiveFeed(out, ArchiveOptions([str(videos)]), lambda text: None).partitions(1)
    letters = [DeadLetter(reason, "no", "a.mp4", "v1", 0, "archive", 0, 0, 0, 0)] if reason else []
    Folder(out, topic="archive").commit(dead_letters=letters, next_offset=RANGES_PER_VIDEO)

    run = CliRunner().invoke(app, ["archive", str(videos), "--out", str(out)])

    assert run.exit_code == status, run.output
    assert "nothing new" in run.output
    assert pq.read_table(out / "archive" / "videos.parquet").column("state").to_pylist() == [state]
    assert (out / "report.html").exists()
