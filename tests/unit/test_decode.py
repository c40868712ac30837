"""Decoding real media, made here with FFmpeg, and the proof that cutting does not change what is sampled."""

import io
import pickle
import random
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from small_media import START_NS, make_image, make_meta, make_video, make_video_with_times, picture, png_of

from stormline.operators.decode import REASONS, Decode, DecodeLimits, decode_file, decode_segment
from stormline.operators.errors import MediaError
from stormline.operators.media import CONTAINERS, open_media
from stormline.operators.rows import Barrier, DeadLetter, DecodedSegment, FileRange, Segment, block_of, rows_of
from stormline.operators.sampling import NS_PER_MS, NS_PER_S, GridSpec, SamplerState, round_half_away, step_sampler

HW = (32, 40)
GRID = GridSpec(Fraction(7, 2))
RATES = [Fraction(25), Fraction(30000, 1001), Fraction(24000, 1001)]


def decode(data, meta=None, grid=GRID, **changes):
    return decode_segment(data, meta or make_meta(), grid=grid, frame_hw=HW, **changes)


def groups_of_pictures(data):
    """Return a file's packets as a list of GOPs, and [pts of each keyframe]."""
    with open_media(data) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    gops = []
    for packet in packets:
        if packet.is_keyframe:
            gops.append([])
        gops[-1].append(packet)
    return gops, [gop[0].pts for gop in gops]


def publish(data, sizes, container="matroska"):
    """Cut a file into segments of so many GOPs each, timestamps counted from the session's start.

    Returns [(bytes, start_ns)]. In Matroska start_ns is rounded as its timestamps are, elsewhere it is not.
    """
    gops, _ = groups_of_pictures(data)
    origin = min(p.pts for p in gops[0])
    segments = []
    with open_media(data) as template:
        for size in sizes:
            packets, gops = [p for gop in gops[:size] for p in gop], gops[size:]
            if not packets:
                break
            first = min(p.pts for p in packets) - origin
            tb = packets[0].time_base
            scale = NS_PER_MS if container == "matroska" else 1
            elapsed_ns = round_half_away(first * tb.numerator * NS_PER_S, tb.denominator * scale) * scale
            file = io.BytesIO()
            with av.open(file, "w", format=container) as output:
                stream = output.add_stream_from_template(template.streams.video[0])
                for packet in packets:
                    copy = av.Packet(bytes(packet))
                    copy.pts, copy.dts, copy.time_base = packet.pts - origin, packet.dts - origin, tb
                    copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                    output.mux(copy)
            segments.append((file.getvalue(), START_NS + elapsed_ns))
    assert not gops
    return segments


def sample(decoded_segments, grid=GRID):
    """Run segments through the sampler; return [(grid index, bytes of the frame)]."""
    state, pairs = SamplerState("a"), []
    for decoded in decoded_segments:
        assert decoded.dead_letters == ()
        sampled = step_sampler(state, decoded, grid)
        state = sampled.state
        pairs += [(int(g), f.tobytes()) for g, f in zip(sampled.grid_indices, sampled.frames, strict=True)]
    return pairs


def ways_to_cut(n_gops):
    rng = random.Random(0)
    return {
        "whole": [n_gops],
        "every keyframe": [1] * n_gops,
        "in two": [n_gops // 2, n_gops],
        "first alone": [1, n_gops],
        "last alone": [n_gops - 1, 1],
        "threes": [3] * n_gops,
        "uneven": [rng.choice([1, 2, 4, 7]) for _ in range(n_gops)],
    }


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize("codec", ["libx264", "ffv1", "mjpeg"])  # the last two: one frame per segment is possible
def test_sampling_when_cut_anywhere_then_equals_the_file_read_directly(codec, rate):
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    container = "nut" if codec == "ffv1" else "mp4"  # both keep the exact time base, 1/rate or finer
    data = make_video(container, codec, rate=rate, pixels=pixels)
    grid = GridSpec(Fraction(30000, 1001)) if rate == RATES[1] else GRID  # on 29.97 fps every frame is on the grid
    expected = sample([decode(data, grid=grid)], grid)
    assert len(expected) >= 8
    assert len({frame for _, frame in expected}) >= 8

    for way, sizes in ways_to_cut(len(groups_of_pictures(data)[0])).items():
        segments = publish(data, sizes)
        pairs = sample([decode(d, make_meta(start_ns), grid) for d, start_ns in segments], grid)

        assert pairs == expected, way


@pytest.mark.parametrize("rate", RATES[1:], ids=str)
def test_sampling_when_cut_into_mpeg_ts_with_exact_start_times_then_equals_the_file_read_directly(rate):
    data = make_video("mp4", rate=rate)
    expected = sample([decode(data)])

    segments = publish(data, [2, 3, 9], container="mpegts")

    assert sample([decode(d, make_meta(start_ns)) for d, start_ns in segments]) == expected


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_decode_file_when_read_in_parts_then_equals_the_whole_and_the_published(rate, tmp_path):
    data = make_video("mp4", rate=rate)
    path = tmp_path / "a video.mp4"
    path.write_bytes(data)
    keys = groups_of_pictures(data)[1]
    bounds = [None, keys[1], keys[3], keys[4], None]

    parts = [
        decode_file(path, make_meta(), grid=GRID, frame_hw=HW, pts_range=part, origin_pts=keys[0])
        for part in pairwise(bounds)
    ]

    assert sum(part.n_frames for part in parts) == 60
    assert sample(parts) == sample([decode(data)])


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_decode_segment_when_sampling_then_equals_the_definition(rate):
    data = make_video("mp4", rate=rate)
    every_ms = decode(data, grid=GridSpec(Fraction(1000)))  # each frame is on this grid
    of_ms = dict(zip(every_ms.grid_indices.tolist(), every_ms.frames, strict=False))
    times_ms = [round_half_away(1000 * i * rate.denominator, rate.numerator) for i in range(60)]

    decoded = decode(data)

    assert decoded.n_frames == 60
    assert (decoded.first_ns, decoded.tail_ns) == (START_NS, START_NS + times_ms[-1] * NS_PER_MS)
    last = [max(ms for ms in times_ms if ms <= Fraction(1000 * g) / GRID.fps) for g in decoded.grid_indices.tolist()]
    assert decoded.grid_indices.tolist() == list(range(len(last)))
    np.testing.assert_array_equal(decoded.frames[:-1], np.stack([of_ms[ms] for ms in last]))
    np.testing.assert_array_equal(decoded.frames[-1], of_ms[times_ms[-1]])


@pytest.mark.parametrize(
    ("container", "codec", "pixels"),
    [
        ("matroska", "libx264", "yuv420p"),
        ("mpegts", "libx264", "yuv420p"),
        ("flv", "libx264", "yuv420p"),
        ("mp4", "libx265", "yuv420p10le"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("webm", "libvpx", "yuv420p"),
        ("avi", "mpeg4", "yuv420p"),
        ("matroska", "ffv1", "bgra"),
        ("h264", "libx264", "yuv420p"),  # without timestamps: 25 fps
        ("mjpeg", "mjpeg", "yuvj420p"),  # likewise
    ],
)
def test_decode_segment_when_any_container_and_codec_then_gives_the_pictures(container, codec, pixels):
    data = make_video(container, codec, n_frames=26, pixels=pixels)

    meta = make_meta(content_type="video/any")
    decoded = decode_segment(data, meta, grid=GridSpec(Fraction(5)), frame_hw=(48, 64))

    assert decoded.n_frames == 26
    assert decoded.grid_indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert decoded.tail_ns - decoded.first_ns == NS_PER_S
    assert decoded.dead_letters == ()
    for i, frame in zip([0, 5, 10, 15, 20, 25], decoded.frames, strict=False):
        corner, expected = frame[2:9, 2:12].mean(), 37 * i % 256
        assert corner == pytest.approx(expected, abs=12)


@pytest.mark.parametrize(("codec", "pixels"), [("mjpeg", "yuvj420p"), ("png", "rgb24")])
def test_decode_segment_when_an_image_then_is_one_frame_at_its_start(codec, pixels):
    meta = make_meta(START_NS + 2 * NS_PER_S)

    decoded = decode_segment(make_image(codec, pixels), meta, grid=GRID, frame_hw=(48, 64))

    assert (decoded.n_frames, decoded.first_ns, decoded.tail_ns) == (1, meta.start_ns, meta.start_ns)
    assert decoded.grid_indices.tolist() == [7]
    assert decoded.frames.shape == (2, 48, 64, 3)
    assert np.abs(decoded.frames[1].astype(int) - picture(3)).mean() < (1 if codec == "png" else 30)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_decode_segment_when_the_video_is_rotated_then_frames_are_upright(rotation):
    options = (("crf", "4"), ("g", "12"))
    plain = decode_segment(make_video("mp4", options=options), make_meta(), grid=GRID, frame_hw=(48, 64))
    hw = (48, 64) if rotation == 180 else (64, 48)

    data = make_video("mp4", options=options, rotation=rotation)
    turned = decode_segment(data, make_meta(), grid=GRID, frame_hw=hw)

    np.testing.assert_array_equal(turned.frames, np.rot90(plain.frames, rotation // 90, axes=(1, 2)))


def test_decode_segment_when_a_frame_stands_long_then_is_held_no_longer_than_allowed():
    data = make_video(rate=Fraction(1, 4), n_frames=3)  # a frame every four seconds

    decoded = decode(data, grid=GridSpec(Fraction(1), max_hold_ns=2 * NS_PER_S))

    assert decoded.grid_indices.tolist() == [0, 1, 2, 4, 5, 6, 8]


def make_audio():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        output.mux([*stream.encode(frame), *stream.encode()])
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "reason", "says"),
    [
        (lambda: b"", "empty", "expected media, or the header `end`"),
        (lambda: b"hello world" * 100, "not_media", "1100 bytes are no media"),
        (lambda: make_video("mp4")[:4000], "not_media", "moov atom not found"),
        (make_audio, "no_video", "its streams: audio"),
        (lambda: make_image("mjpeg", "yuvj420p")[:40], "no_frames", "damaged mjpeg image"),
        (lambda: png_of(30_000, 30_000), "too_large", "Picture size 30000x30000"),
        (lambda: make_video(n_frames=3)[:700], "no_frames", "matroska,webm/h264 gave no frame"),
    ],
)
def test_decode_segment_when_nothing_can_be_used_then_says_why(make, reason, says):
    with pytest.raises(MediaError) as error:
        decode(make())

    assert error.value.reason in REASONS
    assert error.value.reason == reason
    assert says in str(error.value)


def test_decode_segment_when_frames_are_over_the_limit_then_refuses_before_decoding():
    with pytest.raises(MediaError, match="64x48, 3072 pixels; at most 3000") as error:
        decode(make_video(), limits=DecodeLimits(max_frame_px=3000))

    assert error.value.reason == "too_large"


def test_open_media_when_a_record_lists_local_files_then_does_not_open_them(tmp_path, monkeypatch):
    (tmp_path / "secret.mkv").write_bytes(make_video())
    monkeypatch.chdir(tmp_path)
    record = b"ffconcat version 1.0\nfile secret.mkv\n"
    with av.open(io.BytesIO(record)) as container:  # PyAV as it is lets it through
        assert next(container.decode(video=0)) is not None

    with pytest.raises(MediaError) as error:
        open_media(record)

    assert error.value.reason == "not_media"


def test_containers_when_listed_then_ffmpeg_knows_each():
    assert [name for name in CONTAINERS if name not in known_containers()] == []


def known_containers():
    names = set()
    for name in av.formats_available:
        names.update(name.split(","))
    return names


def test_decode_segment_when_matroska_is_cut_short_then_keeps_the_good_frames_and_says_so():
    data = make_video(n_frames=60)

    decoded = decode(data[: len(data) // 2])
    again = decode(data[: len(data) // 2])

    assert 20 < decoded.n_frames < 60
    np.testing.assert_array_equal(decoded.frames[:-1], decode(data).frames[: len(decoded.frames) - 1])
    for letters in (decoded.dead_letters, again.dead_letters):
        assert [d.reason for d in letters] == ["damaged"]
        assert f"kept {decoded.n_frames} frames" in letters[0].detail
        assert "ended prematurely" in letters[0].detail


def test_decode_segment_when_a_frame_is_broken_then_the_others_keep_their_times():
    data = make_video(n_frames=20, options=(("g", "1"),))
    gops, _ = groups_of_pictures(data)
    broken = bytearray(data)
    for i in (0, 10):  # the first frame too: the others must not move to its time
        packet = bytes(gops[i][0])
        end = data.find(packet) + len(packet)  # the first packet starts with x264's advertisement
        broken[end - 60 : end - 10] = bytes(50)
    per_frame = GridSpec(Fraction(25))

    decoded, whole = decode(bytes(broken), grid=per_frame), decode(data, grid=per_frame)

    assert decoded.n_frames == 18
    assert decoded.first_ns == START_NS + 40 * NS_PER_MS
    assert decoded.grid_indices.tolist() == list(range(1, 20))
    held = [9 if i == 10 else i for i in range(1, 20)]
    np.testing.assert_array_equal(decoded.frames[:-1], whole.frames[held])
    assert [d.reason for d in decoded.dead_letters] == ["damaged"]
    assert decoded.dead_letters[0].detail.startswith("kept 18 frames; of the others 2 c")


def test_decode_segment_when_cut_in_an_open_gop_then_drops_the_leading_frames_and_counts_them():
    options = (("x265-params", "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0:log-level=none:pools=1"),)
    data = make_video("mp4", "libx265", options=options)
    gops, keys = groups_of_pictures(data)
    n_leading = sum(p.pts < keys[1] for p in gops[1])
    assert n_leading > 0
    assert decode(data).n_frames == 60

    (_, _), (second, _) = publish(data, [1, 9])
    decoded = decode(second, make_meta(START_NS + 480 * NS_PER_MS))

    assert decoded.n_frames == sum(map(len, gops[1:])) - n_leading
    assert [d.detail for d in decoded.dead_letters] == [
        f"kept {decoded.n_frames} frames; of the others {n_leading} could not be decoded"
    ]


def test_decode_segment_when_a_timestamp_leaps_then_that_frame_alone_is_lost():
    data = make_video_with_times([0, 40, 80, 120, 7_200_000])

    decoded = decode(data)

    assert decoded.n_frames == 4
    assert decoded.tail_ns == START_NS + 120 * NS_PER_MS
    assert "1 have a timestamp that falls back or leaps ahead" in decoded.dead_letters[0].detail


def test_decode_segment_when_longer_than_the_limit_then_keeps_the_start_and_says_so():
    few = decode(make_video(), limits=DecodeLimits(max_frames=30))
    small = decode(make_video(), limits=DecodeLimits(max_sampled_bytes=3 * HW[0] * HW[1] * 3))

    assert few.n_frames == 30
    assert len(small.grid_indices) == 3
    assert [d.reason for d in (*few.dead_letters, *small.dead_letters)] == ["too_long", "too_long"]


def whole_file(path):
    stat = path.stat()
    return FileRange(str(path), None, None, None, None, stat.st_size, stat.st_mtime_ns)


def test_decode_step_when_a_file_cannot_be_cut_then_a_records_limits_do_not_end_it(tmp_path):
    path = tmp_path / "long.mkv"
    path.write_bytes(make_video(options=(("g", "1000"),)))
    step = make_step(limits=DecodeLimits(max_frames=30, max_span_ns=NS_PER_S))
    segment = Segment(make_meta(), b"", (), whole_file(path))

    decoded = step.decode(segment)

    assert (decoded.n_frames, decoded.tail_ns) == (60, START_NS + 59 * 40 * NS_PER_MS)
    assert decoded.dead_letters == ()


def test_decode_step_when_a_timestamp_in_a_file_leaps_then_that_frame_alone_is_lost(tmp_path):
    path = tmp_path / "wild.nut"
    path.write_bytes(make_video_with_times([0, 40, 80, 120, 7_200_000]))

    decoded = make_step().decode(Segment(make_meta(), b"", (), whole_file(path)))

    assert (decoded.n_frames, decoded.tail_ns) == (4, START_NS + 120 * NS_PER_MS)


def make_step(**changes):
    return Decode(fps="7/2", frame_hw=HW, **changes)


def test_decode_step_when_called_then_keeps_order_sequence_numbers_and_barriers():
    step = pickle.loads(pickle.dumps(make_step()))  # as Ray ships it
    barrier = Barrier((), 5).with_snapshots("x", {("t", 0): b"state"}).to_row(11)
    earlier = DeadLetter.of(make_meta(), "gap", "seq 0 is missing")
    good = Segment(make_meta(), make_video(), (earlier,)).to_row(10)
    bad = Segment(make_meta(seq=1), b"hello world" * 100, (earlier,)).to_row(12)

    rows = rows_of(step(block_of([good, barrier, bad])))

    assert [(r.kind, r.lane_seq) for r in rows] == [("frames", 10), ("barrier", 11), ("frames", 12)]
    assert rows[1] == barrier
    decoded = DecodedSegment.from_row(rows[0])
    np.testing.assert_array_equal(decoded.frames, decode(make_video()).frames)
    assert [d.reason for d in decoded.dead_letters] == ["gap"]
    failed = DecodedSegment.from_row(rows[2])
    assert failed.failed
    assert failed.frames.shape == (0, *HW, 3)
    assert [d.reason for d in failed.dead_letters] == ["gap", "not_media"]


@pytest.mark.parametrize(("limit", "kept"), [(0, b""), (5, b"hello"), (100, b"hello world")])
def test_decode_step_when_a_record_cannot_be_used_then_its_dead_letter_keeps_its_bytes_up_to_the_limit(limit, kept):
    table = block_of([Segment(make_meta(n_bytes=11), b"hello world").to_row(0)])

    letter = DecodedSegment.from_row(rows_of(make_step(dead_letter_bytes=limit)(table))[0]).dead_letters[0]

    assert (letter.reason, bytes(letter.data), letter.n_bytes, letter.offset) == ("not_media", kept, 11, 7)


def test_decode_step_when_an_empty_record_ends_the_session_then_is_no_dead_letter():
    table = block_of([Segment(make_meta(end=True), b"").to_row(0)])

    decoded = DecodedSegment.from_row(rows_of(make_step()(table))[0])

    assert decoded.failed
    assert decoded.meta.end
    assert decoded.dead_letters == ()


def test_decode_step_when_the_block_is_empty_then_so_is_the_answer():
    empty = block_of([])

    assert make_step()(empty).num_rows == 0


def test_decode_step_when_a_row_of_a_later_edge_comes_then_refuses():
    step = make_step()
    table = step(block_of([Segment(make_meta(), make_video()).to_row(3)]))

    with pytest.raises(ValueError, match="kind 'frames' at lane_seq=3"):
        step(table)


def test_decode_step_when_media_is_broken_then_prints_nothing(capfd):
    step = make_step()
    broken = bytearray(make_video("mp4"))
    broken[-3000:-1000] = bytes(2000)
    for data in (bytes(broken), make_video()[:3000], b"junk"):
        step(block_of([Segment(make_meta(), data).to_row(0)]))

    assert capfd.readouterr() == ("", "")
