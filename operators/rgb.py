"""Decoded frames of any pixel format as upright RGB of the model's size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation, VideoReformatter

from ..models.video_files import orientation, set_upright
from .errors import MediaError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
"""Bicubic as in SigLIP's own preprocessing (swscale widens the kernel when it shrinks, so nothing aliases), by the C
paths that give the same bytes on every processor."""


COLOURS_UNSPECIFIED = 2  # of AVColorSpace, AVColorPrimaries and AVColorTransferCharacteristic alike


class RgbConverter:
    """Turns decoded frames of any pixel format into upright RGB of the model's size.

    The same frame asked for again, as for several grid times, is converted once.
    """

    def __init__(self, frame_hw: tuple[int, int]):
        self.frame_hw = frame_hw
        self.reformatter = VideoReformatter()
        self.last: tuple[VideoFrame, np.ndarray] | None = None

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """Return (H, W, 3) uint8."""
        if self.last is None or self.last[0] is not frame:
            self.last = frame, self.convert(frame)
        return self.last[1]

    def convert(self, frame: VideoFrame) -> np.ndarray:
        """Scale, convert, and set upright by the frame's display matrix."""
        how = orientation(frame)
        height, width = self.frame_hw[::-1] if how.transposed else self.frame_hw
        try:
            rgb = self.scale(frame, width, height)
        except FFmpegError:  # colours described in a way that swscale does not know: taken as if nothing were said
            frame.colorspace = frame.color_primaries = frame.color_trc = COLOURS_UNSPECIFIED
            try:
                rgb = self.scale(frame, width, height)
            except FFmpegError as error:
                where = f"{frame.format.name} frames of {frame.width}x{frame.height}"
                raise MediaError("no_frames", f"{where} cannot be turned into RGB: FFmpeg says {error}") from error
        return set_upright(rgb, how)  # (H, W, 3)

    def scale(self, frame: VideoFrame, width: int, height: int) -> np.ndarray:
        """Return (height, width, 3) uint8, as the frame lies."""
        return self.reformatter.reformat(frame, width, height, "rgb24", interpolation=SCALING, threads=1).to_ndarray()
