"""Small pictures of streams: how they look, how large they are, and how often they are made."""

from fractions import Fraction

import av
import numpy as np
import pytest

from stormline.operators.decode import Decode
from stormline.operators.media import decode_image
from stormline.operators.pictures import PicturePace, make_jpeg
from stormline.operators.rows import DecodedSegment, Segment, SegmentMeta


def make_frame(width, height, pixel_format="yuv420p"):
    """A frame whose upper left quarter is white, the rest black."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = 255
    return av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pixel_format)


def look(jpeg):
    return decode_image(jpeg, "mjpeg").to_ndarray(format="gray")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1920, 1080), (320, 180)),
        ((1080, 1920), (180, 320)),
        ((128, 96), (128, 96)),
        ((640, 10), (320, 4)),
        ((9, 7), (8, 8)),
    ],
)
def test_jpeg_when_made_then_small_and_with_the_aspect_kept(size, expected):
    image = look(make_jpeg(make_frame(*size)))

    assert image.shape[::-1] == expected


def test_jpeg_when_made_then_shows_the_frame_in_few_bytes():
    jpeg = make_jpeg(make_frame(1920, 1080))

    image = look(jpeg)
    assert image[:80, :150].mean() > 240
    assert image[100:, 170:].mean() < 15
    assert len(jpeg) < 16_000


@pytest.mark.parametrize("pixel_format", ["rgb24", "gray", "yuv422p10le", "nv12", "pal8"])
def test_jpeg_when_of_another_pixel_format_then_made(pixel_format):
    image = look(make_jpeg(make_frame(200, 100, pixel_format if pixel_format != "pal8" else "rgb8")))

    assert image[10, 10] > 230
    assert image[90, 190] < 25


def test_jpeg_when_the_video_is_rotated_then_upright():
    turned = look(make_jpeg(make_frame(640, 360), (True, False, True)))  # a quarter to the right

    assert turned.shape == (320, 180)
    assert turned[:150, 100:].mean() > 230  # what was above on the left is above on the right
    assert turned[170:, :80].mean() < 25


def test_pace_when_asked_then_one_a_stream_and_interval():
    now_s = 0.0
    pace = PicturePace(2.0, lambda: now_s)

    assert [pace.due("a"), pace.due("a"), pace.due("b")] == [True, False, True]
    now_s = 1.9
    assert not pace.due("a")
    now_s = 2.0
    assert [pace.due("a"), pace.due("a")] == [True, False]
    assert not PicturePace(0.0, lambda: now_s).due("a")


def test_decode_when_a_picture_is_due_then_it_comes_with_the_segment_and_changes_nothing_else():
    data = make_jpeg(make_frame(256, 192))
    meta = SegmentMeta("cam", "s", 0, 10**9, 10**9, "", False, 0, "video", 0, 0, 0, len(data))
    segment = Segment(meta, data)
    plain, pictured = (
        Decode(fps=Fraction(2), frame_hw=(64, 64), picture_interval_s=interval_s) for interval_s in (0.0, 60.0)
    )

    without, first, second = plain.decode(segment), pictured.decode(segment), pictured.decode(segment)

    assert (bytes(without.jpeg), bytes(second.jpeg)) == (b"", b"")
    read = DecodedSegment.from_row(first.to_row(0))
    assert look(bytes(read.jpeg)).shape == (192, 256)
    assert read.frames.tobytes() == without.frames.tobytes()
