"""Archives through whole lanes on local Ray: files in, the same rows out, whatever happens on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from archive_clips import OPEN_GOPS, write_clip, write_sound
from archive_proof.check import Asked, problems
from archive_proof.folder import CONTAINERS, make_folder

from stormline.pipeline.archive.feed import ArchiveFeed, ArchiveOptions
from stormline.pipeline.archive.outcomes import count_states, outcomes, write_videos
from stormline.pipeline.archive.work_list import WorkList, committed_offsets
from stormline.pipeline.publish.publisher import publish_source
from stormline.pipeline.settings import load_settings
from stormline.pipeline.supervisor import Supervisor

pytestmark = pytest.mark.timeout(400)

QUERIES = "queries=[{id: caption, window_s: 10, max_new_tokens: 8}, {id: whole, window_s: 86400, max_new_tokens: 8}]"
SETS = ["lanes.barrier_interval_s=0.2", QUERIES]
NOT_COMPARED = {"latency_ms", "emitted_time"}  # of a run, not of its results
LIMIT_S = 200
REASONS = {"empty.mp4": "empty", "sound.mp4": "no_video", "text.mp4": "not_media"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a folder as people have them: good videos, and what only looks like some."""
    folder = tmp_path_factory.mktemp("videos")
    write_clip(folder / "holiday" / "a b ü 漢.mp4", 45)
    write_clip(folder / "open.mkv", 45, seed=2, **OPEN_GOPS)
    write_clip(folder / "vfr.mkv", 25, seed=3, vfr=True)
    write_clip(folder / "short.mp4", 3, seed=4)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("hello " * 100)
    write_sound(folder / "sound.mp4")
    return folder


def run(videos, out, *sets, **options):
    """Run an archive to its end; return its status."""
    settings = load_settings(None, [f"output.path={out}", *SETS, *sets])
    feed = ArchiveFeed(Path(out), ArchiveOptions([str(videos)], **options), lambda text: None)
    supervisor = Supervisor(settings, lambda text: None, archive=feed)
    deadline_s = time.monotonic() + LIMIT_S

    def watch(status):
        if time.monotonic() > deadline_s:
            supervisor.request_stop()

    status = supervisor.run(on_status=watch)
    assert time.monotonic() < deadline_s, f"not done after {LIMIT_S} s: {status}"
    return status


def table(out, name):
    rows = ds.dataset(Path(out) / name, format="parquet").to_table().to_pylist()
    keys = ("stream_id", "session", "start_time", "query_id", "offset")
    rows = [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in rows]
    return sorted(rows, key=lambda r: [str(r.get(k)) for k in keys])


def tables(out):
    return {name: [str(row) for row in table(out, name)] for name in ("tokens", "results", "dead_letters")}


@pytest.fixture(scope="module")
def quiet(videos, services, tmp_path_factory):
    """Run the folder once, undisturbed; return the output folder."""
    out = tmp_path_factory.mktemp("quiet")
    run(videos, out)
    return out


def test_archive_when_undisturbed_then_every_good_video_is_captioned_and_every_other_told_of(quiet):
    found = outcomes(quiet)
    results, tokens = table(quiet, "results"), table(quiet, "tokens")

    assert {o.item.stream_id: o.reason for o in found if o.state == "failed"} == REASONS
    assert count_states(found) == {"done": 4, "failed": 3}
    captions = [r for r in results if r["query_id"] == "caption" and r["stream_id"] == "holiday/a b ü 漢.mp4"]
    assert [r["start_time"].timestamp() for r in captions] == [0.0, 10.0, 20.0, 30.0, 40.0]
    whole = [r for r in results if r["query_id"] == "whole"]
    good = {"holiday/a b ü 漢.mp4": 45, "open.mkv": 45, "vfr.mkv": 25, "short.mp4": 3}
    assert {r["stream_id"]: round(r["end_time"].timestamp()) for r in whole} == good
    for name in good:
        chunks = [r for r in tokens if r["stream_id"] == name]
        assert [r["chunk_index"] for r in chunks] == list(range(len(chunks)))
    listed = pq.read_table(write_videos(quiet, found)).to_pylist()
    assert {r["stream_id"]: r["reason"] for r in listed if r["state"] == "failed"} == REASONS


def test_archive_when_a_folder_holds_every_container_and_codec_and_what_is_none_then_each_comes_out_right(
    services, tmp_path
):
    clips = make_folder(tmp_path / "videos", sum(len(codecs) for codecs in CONTAINERS.values()))

    run(tmp_path / "videos", tmp_path / "out")

    assert problems(tmp_path / "out", clips, Asked(window_s=10.0, whole="whole")) == []


def test_archive_when_published_instead_then_tokens_are_the_same_bit_for_bit(quiet, videos, broker, services, tmp_path):
    name = "holiday/a b ü 漢.mp4"
    publish_source(
        str(videos / name), bootstrap=broker, topic="of-a-file", stream_id=name, session="v1", speed=0, start_ns=0,
        method="copy",
    )  # fmt: skip
    sets = [f"kafka.bootstrap_servers={broker}", "kafka.topics=[of-a-file]", f"output.path={tmp_path}", *SETS]
    supervisor = Supervisor(load_settings(None, sets), lambda text: None)
    supervisor.run(until_idle_s=2.0)

    def bits(out):
        rows = [r for r in table(out, "tokens") if r["stream_id"] == name]
        return [(r["chunk_index"], r["start_time"], r["end_time"], r["tokens"]) for r in rows]

    assert len(bits(quiet)) > 20
    assert bits(tmp_path) == bits(quiet)


def test_readme_when_its_lines_read_a_real_output_then_each_reader_has_every_row(quiet, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [lines] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "pandas" in block]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out").symlink_to(quiet)

    names: dict = {}
    exec(lines, names)

    expected = sorted(row["answer"] for row in table(quiet, "results"))
    assert len(expected) > 10
    answers = {
        "duckdb": [answer for (answer,) in names["captions"].select("answer").fetchall()],
        "pandas": names["frame"]["answer"].tolist(),
        "polars": names["lazy"].collect()["answer"].to_list(),
        "datasets": list(names["rows"]["answer"]),
    }
    assert {reader: sorted(found) for reader, found in answers.items()} == dict.fromkeys(answers, expected)
    assert names["array"].dtype == "float16"
    assert names["array"].size == names["tokens"]["token_count"] * names["tokens"]["token_dim"] > 0


@pytest.mark.slow
def test_archive_when_killed_in_the_midst_and_run_again_then_as_one_quiet_run(
    quiet, videos, services, ray_session, tmp_path
):
    command = [sys.executable, "-m", "stormline.pipeline", "archive", str(videos), "--out", str(tmp_path)]
    for one in [f"ray.address={ray_session}", *SETS]:
        command += ["--set", one]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: committed_offsets(tmp_path).get(0, 0) >= 2_000_000 or process.poll() is not None)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = {r["stream_id"] for r in table(tmp_path, "results") if r["query_id"] == "whole"}

    status = run(videos, tmp_path)

    assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
    n_good = len([o for o in outcomes(tmp_path) if o.state == "done"])
    assert n_good == 4
    assert status.segments < run_segments(videos) - len(before)
    assert tables(tmp_path) == tables(quiet)


def run_segments(videos):
    return sum(len(list(segments)) for segments in all_segments(videos))


def all_segments(videos):
    from stormline.pipeline.archive.file_ranges import cut_file

    for path in videos.rglob("*.m*"):
        if path.name not in REASONS:
            yield cut_file(str(path), 10.0)


def wait_until(done):
    deadline_s = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.slow
def test_archive_when_run_again_then_only_what_is_new_changed_or_to_be_retried_is_done(services, tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    write_clip(videos / "one.mp4", 3)
    (videos / "later.mp4").write_text("not yet")
    run(videos, out)
    assert ArchiveFeed(out, ArchiveOptions([str(videos)]), print).has_work() is False

    write_clip(videos / "two.mp4", 3, seed=2)
    second = run(videos, out, "lanes.count=2")
    write_clip(videos / "one.mp4", 4, seed=5)
    third = run(videos, out)
    retried = run(videos, out, retry_failed=True)

    assert (second.segments, third.segments, retried.segments) == (1, 1, 1)
    assert [(i.stream_id, i.session) for i in WorkList(out).read()] == [
        ("later.mp4", "v1"), ("one.mp4", "v1"), ("two.mp4", "v1"), ("one.mp4@2", "v2"), ("later.mp4@2", "v2"),
    ]  # fmt: skip
    assert [o.state for o in outcomes(out)] == ["failed", "done", "done", "done", "failed"]
    ends = {r["stream_id"]: r["end_time"].timestamp() for r in table(out, "results") if r["query_id"] == "whole"}
    assert ends == {"one.mp4": 3.0, "two.mp4": 3.0, "one.mp4@2": 4.0}


@pytest.mark.slow
def test_archive_when_watching_then_new_videos_are_taken_up_until_it_is_stopped(services, tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    write_clip(videos / "one.mp4", 3)
    settings = load_settings(None, [f"output.path={out}", *SETS])
    feed = ArchiveFeed(out, ArchiveOptions([str(videos)], watch_s=0.2), lambda text: None)
    supervisor = Supervisor(settings, lambda text: None, archive=feed)
    deadline_s = time.monotonic() + LIMIT_S

    def watch(status):
        done = sum(o.state == "done" for o in outcomes(out))
        if done == 1 and not (videos / "two.mp4").exists():
            write_clip(tmp_path / "two.mp4", 3, seed=2).rename(videos / "two.mp4")
        if done == 2 or time.monotonic() > deadline_s:
            supervisor.request_stop()

    supervisor.run(on_status=watch)

    assert {r["stream_id"] for r in table(out, "results")} == {"one.mp4", "two.mp4"}
