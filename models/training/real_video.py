"""Stretches of real video as evenly spaced frames, set upright as live streams are. Needs PyAV."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..last_used import LastUsed
from ..video_files import choose_video_stream, orientation, set_upright

KEPT_BYTES = 512 << 20  # of decoded clips: 2,700 of 16 frames of 64 px, or 55 of 448 px
_FALLBACK_FPS = 25.0  # FFmpeg's own assumption where nothing tells


@dataclass(frozen=True)
class VideoLength:
    """How long a video is."""

    n_frames: int
    fps: float

    @property
    def seconds(self) -> float:
        """Return the time that its frames stand for."""
        return self.n_frames / self.fps


@lru_cache(maxsize=1 << 16)
def length_of(video: Path) -> VideoLength:
    """Return how long a video's picture is, as the head says, or else by its packets; nothing is decoded.

    Raises:
        ValueError: If it cannot be opened, or has no video or no frames.
    """
    with _opened(video) as (container, stream):
        n_frames, fps = stream.frames, float(stream.average_rate or 0)
        if not (n_frames and fps):  # Matroska and WebM tell how long the longest stream is, which may be the sound
            n_frames, fps = _count_packets(container, stream)
        if not n_frames:
            raise ValueError("it has no frames")
    return VideoLength(n_frames, fps)


def stretch_s(video: Path, start_s: float, stop_s: float | None) -> float:
    """Return how long a stretch of a video is, in seconds.

    Args:
        video: The file.
        start_s: From its first frame on.
        stop_s: Likewise, at most the video's end; None: its end.

    Raises:
        ValueError: As `length_of`, or if the video ends before the stretch begins.
    """
    whole_s = length_of(video).seconds
    stop_s = whole_s if stop_s is None else min(stop_s, whole_s)
    if start_s >= stop_s:
        raise ValueError(f"{video} is {whole_s:.1f} s long; expected more than {start_s} s, where its text begins")
    return stop_s - start_s


def read_stretch(video: Path, start_s: float, stop_s: float | None, n_frames: int, size_px: int) -> np.ndarray:
    """Return `n_frames` evenly spaced frames of a stretch: (n_frames, size, size, 3) uint8 RGB.

    Those read last are kept in memory, `KEPT_BYTES` of them.

    Raises:
        ValueError: As `stretch_s`, or if the frames cannot be decoded.
    """
    key = (video, start_s, stop_s, n_frames, size_px)
    frames = _kept.get(key)
    if frames is None:
        frames = _decode(*key)
        _kept.put(key, frames)
    return frames


_kept: LastUsed[Hashable, np.ndarray] = LastUsed(KEPT_BYTES)


def _decode(video: Path, start_s: float, stop_s: float | None, n_frames: int, size_px: int) -> np.ndarray:
    length, seconds = length_of(video), stretch_s(video, start_s, stop_s)
    times_s = start_s + (np.arange(n_frames) + 0.5) * seconds / n_frames
    with _opened(video) as (container, stream):
        frames = _timed(container.decode(stream), length.fps)
        pictures = list(_pictures_at(times_s.tolist(), frames, length.fps, size_px))
    return np.stack(pictures)


@contextmanager
def _opened(video: Path) -> Iterator[tuple[Any, Any]]:
    """Give a video's container and stream; whatever goes wrong within is told with the file's name."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(f"file:{video}", metadata_errors="replace") as container:
            stream = choose_video_stream(container)
            if stream is None:
                kinds = ", ".join(sorted({s.type or "unknown" for s in container.streams})) or "none"
                raise ValueError(f"it has no video that can be decoded; its streams: {kinds}")
            yield container, stream
    except (FFmpegError, OSError, ValueError, IndexError) as error:  # PyAV raises all of them about bad files
        raise ValueError(f"{video} cannot be trained on: {error}") from error


def _count_packets(container: Any, stream: Any) -> tuple[int, float]:
    """Return how many frames a stream has, and how many a second."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    ticks = [packet.pts for packet in packets if packet.pts is not None]
    span_s = float((max(ticks) - min(ticks)) * stream.time_base) if ticks else 0.0
    rate = stream.average_rate or stream.guessed_rate or _FALLBACK_FPS
    return len(packets), (len(packets) - 1) / span_s if span_s else float(rate)


def _timed(frames: Iterable[Any], fps: float) -> Iterator[tuple[float, Any]]:
    """Give frames with their time since the first, in seconds: as their timestamps say, or else by their number."""
    begin = None
    for i, frame in enumerate(frames):
        if frame.pts is None:
            yield i / fps, frame
            continue
        pts_s = float(frame.pts * frame.time_base)
        begin = pts_s - i / fps if begin is None else begin
        yield pts_s - begin, frame


def _pictures_at(
    times_s: Sequence[float], frames: Iterable[tuple[float, Any]], fps: float, size_px: int
) -> Iterator[np.ndarray]:
    """Give for each time the picture that is seen then: the last frame up to it, as in a lane.

    Args:
        times_s: Rising.
        frames: Each with its time.
        fps: Of them, on average.
        size_px: Side of a picture.

    Raises:
        ValueError: If the frames end before the first time.
    """
    waiting, shown, n_frames = deque(times_s), None, 0
    for frame_s, frame in frames:
        while waiting and shown is not None and frame_s > waiting[0]:
            waiting.popleft()
            yield _picture(shown, size_px)
        if not waiting:
            return
        shown, n_frames = frame, n_frames + 1
    # The last one stands for what is left, also where a file has fewer frames than its head says.
    if shown is None or (len(waiting) == len(times_s) and n_frames <= times_s[0] * fps):
        raise ValueError(f"it gives no frame from {times_s[0]:.1f} s on")
    last = _picture(shown, size_px)
    yield from (last for _ in waiting)


def _picture(frame: Any, size_px: int) -> np.ndarray:
    """Return a frame upright and squeezed into a square: (size, size, 3) uint8 RGB."""
    upright = set_upright(frame.to_ndarray(format="rgb24"), orientation(frame))
    pixels = torch.from_numpy(np.ascontiguousarray(upright)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size=(size_px, size_px), mode="bilinear", antialias=True)
    return pixels[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
