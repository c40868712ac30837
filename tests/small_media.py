"""Small segments, encoded here with FFmpeg."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from fractions import Fraction
from functools import cache

import av
import numpy as np

from stormline.operators.rows import SegmentMeta

START_NS = 1_700_000_000_123_456_789
RATE = Fraction(25)

DEFAULT_OPTIONS = {
    "libx264": {"g": "12", "preset": "veryfast"},
    "libx265": {"x265-params": "log-level=none:pools=1"},
    "ffv1": {"g": "1", "level": "3", "slicecrc": "1"},
}


def picture(i, hw=(48, 64)):
    """A picture that no other i gives: gradients that move, and i in the brightness of a corner."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    image = np.stack([(3 * x + 5 * i) % 256, (4 * y + 3 * i) % 256, (x + y + 7 * i) % 256], -1).astype(np.uint8)
    image[: hw[0] // 4, : hw[1] // 4] = 37 * i % 256
    return image


@cache
def make_video(container="matroska", codec="libx264", n_frames=60, rate=RATE, pixels="yuv420p", options=(), rotation=0):
    """Encode pictures 0, 1, 2… and return the file's bytes; rotated, it is the same stream of pictures."""
    if rotation:  # not encoded anew: one time in fifty x264 makes other bytes of the same pictures
        return rotated(make_video(container, codec, n_frames, rate, pixels, options), container, rotation)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        stream.options = {**DEFAULT_OPTIONS.get(codec, {}), **dict(options)}
        stream.thread_count = 1
        for i in range(n_frames):
            frame = av.VideoFrame.from_ndarray(picture(i), "rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def rotated(data, container, rotation):
    """Return a file's packets in a file that says by how much its pictures are to be turned."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(rotation)
        for packet in source.demux(video=0):
            if packet.dts is not None:  # the last one is empty
                packet.stream = stream
                output.mux(packet)
    return file.getvalue()


def make_image(codec, pixels, i=3):
    context = av.VideoCodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt, context.time_base = 64, 48, pixels, Fraction(1, 25)
    packets = [
        *context.encode(av.VideoFrame.from_ndarray(picture(i), "rgb24").reformat(format=pixels)),
        *context.encode(),
    ]
    return bytes(packets[0])


def make_meta(start_ns=START_NS, **changes):
    meta = SegmentMeta("cam", "a", 0, start_ns, START_NS, "", False, 0, "t", 0, 7, 0, 0)
    return replace(meta, **changes)


def png_of(width, height):
    """A small PNG that claims a size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def make_video_with_times(times_ms):
    file = io.BytesIO()
    with av.open(file, "w", format="nut") as output:
        stream = output.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for i, _ in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(picture(i), "rgb24")
            frame.pts, frame.time_base = i * 40, Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        for packet, ms in zip(packets, times_ms, strict=True):
            packet.pts = packet.dts = ms
            packet.time_base = Fraction(1, 1000)
            output.mux(packet)
    return file.getvalue()
