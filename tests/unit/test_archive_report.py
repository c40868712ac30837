"""The report of an archive: all in one file, of a bounded size, and nothing in it that a video's name could do."""

import asyncio
import re
from html.parser import HTMLParser

import pytest
from archive_clips import write_clip
from output_folder import Folder, caption, list_videos
from typer.testing import CliRunner

from stormline.operators.errors import SettingsError
from stormline.pipeline.archive import report
from stormline.pipeline.archive.asking import AskTogether
from stormline.pipeline.archive.outcomes import Outcome
from stormline.pipeline.archive.report import MAX_FAILURES, MAX_PICTURES, Card, choose, render, small_picture
from stormline.pipeline.archive.run_log import RunSample
from stormline.pipeline.archive.work_list import RANGES_PER_VIDEO, WorkItem, WorkList
from stormline.pipeline.cli import app

NASTY = '<script>alert(1)</script>"&.mp4'


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def outcome(n, state="done", name=None):
    item = WorkItem(0, n, f"/v/{n}", name or f"video {n}.mp4", "v1", 1, 10, 0, 0)
    return Outcome(item, state, "not_media" if state == "failed" else "", "no")


def samples(n, run_s=1.0):
    return [RunSample(run_s + i, 10.0 * i, 100.0 * i, i, n, i, {"encode": 0.9}, run_s) for i in range(1, n + 1)]


def test_report_when_an_archive_is_done_then_pictures_captions_and_failures_are_in_it(tmp_path):
    good = write_clip(tmp_path / "videos" / "good.mp4", 2)
    out = tmp_path / "out"
    out.mkdir()
    stat = good.stat()
    WorkList(out).append(
        WorkItem(0, n, str(tmp_path / "videos" / name), name, "v1", 1, stat.st_size, stat.st_mtime_ns, 0)
        for n, name in enumerate(["good.mp4", "gone.mp4"])
    )
    Folder(out, topic="archive").commit(
        caption("good.mp4", 0, 2, "a red <car>", session="v1"), next_offset=2 * RANGES_PER_VIDEO
    )

    run = CliRunner().invoke(app, ["report", str(out)])

    assert run.exit_code == 0, run.output
    page = Elements((out / "report.html").read_text())
    assert [source[:23] for source in page.sources] == ["data:image/jpeg;base64,"]
    assert "a red <car>" in page.text
    assert "no picture" in page.text  # of the one that is gone


def test_report_when_names_are_awkward_then_they_are_text():
    text = render(
        NASTY,
        [outcome(0, "failed", NASTY), outcome(1, "done", NASTY)],
        [Card(outcome(1, "done", NASTY), NASTY, b"")],
        [],
    )

    page = Elements(text)
    assert "script" not in page.tags
    assert page.text.count(NASTY) == 5
    assert not re.search(r"https?://|url\(|@import", text)


def test_report_when_there_are_ten_thousand_videos_then_its_size_is_bounded_and_its_numbers_are_of_all():
    found = [outcome(n, "failed" if n % 3 == 0 else "done") for n in range(10_000)]
    chosen = choose([o for o in found if o.state == "done"], MAX_PICTURES)

    text = render("night", found, [Card(o, "x" * 300, b"j" * 15_000) for o in chosen], samples(5_000))

    assert len(text) < 6_000_000
    page = Elements(text)
    assert (page.tags.count("figure"), page.tags.count("li")) == (MAX_PICTURES, MAX_FAILURES)
    assert "6,666videos done" in page.text
    assert "and 2,834 more" in page.text
    assert chosen[0].item.number < 10
    assert chosen[-1].item.number > 9_900
    assert len(re.search(r'polyline points="([^"]*)"', text).group(1).split()) <= report.MAX_POINTS


def test_report_when_there_were_two_runs_then_the_chart_and_the_sums_are_of_both():
    text = render("night", [outcome(0)], [], [*samples(3, 1.0), *samples(2, 500.0)])

    page = Elements(text)
    assert "50 sof work in 2 run(s)" in page.text
    assert "10.0 ×real time" in page.text
    points = re.search(r'polyline points="([^"]*)"', text).group(1).split()
    assert [point.split(",")[1] for point in points] == ["20.0"] * 5  # as fast all the time
    assert points[-1].startswith("790.0,")


def test_small_picture_when_a_video_then_a_jpeg(tmp_path):
    assert small_picture(str(write_clip(tmp_path / "a.mp4", 2)))[:2] == b"\xff\xd8"


def test_report_when_no_archive_then_refused(tmp_path):
    run = CliRunner().invoke(app, ["report", str(tmp_path)])

    assert isinstance(run.exception, SettingsError)
    assert "is no archive" in str(run.exception)


@pytest.mark.parametrize(("to", "message"), [("", "is a folder; the report is one file"), ("none/r.html", "r.html: ")])
def test_report_when_it_cannot_be_written_there_then_said_and_nothing_is_left(to, message, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    list_videos(out, "a.mp4")
    Folder(out, topic="archive").commit()

    run = CliRunner().invoke(app, ["report", str(out), "--to", str(other / to)])

    assert isinstance(run.exception, SettingsError)
    assert f"{other / to}" in str(run.exception)
    assert message in str(run.exception)
    assert sorted(tmp_path.iterdir()) == [other, out]


def test_report_when_a_video_has_waited_then_it_is_still_to_do(tmp_path):
    items = list_videos(tmp_path, "a", "b")

    text = render("x", [Outcome(item, "waiting") for item in items], [], [])

    assert "2still to do" in Elements(text).text


def test_ask_together_when_questions_are_held_back_then_that_is_not_busy_time():
    seconds = [0.0]

    async def ask(prompt):
        seconds[0] += 2.0
        return prompt

    async def both():
        together = AskTogether(ask, 2, 60.0)
        together.asking._clock_s = lambda: seconds[0]
        first = asyncio.ensure_future(together("a"))
        await asyncio.sleep(0)
        seconds[0] += 50.0  # it is held
        assert [await together("b"), await first] == ["b", "a"]
        return together.asking.busy_s

    assert asyncio.run(both()) == pytest.approx(4.0)
