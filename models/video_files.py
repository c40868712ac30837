"""Which of a video's streams is looked at, and which way up: the same for lanes and for training. Takes PyAV's objects.

Phones lay their pictures down, and say beside the pixels how to turn them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


def choose_video_stream(container: Any) -> Any:
    """Return a container's largest video stream that can be decoded and is no attached cover; None without one."""
    videos = [s for s in container.streams.video if not is_cover(s)]
    decodable = [s for s in videos if s.codec_context is not None]  # without one a stream has no size either
    return max(decodable, key=lambda s: (s.width or 0) * (s.height or 0), default=None)


def is_cover(stream: Any) -> bool:
    """Whether a video stream is a still picture attached to its container."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


class Orientation(NamedTuple):
    """How to set a frame upright, in this order."""

    transposed: bool
    flip_y: bool  # its rows
    flip_x: bool  # its columns


def orientation(frame: Any) -> Orientation:
    """Return how to set PyAV's frame upright.

    The display matrix holds (a b u; c d v; x y w) and puts a frame's (p, q) at (a p + c q, b p + d q); see
    libavutil/display.h. Angles between are taken to the nearest quarter turn.
    """
    matrix = next((s for s in side_data_of(frame) if s.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return Orientation(False, False, False)
    a, b, _, c, d = (int(v) for v in np.frombuffer(bytes(matrix), np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, d < 0, a < 0)
    return Orientation(True, b < 0, c < 0)


def set_upright(pixels: np.ndarray, how: Orientation) -> np.ndarray:
    """Return a view of (H, W, 3) pixels, upright; (W, H, 3) where they are transposed."""
    if how.transposed:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if how.flip_y else 1, :: -1 if how.flip_x else 1]


def side_data_of(frame: Any) -> Any:
    """Return what stands beside the pixels of PyAV's frame.

    PyAV 18 fails on kinds that it has no name for, such as the EXIF data in every phone's pictures, which FFmpeg 8
    gives. At the first of them PyAV is taught to go on, for good.
    """
    try:
        return frame.side_data  # PyAV's stubs know motion vectors only
    except ValueError:
        from av.sidedata.sidedata import Type

        kinds: Any = Type
        kinds._missing_ = classmethod(_unnamed_kind)
        return frame.side_data


def _unnamed_kind(kinds: Any, value: int) -> Any:
    kind = object.__new__(kinds)
    kind._name_, kind._value_ = f"UNNAMED_{value}", value
    return kind
