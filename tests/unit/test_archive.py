"""Archives as far as they need no Ray: what is found, the work list, and files in ranges."""

import json
import os
import threading
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_clips import OPEN_GOPS, write_clip, write_sound

from stormline.operators import decode
from stormline.operators.decode import Decode, decode_file
from stormline.operators.errors import CheckpointError, SettingsError
from stormline.operators.media import open_media
from stormline.operators.rows import Barrier, Segment
from stormline.operators.sampling import GridSpec, SamplerState, step_sampler
from stormline.pipeline.archive import file_ranges
from stormline.pipeline.archive.feed import ArchiveFeed, ArchiveOptions, ArchivePlan
from stormline.pipeline.archive.file_ranges import cut_file
from stormline.pipeline.archive.find_videos import content_hash, find_videos
from stormline.pipeline.archive.outcomes import outcomes, write_videos
from stormline.pipeline.archive.source import ArchiveReader, ArchiveSourcePlan, Pace, segments_of
from stormline.pipeline.archive.work_list import RANGES_PER_VIDEO, WorkItem, WorkList, is_done
from stormline.pipeline.commands.archive import archive_queries
from stormline.pipeline.settings import load_settings

GRID = GridSpec(Fraction(4))
HW = (48, 48)
DECODE = Decode(fps=4, frame_hw=HW)


def item_of(path, **fields):
    stat = path.stat()
    return WorkItem(**{
        "partition": 0, "number": 0, "uri": str(path), "stream_id": path.name, "session": "v1", "version": 1,
        "n_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "start_ns": 0, **fields,
    })  # fmt: skip


def through_a_lane(segment):
    return DECODE.decode(Segment.from_row(segment.to_row(0)))


def sampled(parts):
    state, frames, indices = SamplerState("v1"), [], []
    for part in parts:
        taken = step_sampler(state, part, GRID)
        state = taken.state
        frames.append(taken.frames)
        indices += taken.grid_indices.tolist()
    return indices, np.concatenate(frames).tobytes()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {
        "closed": write_clip(folder / "a b ü 漢.mp4", 12),
        "open": write_clip(folder / "open.mkv", 12, seed=2, **OPEN_GOPS),
        "vfr": write_clip(folder / "vfr.mkv", 12, seed=3, vfr=True),
    }


@pytest.mark.parametrize("kind", ["closed", "open", "vfr"])
def test_ranges_when_a_file_is_cut_then_together_they_give_each_frame_once(clips, kind):
    path = clips[kind]
    segments = list(segments_of(item_of(path), range_s=2.0))

    parts = [through_a_lane(segment) for segment in segments]

    whole = decode_file(path, segments[0].meta, grid=GRID, frame_hw=HW)
    assert len(segments) >= 5
    assert [s.meta.end for s in segments] == [False] * (len(segments) - 1) + [True]
    assert sum(part.n_frames for part in parts) == whole.n_frames == 96
    assert sampled(parts) == sampled([whole])
    assert [letter for part in parts for letter in part.dead_letters] == []
    assert any(s.file.keep_from_pts is not None for s in segments) == (kind == "open")


@pytest.mark.parametrize("fps", [1, 2])
def test_ranges_when_frames_are_decoded_long_before_they_are_shown_then_none_is_lost(fps, tmp_path):
    """Containers are entered by decoding times: with B-frames at one frame a second, three seconds too late."""
    path = write_clip(tmp_path / "slow.ts", 40, fps=fps, bf="3", g="10", x264opts="b-adapt=0:b-pyramid=normal")
    segments = list(segments_of(item_of(path), range_s=5.0))

    parts = [through_a_lane(segment) for segment in segments]

    assert len(segments) >= 4
    assert [part.n_frames for part in parts] == [10] * len(parts)
    assert [letter for part in parts for letter in part.dead_letters] == []


class EndsInIndexError:
    """A container as PyAV 18 reads it where a further stream begins on the way."""

    def __init__(self, container):
        self._container = container

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._container.close()

    def demux(self, stream):
        yield from self._container.demux(stream)
        raise IndexError("list index out of range")

    def __getattr__(self, name):
        return getattr(self._container, name)


def test_ranges_when_a_further_stream_begins_late_then_all_of_them_come(clips, monkeypatch):
    whole = list(cut_file(str(clips["closed"]), 2.0))
    monkeypatch.setattr(file_ranges, "open_media", lambda source: EndsInIndexError(open_media(source)))

    assert list(cut_file(str(clips["closed"]), 2.0)) == whole


def test_ranges_when_going_on_in_the_midst_then_the_same_as_from_the_start(clips):
    whole = list(segments_of(item_of(clips["closed"]), range_s=2.0))

    rest = list(segments_of(item_of(clips["closed"]), range_s=2.0, skip=3))

    assert [(s.meta.seq, s.file) for s in rest] == [(s.meta.seq, s.file) for s in whole[3:]]


def test_file_when_read_from_an_address_then_as_from_the_disk(clips):
    path = clips["open"]
    (found,) = find_videos([f"file://{path}"])
    here, there = (
        sampled([through_a_lane(s) for s in segments_of(item_of(path, uri=uri), 2.0)]) for uri in (str(path), found.uri)
    )

    assert found.uri.startswith("file:///")
    assert here == there


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("hello " * 100), "not_media"),
        (write_sound, "no_video"),
        (lambda path: None, "unreadable"),
    ],
)
def test_video_when_it_cannot_be_read_then_one_empty_last_segment_says_why(make, reason, tmp_path):
    path = tmp_path / "x.mp4"
    path.touch()
    item = item_of(path)
    path.unlink()
    make(path)
    item = item_of(path) if path.exists() else item

    (segment,) = segments_of(item, 2.0)
    decoded = through_a_lane(segment)

    assert (segment.meta.end, decoded.failed) == (True, True)
    assert [letter.reason for letter in segment.dead_letters] == [reason]
    assert decoded.dead_letters == ()


def test_video_when_it_changed_after_it_was_found_then_it_is_not_taken_for_the_other(clips, tmp_path):
    path = write_clip(tmp_path / "x.mp4", 1)
    item = item_of(path)
    write_clip(path, 2)

    (segment,) = segments_of(item, 2.0)

    assert [letter.reason for letter in segment.dead_letters] == ["changed"]


def test_video_when_it_is_replaced_between_two_ranges_then_the_rest_is_not_taken_from_the_other(clips, tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(clips["closed"].read_bytes())
    segments = list(segments_of(item_of(path), 2.0))

    first = through_a_lane(segments[0])
    write_clip(tmp_path / "other.mp4", 12, seed=9).replace(path)
    second = through_a_lane(segments[1])

    assert (first.n_frames, first.dead_letters) == (16, ())
    assert (second.failed, [letter.reason for letter in second.dead_letters]) == (True, ["changed"])
    assert "takes it up as a new version" in second.dead_letters[0].detail


def test_video_when_it_is_overwritten_while_a_range_is_read_then_that_range_is_not_used(clips, tmp_path, monkeypatch):
    path = tmp_path / "x.mp4"
    path.write_bytes(clips["closed"].read_bytes())
    segments = list(segments_of(item_of(path), 2.0))
    real = decode.decode_file

    def overwritten(*args, **kwargs):
        decoded = real(*args, **kwargs)
        path.write_bytes(b"something else")
        return decoded

    monkeypatch.setattr(decode, "decode_file", overwritten)

    assert [letter.reason for letter in through_a_lane(segments[0]).dead_letters] == ["changed"]


def test_video_when_it_breaks_off_then_what_came_before_is_kept_and_the_end_told(clips, tmp_path):
    path = tmp_path / "cut.mp4"
    data = clips["closed"].read_bytes()
    path.write_bytes(data)
    with path.open("r+b") as file:  # what its index names is not there
        moov = data.rindex(b"moov") - 4
        assert moov > len(data) // 2
        file.seek(moov // 2)
        file.write(bytes(moov // 2 - 8))

    parts = [through_a_lane(segment) for segment in segments_of(item_of(path), 2.0)]

    n_frames = [part.n_frames for part in parts]
    assert n_frames[:-1] == [16, 16]
    assert 0 < n_frames[-1] < 16
    assert [[letter.reason for letter in part.dead_letters] for part in parts] == [[], [], ["damaged"]]


def read_all(root, next_offsets=None, partitions=(0,)):
    taken = iter(range(10**6))
    plan = ArchiveSourcePlan(
        ArchivePlan(root, 2.0, follow=False), partitions, next_offsets or {}, 1e9, Pace(lambda: next(taken), 1)
    )
    return list(ArchiveReader(plan).items())


def feed_of(root, *sources, lanes=1, **options):
    told = []
    feed = ArchiveFeed(root, ArchiveOptions([str(s) for s in sources], **options), told.append)
    return feed, feed.partitions(lanes)


def test_reader_when_started_from_each_barrier_then_yields_exactly_the_rest(clips, tmp_path):
    feed_of(tmp_path / "out", clips["closed"].parent)
    whole = read_all(tmp_path / "out")
    segments = whole[1:-1]

    assert (whole[0].KIND, whole[-1].final, whole[-1].positions[0].lag) == (Barrier.KIND, True, 0)
    assert whole[-1].positions[0].next_offset == 3 * RANGES_PER_VIDEO
    for i, segment in enumerate(segments):
        after = segment.meta.offset + 1 if not segment.meta.end else (segment.meta.offset // 10**6 + 1) * 10**6
        rest = read_all(tmp_path / "out", {0: after})[1:-1]
        assert [s.meta.offset for s in rest] == [s.meta.offset for s in segments[i + 1 :]]


def test_feed_when_run_again_then_only_new_and_changed_videos_are_added(tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    for name in ("b.mp4", "deep/a.mp4", "note.txt", ".hidden.mp4"):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).write_text(name)

    feed_of(out, videos)
    feed_of(out, videos)
    (videos / "b.mp4").write_text("another")
    (videos / "c d.mp4").write_text("new")
    feed_of(out, videos)

    items = WorkList(out).read()
    assert [(i.stream_id, i.session, i.number) for i in items] == [
        ("b.mp4", "v1", 0),
        ("deep/a.mp4", "v1", 1),
        ("b.mp4@2", "v2", 2),
        ("c d.mp4", "v1", 3),
    ]


def test_feed_when_told_when_videos_start_then_at_that_moment_or_when_each_file_was_changed(tmp_path):
    """The moment is `stormline archive --start`'s: 0, mtime or a time."""
    changed_ns, told_ns = 1_700_000_000_000_000_000, 1_800_000_000_000_000_000
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, ns in (("a.mp4", changed_ns), ("b.mp4", changed_ns + 10**9)):
        (videos / name).write_text(name)
        os.utime(videos / name, ns=(ns, ns))

    def starts(out, **options):
        feed_of(tmp_path / out, videos, **options)
        start_ns = {i.stream_id: i.start_ns for i in WorkList(tmp_path / out).read()}
        listed = pq.read_table(write_videos(tmp_path / out, outcomes(tmp_path / out))).to_pylist()
        assert {row["stream_id"]: round(row["start_time"].timestamp() * 1e9) for row in listed} == start_ns
        return start_ns

    assert starts("changed", start_ns=None) == {"a.mp4": changed_ns, "b.mp4": changed_ns + 10**9}
    assert starts("told", start_ns=told_ns) == {"a.mp4": told_ns, "b.mp4": told_ns}
    assert starts("0") == {"a.mp4": 0, "b.mp4": 0}


def test_video_when_its_start_is_told_then_its_rows_are_of_that_moment(clips):
    start_ns = 1_700_000_000_000_000_000
    whole, later = (
        [through_a_lane(s) for s in segments_of(item_of(clips["closed"], start_ns=ns), 2.0)] for ns in (0, start_ns)
    )

    assert whole[0].first_ns == 0
    assert [part.first_ns - start_ns for part in later] == [part.first_ns for part in whole]
    assert [part.tail_ns - start_ns for part in later] == [part.tail_ns for part in whole]


def test_feed_when_watching_then_a_file_that_grows_is_taken_once_it_rests(tmp_path):
    videos, out, now_ns = tmp_path / "videos", tmp_path / "out", 10**18
    videos.mkdir()
    growing = videos / "growing.ts"
    feed = ArchiveFeed(out, ArchiveOptions([str(videos)], watch_s=30), lambda text: None, now_ns=lambda: now_ns)

    def look(age_s=0):
        os.utime(growing, ns=(now_ns - age_s * 10**9,) * 2)
        feed.look_again()
        return [(i.stream_id, i.partition, i.n_bytes) for i in WorkList(out).read()]

    (videos / "old.ts").write_bytes(b"old")
    os.utime(videos / "old.ts", ns=(now_ns - 31 * 10**9,) * 2)
    growing.write_bytes(b"1")
    os.utime(growing, ns=(now_ns, now_ns))
    feed.partitions(2)
    assert [i.stream_id for i in WorkList(out).read()] == ["old.ts"]
    for n_bytes in (2, 3, 4):
        growing.write_bytes(bytes(n_bytes))
        now_ns += 30 * 10**9
        assert look() == [("old.ts", 0, 3)]
    done = [("old.ts", 0, 3), ("growing.ts", 0, 4)]
    assert look() == done, "not taken once it rested"
    growing.write_bytes(b"12345")
    assert look() == done
    growing.write_bytes(b"123456")
    assert look(age_s=31) == [*done, ("growing.ts@2", 0, 6)]


def test_feed_when_videos_come_while_watching_then_all_lanes_get_some(tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    feed = ArchiveFeed(out, ArchiveOptions([str(videos)], watch_s=30), lambda text: None, now_ns=lambda: 2 * 10**18)
    feed.partitions(3)

    for name in "abc":
        (videos / f"{name}.mp4").write_text(name)
    feed.look_again()

    assert [i.partition for i in WorkList(out).read()] == [0, 1, 2]


def test_feed_when_by_hash_then_a_copy_and_a_new_date_are_no_new_videos(tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "a.mp4").write_text("same")
    feed_of(out, videos, by_hash=True)
    (videos / "b.mp4").write_text("same")
    os.utime(videos / "a.mp4", ns=(1, 1))

    feed_of(out, videos, by_hash=True)

    assert [i.stream_id for i in WorkList(out).read()] == ["a.mp4"]


def test_feed_when_by_hash_then_each_content_is_read_once_however_often_it_looks(tmp_path, monkeypatch):
    videos, out, read = tmp_path / "videos", tmp_path / "out", []
    videos.mkdir()
    for name, text in (("a.mp4", "same"), ("copy.mp4", "same"), ("other.mp4", "other")):
        (videos / name).write_text(text)
        os.utime(videos / name, ns=(1, 1))
    monkeypatch.setattr(
        "stormline.pipeline.archive.feed.content_hash",
        lambda uri: read.append(os.path.basename(uri)) or content_hash(uri),
    )
    watched = ArchiveFeed(out, ArchiveOptions([str(videos)], by_hash=True, watch_s=30), lambda text: None)

    watched.partitions(1)
    os.utime(videos / "other.mp4", ns=(2, 2))
    for _ in range(3):
        watched.look_again()

    assert sorted(read) == ["a.mp4", "copy.mp4", "other.mp4", "other.mp4"]  # the last one anew, for its other date
    assert [item.stream_id for item in WorkList(out).read()] == ["a.mp4", "other.mp4"]


def test_feed_when_two_folders_have_the_same_name_in_them_then_streams_have_their_own(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mp4").write_text(folder)

    feed, partitions = feed_of(tmp_path / "out", tmp_path / "one", tmp_path / "two", lanes=2)

    items = WorkList(tmp_path / "out").read()
    assert sorted(i.stream_id for i in items) == ["a.mp4", "two/a.mp4"]
    assert partitions == [("archive", 0), ("archive", 1)]
    assert {i.partition for i in items} == {0, 1}
    assert feed.has_work()


def test_feed_when_more_lanes_then_earlier_places_stay(tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "a.mp4").write_text("a")
    feed_of(out, videos)
    (videos / "b.mp4").write_text("b")

    _, partitions = feed_of(out, videos, lanes=3)

    assert len(partitions) == 3
    first = WorkList(out).read()[0]
    assert (first.stream_id, first.partition, first.number) == ("a.mp4", 0, 0)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_sources_when_a_list_then_its_paths_also_those_that_are_not_there(suffix, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a, b.mp4").write_text("x")
    names = ["v/a, b.mp4", "gone.mp4"]
    listed = tmp_path / f"list{suffix}"
    if suffix == ".csv":
        listed.write_text('n,path\n1,"v/a, b.mp4"\n2,gone.mp4\n')
    else:
        pq.write_table(pa.table({"path": names}), listed)

    found = find_videos([str(listed)])

    assert [(v.name, v.n_bytes) for v in found] == [("v/a, b.mp4", 1), ("gone.mp4", -1)]


def test_sources_when_a_list_names_what_no_file_system_has_then_those_lines_are_failed_videos(clips, tmp_path):
    (tmp_path / "a.mp4").write_bytes(clips["closed"].read_bytes())
    names = ["http://cdn.example.org/x.mp4", "nul\0.mp4", "a.mp4"]
    pq.write_table(pa.table({"path": names}), tmp_path / "list.parquet")

    feed_of(tmp_path / "out", tmp_path / "list.parquet")

    items = WorkList(tmp_path / "out").read()
    first = {item.stream_id: next(segments_of(item, 20.0)) for item in items}
    reasons = {name: [letter.reason for letter in segment.dead_letters] for name, segment in first.items()}
    assert reasons == {"cdn.example.org/x.mp4": ["unreadable"], "nul\0.mp4": ["unreadable"], "a.mp4": []}
    assert "Unrecognized filesystem" in first["cdn.example.org/x.mp4"].dead_letters[0].detail


class FeedThatFails(ArchiveFeed):
    """Fails at its first look, for a reason that nobody thought of; keeps how often it looked."""

    n_looks = 0
    looked_again = threading.Event()

    def look_again(self):
        self.n_looks += 1
        if self.n_looks == 1:
            raise RuntimeError("nobody thought of that")
        self.looked_again.set()


def test_watch_when_a_look_fails_unexpectedly_then_it_says_so_and_goes_on_looking(tmp_path, caplog):
    feed = FeedThatFails(tmp_path / "out", ArchiveOptions([str(tmp_path)], watch_s=0.001), lambda text: None)
    watch = feed.watch()

    watch.start()
    looked_again = feed.looked_again.wait(10)
    watch.stop()

    assert looked_again
    assert "nobody thought of that" in caplog.text


def test_sources_when_a_link_below_a_glob_leads_around_in_a_circle_then_each_video_is_found_once(tmp_path):
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    for name in ("a.mp4", "deep/a.mp4", "deep/b.mp4"):
        (tmp_path / "videos" / name).write_text("x")
    (tmp_path / "videos" / "deep" / "up").symlink_to("..")
    (tmp_path / "videos" / "deep" / "other name.mp4").symlink_to("b.mp4")

    found = find_videos([str(tmp_path / "videos" / "**" / "*.mp4")])

    assert [video.name for video in found] == ["a.mp4", "deep/a.mp4", "deep/b.mp4", "deep/other name.mp4"]


def test_sources_when_nothing_is_there_then_refused_with_what_was_expected(tmp_path):
    with pytest.raises(SettingsError, match="is no file, folder, glob"):
        find_videos([str(tmp_path / "nothing" / "*.mp4")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="holds no videos"):
        ArchiveFeed(tmp_path / "out", ArchiveOptions([str(tmp_path / "empty")]), print).has_work()


def test_names_when_no_text_then_escaped(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.mp4", "wb") as file:
        file.write(b"x")

    feed_of(tmp_path / "out", tmp_path)

    (item,) = WorkList(tmp_path / "out").read()
    assert item.stream_id == r"caf\xe9.mp4"
    assert os.path.exists(item.uri)
    (segment,) = segments_of(item, 2.0)
    assert segment.dead_letters[0].detail.encode()


def test_file_when_gone_before_it_is_decoded_then_unreadable_also_where_its_name_is_no_text(tmp_path):
    path = write_clip(tmp_path / os.fsdecode(b"caf\xe9.mp4"), 1)
    (segment,) = segments_of(item_of(path, stream_id="cafe"), 2.0)
    path.unlink()

    decoded = through_a_lane(segment)

    assert decoded.failed
    (letter,) = decoded.dead_letters
    assert (letter.reason, letter.detail) == (
        "unreadable", rf"cannot read {tmp_path}/caf\udce9.mp4: No such file or directory"
    )  # fmt: skip


def test_work_list_when_a_crash_cut_its_last_line_then_that_never_was(tmp_path):
    items = [WorkItem(0, n, f"/v/{n}.mp4", f"{n}.mp4", "v1", 1, 5, 0, 0) for n in range(3)]
    work = WorkList(tmp_path)
    work.append(items[:2])
    with work.path.open("ab") as file:
        file.write(b'{"partition": 0, "numb')

    assert work.read() == items[:2]
    work.append(items[2:])
    assert work.read() == items
    assert [is_done(item, {0: items[1].next_offset}) for item in items] == [True, True, False]


def test_work_list_when_followed_then_only_what_was_added_is_read_and_no_half_line(tmp_path):
    writer, follower = WorkList(tmp_path), WorkList(tmp_path)
    video = tmp_path / "a.mp4"
    video.write_bytes(b"x")
    assert follower.follow() == []
    writer.append([item_of(video)])
    assert follower.follow() == [item_of(video)]

    with writer.path.open("ab") as file:
        file.write(b'{"partition": 0, "num')  # a crash

    assert follower.follow() == []
    writer.append([item_of(video, number=1), item_of(video, number=2)])
    with writer.path.open("r+b") as file:  # what was read is not read again: it could be anything
        file.write(b"#")
    assert [item.number for item in follower.follow()] == [1, 2]
    assert follower.follow() == []


def test_work_list_when_damaged_then_refused(tmp_path):
    work = WorkList(tmp_path)
    work.path.parent.mkdir()
    work.path.write_text(json.dumps({"partition": 0}) + "\n")

    with pytest.raises(CheckpointError, match="is damaged"):
        work.read()


def test_queries_when_questions_are_asked_then_each_has_a_name_and_its_window():
    settings = load_settings(None)

    queries = archive_queries(settings, [("Is it red?", 30.0), ("Is it red?", 86_400.0), ("Why?", None)], 30.0, True)

    assert [(q.id, q.prompt, q.window_s, q.scenes) for q in queries] == [
        ("caption", "Describe what happens.", 30.0, False),
        ("is-it-red", "Is it red?", 30.0, False),
        ("is-it-red-2", "Is it red?", 86_400.0, False),
        ("why", "Why?", None, True),
    ]
    mine = load_settings(None, ["queries=[{id: mine, window_s: 5}]"])
    assert [q.id for q in archive_queries(mine, [], 30.0, True)] == ["mine"]


def test_outcomes_when_a_lane_is_about_to_write_its_first_dead_letters_then_every_video_waits(clips, tmp_path):
    WorkList(tmp_path).append([item_of(clips["closed"])])
    date = tmp_path / "dead_letters" / "date=2026-01-01"
    date.mkdir(parents=True)
    (date / ".lane-000-epoch-00000001.parquet.tmp").write_bytes(b"")

    assert [outcome.state for outcome in outcomes(tmp_path)] == ["waiting"]
