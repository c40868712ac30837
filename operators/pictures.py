"""Small pictures of streams, for people: a JPEG of a frame as it was filmed, where the model's own input is tiny."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

WIDTH_PX = 320  # at most; of an upright frame
HEIGHT_PX = 320
JPEG_QUANTISER = 5  # 2 is best, 31 worst; at 5 a picture has 5 to 15 kB
STREAMS_REMEMBERED = 10_000


class PicturePace:
    """Says of which segments to make a picture: of each stream one every so often, by this process's clock.

    Args:
        interval_s: 0 for none at all.
        clock_s: Any clock that only goes forward.
    """

    def __init__(self, interval_s: float, clock_s: Callable[[], float] = time.monotonic):
        self._interval_s = interval_s
        self._clock_s = clock_s
        self._made_s: dict[str, float] = {}

    def due(self, stream_id: str) -> bool:
        """Tell whether it is time for one of this stream; if so, the next one is due an interval later."""
        if not self._interval_s:
            return False
        now_s = self._clock_s()
        if now_s - self._made_s.get(stream_id, -self._interval_s) < self._interval_s:
            return False
        if len(self._made_s) >= STREAMS_REMEMBERED:
            self._made_s.clear()
        self._made_s[stream_id] = now_s
        return True


def make_jpeg(frame: VideoFrame, orientation: tuple[bool, bool, bool] = (False, False, False)) -> bytes:
    """Return a frame as a small JPEG, upright and with its aspect kept.

    Args:
        frame: Of any pixel format.
        orientation: Whether to transpose it, then to flip its rows, then its columns.
    """
    transposed, flip_y, flip_x = orientation
    limit_hw = (WIDTH_PX, HEIGHT_PX) if transposed else (HEIGHT_PX, WIDTH_PX)
    scale = min(1.0, limit_hw[0] / frame.height, limit_hw[1] / frame.width)
    height, width = (max(2, round(side * scale / 2) * 2) for side in (frame.height, frame.width))
    turned = any(orientation)
    small = VideoReformatter().reformat(
        frame, width, height, "rgb24" if turned else "yuvj420p", interpolation=Interpolation.AREA, threads=1
    )
    if turned:
        rgb = small.to_ndarray().transpose(1, 0, 2) if transposed else small.to_ndarray()  # (H, W, 3)
        rgb = np.ascontiguousarray(rgb[:: -1 if flip_y else 1, :: -1 if flip_x else 1], np.uint8)
        small = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format="yuvj420p")
    return _encode(small)


def _encode(frame: VideoFrame) -> bytes:
    encoder = av.VideoCodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "yuvj420p"
    encoder.time_base = Fraction(1)
    encoder.qmin = encoder.qmax = JPEG_QUANTISER
    encoder.thread_count = 1
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
