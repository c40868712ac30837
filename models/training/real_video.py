"""Stretches of real video as evenly spaced frames, set upright as live streams are. Needs PyAV."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..video_files import choose_video_stream, orientation, set_upright

_CLIPS_KEPT = 512  # decoded, 0.2 MB each at 16 frames of 64 px


@lru_cache(maxsize=_CLIPS_KEPT)
def read_stretch(
    video: Path, start_s: float, stop_s: float | None, n_frames: int, size_px: int
) -> tuple[np.ndarray, float]:
    """Return a stretch's frames, (n_frames, size, size, 3) uint8 RGB, and how long it is in seconds.

    Raises:
        ValueError: If the video cannot be decoded, or does not say how long it is.
    """
    import av

    try:
        with av.open(f"file:{video}", metadata_errors="replace") as container:
            stream = choose_video_stream(container)
            total, fps = stream.frames, float(stream.average_rate or 0)
            if not total or not fps:
                raise ValueError(f"{video} does not say how many frames it has; remux it, as to MP4")
            stop = total / fps if stop_s is None else min(stop_s, total / fps)
            if start_s >= stop:
                raise ValueError(f"{video} is {total / fps:.1f} s long; expected more than {start_s} s")
            length_s = stop - start_s
            times = start_s + (np.arange(n_frames) + 0.5) * length_s / n_frames
            indices = np.minimum((times * fps).astype(int), total - 1)
            return _frames_at(indices.tolist(), container.decode(stream), size_px), length_s
    except OSError as error:
        raise ValueError(f"{video} cannot be decoded: {error}") from error


def _frames_at(indices: list[int], frames: Iterable[Any], size_px: int) -> np.ndarray:
    """Return the frames of rising numbers; where they end before, the last one that was wanted again."""
    pictures: dict[int, np.ndarray] = {}
    for i, frame in enumerate(frames):
        if i in indices:
            pictures[i] = _picture(frame, size_px)
        if i >= indices[-1]:
            break
    last = max(pictures)
    return np.stack([pictures.get(i, pictures[last]) for i in indices])


def _picture(frame: Any, size_px: int) -> np.ndarray:
    """Return a frame upright and squeezed into a square: (size, size, 3) uint8 RGB."""
    upright = set_upright(frame.to_ndarray(format="rgb24"), orientation(frame))
    pixels = torch.from_numpy(np.ascontiguousarray(upright)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size=(size_px, size_px), mode="bilinear", antialias=True)
    return pixels[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
