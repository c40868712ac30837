"""Media that is damaged, mislabelled, hostile or odd: what can be used is used, of the rest a dead letter says why."""

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from small_media import START_NS, make_image, make_meta, make_video, make_video_with_times, picture, png_of

from stormline.operators.decode import REASONS, DecodeLimits, decode_segment
from stormline.operators.decode_apart import DecodeProcess
from stormline.operators.errors import MediaError
from stormline.operators.rows import DecodedSegment, Segment, block_of, rows_of
from stormline.operators.sampling import NS_PER_MS, NS_PER_S, GridSpec, SamplerState, step_sampler

HW = (32, 40)
GRID = GridSpec(Fraction(5))
EMPTY_MOOV = {"movflags": "empty_moov+frag_keyframe"}  # what begins a fragmented MP4
FOUND = Path(__file__).parent / "found_by_fuzzing"


def decode(data, meta=None, grid=GRID, frame_hw=HW, **changes):
    return decode_segment(data, meta or make_meta(), grid=grid, frame_hw=frame_hw, **changes)


def reasons(decoded):
    return [letter.reason for letter in decoded.dead_letters]


def refusal(data, **changes):
    """Return why nothing of a segment can be used."""
    with pytest.raises(MediaError) as error:
        decode(data, **changes)
    assert error.value.reason in REASONS
    return error.value


def patched(data, old, new):
    assert data.count(old) == 1, data.count(old)
    return data.replace(old, new)


def make_gradients(codec="libx264", container="matroska", hw=(48, 64), rate=25, first=0, n_frames=20, options=None):
    """Encode pictures first, first + 1… of any size."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *hw, "yuv420p"
        stream.options = {"g": "10", "bf": "0"}
        output.start_encoding()
        for i in range(first, first + n_frames):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i, hw), "rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


# What a segment says it is


@pytest.mark.parametrize("content_type", ["", "video/mp4", "image/jpeg", "text/plain; charset=utf-8", "\x00" * 300])
def test_decode_when_the_content_type_is_wrong_then_the_bytes_decide(content_type):
    video, image = make_video(), make_image("mjpeg", "yuvj420p")

    as_said = decode(video, make_meta(content_type=content_type))
    still = decode(image, make_meta(content_type=content_type))

    assert (as_said.n_frames, reasons(as_said)) == (60, [])
    np.testing.assert_array_equal(as_said.frames, decode(video).frames)
    assert (still.n_frames, reasons(still)) == (1, [])


def test_decode_when_the_codec_is_unknown_then_says_so_and_other_streams_are_used():
    unknown = patched(make_video(), b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ")

    error = refusal(unknown)

    assert error.reason == "no_decoder"
    assert "cannot decode" in str(error)


@pytest.mark.parametrize("container", ["mp4", "flv"])
def test_decode_when_there_are_headers_and_no_frames_then_says_so(container):
    error = refusal(make_gradients(container=container, n_frames=0, options=EMPTY_MOOV if container == "mp4" else None))

    assert error.reason == "no_frames"
    assert "gave no frame of 0 packets" in str(error)


# Absurd sizes


def make_jpeg_of(height, width):
    """Return a small JPEG whose header claims a size."""
    data = make_image("mjpeg", "yuvj420p")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def make_gif_of(height, width):
    data = make_video("gif", "gif", n_frames=3, pixels="rgb8")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


@pytest.mark.parametrize(
    "make",
    [
        lambda: png_of(50_000, 50_000),
        lambda: make_jpeg_of(65_500, 65_500),
        lambda: make_gif_of(65_535, 65_535),
        lambda: patched(make_video(), b"\xb0\x81\x40\xba\x81\x30", b"\xb0\x82\xff\xff\xba\x82\xff\xff"),
    ],
    ids=["png", "jpeg", "gif", "matroska"],
)
def test_decode_when_a_small_file_claims_an_absurd_size_then_refused(make):
    data = make()

    assert len(data) < 50_000
    assert refusal(data).reason in ("too_large", "not_media", "no_frames")


def test_decode_when_an_image_is_large_but_allowed_then_used_and_a_video_of_that_size_is_not():
    limits = DecodeLimits(max_frame_px=64 * 48 - 1, max_image_px=64 * 48)

    assert decode(make_image("png", "rgb24"), limits=limits).n_frames == 1
    assert refusal(make_video(), limits=limits).reason == "too_large"


# Timestamps


def make_ts(start_s, first):
    """Encode twenty pictures, 0.8 s, whose timestamps begin at `start_s`."""
    return make_gradients(container="mpegts", first=first, options={"output_ts_offset": str(start_s)})


@pytest.mark.parametrize(
    ("starts_s", "kept_s", "n_lost"),
    [
        ([0, 0.4], 1.16, 9),  # jumps back: so many fall into what has been
        ([0, 7200, 0.8], 1.56, 20),  # far ahead, and back
        ([0, 0.8, 1800], 1800.76, 0),  # ahead, but not absurdly
        ([50_000, 50_000.8], 1.56, 0),  # begins anywhere
    ],
)
def test_decode_when_timestamps_jump_then_the_others_keep_their_times(starts_s, kept_s, n_lost):
    data = b"".join(make_ts(start_s, 20 * i) for i, start_s in enumerate(starts_s))

    decoded = decode(data, grid=GridSpec(Fraction(25)))

    assert decoded.n_frames == 20 * len(starts_s) - n_lost
    assert (decoded.tail_ns - decoded.first_ns) / NS_PER_S == kept_s
    lost = [d.detail for d in decoded.dead_letters if "falls back or leaps ahead" in d.detail]
    assert [f"{n_lost} have a timestamp" in detail for detail in lost] == [True] * bool(n_lost)


def test_decode_when_the_container_has_no_timestamps_and_frames_are_reordered_then_none_is_lost():
    data = make_video("avi", options=(("bf", "2"), ("g", "12")))

    decoded = decode(data, frame_hw=(48, 64))

    assert (decoded.n_frames, reasons(decoded)) == (60, [])
    assert decoded.frames[-1][2:9, 2:12].mean() == pytest.approx(37 * 59 % 256, abs=14)


# Streams that change


def test_session_when_size_rate_and_codec_change_between_segments_then_the_grid_goes_on():
    segments = [
        make_gradients(),
        make_gradients(hw=(96, 64)),
        make_gradients("mpeg4", "avi", hw=(32, 32), rate=10, n_frames=8),
        make_image("png", "rgba"),
        make_gradients("libvpx-vp9", "webm", hw=(64, 128), rate=50, n_frames=40),
    ]
    state, indices = SamplerState("a"), []

    for seq, data in enumerate(segments):
        decoded = decode(data, make_meta(START_NS + seq * 800 * NS_PER_MS, seq=seq))
        sampled = step_sampler(state, decoded, GRID)
        state = sampled.state
        indices += sampled.grid_indices.tolist()
        assert reasons(decoded) == []
        assert sampled.frames.shape[1:] == (*HW, 3)

    assert indices == list(range(len(indices)))
    assert state.tail_ns == START_NS + 3200 * NS_PER_MS + 39 * NS_PER_S // 50


@pytest.mark.parametrize("container", ["h264", "mpegts"])
def test_decode_when_the_size_changes_inside_a_segment_then_every_frame_is_used(container):
    data = make_gradients(container=container) + make_gradients(container=container, hw=(96, 32), first=20)

    decoded = decode(data, grid=GridSpec(Fraction(25)))

    # In MPEG-TS the second part begins at the first one's time again: what falls back is dropped, and counted.
    assert decoded.n_frames + (0 if container == "h264" else 20 - 1) >= 39
    assert decoded.frames.shape[1:] == (*HW, 3)


def test_decode_when_the_codec_changes_inside_a_segment_then_the_first_part_is_used_and_the_rest_told():
    data = make_gradients(container="mpegts") + make_gradients("mpeg2video", container="mpegts", first=20)

    decoded = decode(data)

    assert decoded.n_frames >= 20
    assert reasons(decoded) == ["damaged"]


def test_decode_when_the_frame_rate_changes_inside_a_segment_then_times_are_followed():
    times_ms = [*range(0, 400, 40), *range(400, 2400, 200)]

    decoded = decode(make_video_with_times(times_ms), grid=GridSpec(Fraction(5)))

    assert decoded.grid_indices.tolist() == list(range(12))
    assert (decoded.n_frames, reasons(decoded)) == (20, [])


def test_decode_when_another_stream_begins_in_the_middle_then_the_first_is_used():
    error_free = decode((FOUND / "stream-begins-later.ts").read_bytes())

    assert error_free.n_frames > 0
    assert set(reasons(error_free)) <= {"damaged"}


# Unusual, but sound


@pytest.mark.parametrize("codec", ["mpeg2video", "libx264"])
def test_decode_when_interlaced_then_every_frame_is_used(codec):
    data = make_video("mpegts", codec, n_frames=26, options=(("flags", "+ildct+ilme"), ("bf", "0")))

    decoded = decode(data)

    assert (decoded.n_frames, reasons(decoded)) == (26, [])


@pytest.mark.parametrize(
    ("container", "codec", "pixels"),
    [
        ("mov", "prores_ks", "yuva444p10le"),
        ("mov", "qtrle", "argb"),
        ("apng", "apng", "rgba"),
        ("mov", "png", "rgba64be"),
    ],
)
def test_decode_when_with_alpha_or_many_bits_then_the_pictures_are_right(container, codec, pixels):
    decoded = decode(make_video(container, codec, n_frames=26, pixels=pixels), frame_hw=(48, 64))

    assert (decoded.n_frames, reasons(decoded)) == (26, [])
    for i, frame in zip(range(0, 26, 5), decoded.frames, strict=False):
        assert frame[2:9, 2:12].mean() == pytest.approx(37 * i % 256, abs=12)


def with_exif(jpeg, orientation):
    """Return a JPEG with the EXIF data that a phone writes."""
    entry = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)
    tiff = b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda image: image),
        (2, np.fliplr),
        (3, lambda image: np.rot90(image, 2)),
        (4, np.flipud),
        (6, lambda image: np.rot90(image, -1)),
        (8, lambda image: np.rot90(image, 1)),
    ],
)
def test_decode_when_an_image_has_exif_data_then_is_used_and_upright(orientation, upright):
    plain = make_image("mjpeg", "yuvj420p")
    expected = upright(decode(plain, frame_hw=(48, 64)).frames[0])

    decoded = decode(with_exif(plain, orientation), frame_hw=expected.shape[:2], with_picture=True)

    np.testing.assert_array_equal(decoded.frames[0], expected)
    assert decoded.jpeg[:2] == b"\xff\xd8"


# What fuzzing found (tests/fuzz): each was the slowest, the largest or wrong once


def test_decode_when_fuzzing_found_it_then_is_used_or_refused_for_its_reason():
    process = DecodeProcess({"fps": "5", "frame_hw": HW, "limits": vars(DecodeLimits()), "memory_bytes": 512 << 20}, 60)
    block = block_of(
        [Segment(make_meta(), path.read_bytes()).to_row(i) for i, path in enumerate(sorted(FOUND.iterdir()))]
    )

    decoded = [DecodedSegment.from_row(row) for row in rows_of(process(block))]
    process.close()

    names = sorted(path.name for path in FOUND.iterdir())
    assert {name: (d.failed, reasons(d)) for name, d in zip(names, decoded, strict=True)} == {
        "codec-unknown.mkv": (True, ["no_decoder"]),  # PyAV then had no width to ask for
        "codec-unknown.mp4": (True, ["no_decoder"]),
        "colours-reserved.mov": (False, ["damaged"]),  # swscale refuses what it does not know
        "colours-reserved.mpg": (False, ["damaged"]),
        "large-frame.flv": (False, ["damaged"]),
        "large-frame.m4v": (False, ["damaged"]),
        "large-image.png": (True, ["no_frames"]),
        "many-samples.mp4": (True, ["not_media"]),
        "ninety-million-samples.mp4": (True, ["not_media"]),  # took 2.4 GB and ten seconds
        "stream-begins-later.flv": (False, ["damaged"]),
        "stream-begins-later.ts": (False, ["damaged"]),  # PyAV's list of streams is that of the beginning
    }
