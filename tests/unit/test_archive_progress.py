"""What a person sees of an archive's run: how far it is, how fast, and which step holds it up."""

import io
from types import SimpleNamespace

import pytest
from output_folder import list_videos
from rich.console import Console

from stormline.operators.busy_time import BusyTime
from stormline.operators.rows import Barrier, DecodedSegment, Position
from stormline.pipeline.archive.progress import ArchiveProgress, bottleneck
from stormline.pipeline.archive.run_log import RunLog, RunSample
from stormline.pipeline.archive.work_list import RANGES_PER_VIDEO


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def status(sampled, n_bytes=0, next_offset=0, busy_s=None, **fields):
    known = {"results": 3, "restarts": 0, "dead_letters": 0, "newest": (), "lanes": 1, **fields}
    return SimpleNamespace(
        sampled=sampled, n_bytes=n_bytes, next_offsets={("archive", 0): next_offset}, busy_s=busy_s or {}, **known
    )


def make_progress(root, *, terminal=False, decoders=2):
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, highlight=False, color_system=None)
    return ArchiveProgress(console, root, 2.0, decoders, clock), clock, file


def test_progress_when_no_terminal_then_plain_lines_with_the_bottleneck(tmp_path):
    list_videos(tmp_path, "a", "b", "c", "d", n_bytes=100)
    progress, clock, file = make_progress(tmp_path)

    with progress:
        progress.ready()
        progress.status(status(0))
        clock.now_s += 2
        progress.status(status(40, 50, 0, {"read": 0.0, "decode": 2.0, "encode": 1.9, "llm": 0.2}))
        clock.now_s += 10
        progress.status(
            status(240, 200, 2 * RANGES_PER_VIDEO, {"read": 0.1, "decode": 8.0, "encode": 11.4, "llm": 2.2})
        )

    last = file.getvalue().splitlines()[-1]
    assert "videos 2/4 · 2 min 0 s of video · 10.0 x real time · 12 s left · 3 answers" in last
    assert "busy: reading 1 %, decode 30 %, encode 95 %, LLM 20 %, bottleneck: encode" in last
    assert "\x1b" not in file.getvalue()


def test_progress_when_a_terminal_then_a_view_that_is_gone_at_the_end(tmp_path):
    list_videos(tmp_path, "a", "b")
    progress, clock, file = make_progress(tmp_path, terminal=True)

    with progress:
        progress.ready()
        clock.now_s += 5
        result = SimpleNamespace(stream_id="a", answer="a [bold]red[/] car", emitted_ns=1)
        progress.status(status(20, 5, RANGES_PER_VIDEO, {"decode": 1.0}, newest=(result,)))
        clock.now_s += 5
        progress.status(status(40, 9, RANGES_PER_VIDEO, {"decode": 9.0}, newest=(result,)))
        progress._live.refresh()

    shown = file.getvalue()
    assert "1/2 videos" in shown
    assert "bottleneck" in shown
    assert "a: a [bold]red[/] car" in shown
    assert "\x1b[?25h" in shown  # the cursor is there again


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ({"decode": 0.9, "llm": 0.2}, "decode"),
        ({"llm": 0.6}, "LLM"),
        ({"decode": 0.3, "llm": 0.2}, "none of them"),
        ({}, "none of them"),
    ],
)
def test_bottleneck_when_a_step_is_busy_then_that(busy, expected):
    assert bottleneck(busy) == expected


def test_busy_time_when_several_are_at_work_then_counted_once():
    clock = Clock()
    busy = BusyTime(clock)

    with busy:
        clock.now_s += 1
        with busy:
            clock.now_s += 2
        assert busy.busy_s == 3
    clock.now_s += 10
    with busy:
        clock.now_s += 1

    assert busy.busy_s == 4


def test_barrier_when_steps_add_how_busy_they_were_then_all_is_there_at_its_end():
    barrier = Barrier((Position("archive", 0, 1),), 5, busy_s={"read": 0.5}).with_busy(decode=1.5).with_busy(llm=2.0)

    assert Barrier.from_row(barrier.to_row(0)).busy_s == {"read": 0.5, "decode": 1.5, "llm": 2.0}
    assert DecodedSegment.__dataclass_fields__["decode_s"].default == 0.0


def test_run_log_when_samples_come_then_often_at_first_and_only_where_something_changed(tmp_path):
    log = RunLog(tmp_path)

    for second in range(0, 1_200, 5):
        log.add(RunSample(second, second, min(second, 900), 0, 9, 0))
    log.add(RunSample(1_201, 1_201, 901, 9, 9, 0), last=True)
    with log._path.open("a") as file:
        file.write('{"time_s": 1')  # a crash

    times = [sample.took_s for sample in RunLog(tmp_path).read()]
    assert times[:4] == [0, 10, 20, 30]
    assert times[60:] == [650, 710, 770, 830, 890, 950, 1_201]
    assert len({sample.run_s for sample in RunLog(tmp_path).read()}) == 1
