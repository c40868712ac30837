"""Sampling frames on a fixed grid, so that the choice never depends on how a stream was cut.

Times here are *elapsed*: nanoseconds since the session's start, the grid's origin. Grid time g is ``g / fps``
seconds, compared exactly (integers and fractions, never floats), and the frame of g is the last one with
time ≤ g. The rules, which `decode` applies inside a segment and `step_sampler` across segments:

- A frame exactly on a grid time decides it at once. Every other grid time is decided by the frame before it, when
  the next frame is seen.
- A frame is held for `GridSpec.max_hold_ns` at most: a longer silence has no frames. Nothing is invented where a
  segment is missing or failed, nor after a session's last frame.
- Grid indices only rise. A clock that jumps back gives no second frame for a grid time that has passed.

Frame times are whole milliseconds since the session's start (`MediaClock`), because Matroska, which the publisher
writes, keeps no finer ones: only so do a file read directly and the same file published choose the same frames.
A grid as fine as the video itself feels that: a frame whose time was rounded up past its grid time comes one later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .rows import DecodedSegment

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000

DEFAULT_MAX_HOLD_NS = 10 * NS_PER_S
"""How long a frame stands for what is not there. Still pictures are often sent at less than 1 fps, and a camera
that says nothing for longer than 10 s is more likely out than showing the same picture."""

STATE_VERSION = 1

Frame = TypeVar("Frame")


def round_half_away(numerator: int, denominator: int) -> int:
    """Divide and round to nearest, halves away from zero, as FFmpeg's `av_rescale_q` and so its muxers do.

    Args:
        numerator: Any integer.
        denominator: Above zero.
    """
    magnitude = (2 * abs(numerator) + denominator) // (2 * denominator)
    return magnitude if numerator >= 0 else -magnitude


@dataclass(frozen=True)
class MediaClock:
    """Turns a container's timestamps into times: whole milliseconds since the session's start, in ns UTC.

    For a published segment the origin is its first frame, at `SegmentMeta.start_ns`. For a whole file, or a part of
    one that keeps the file's timestamps, it is the file's first frame, at the session's start; then the times agree
    with those of the same file published in Matroska segments whose timestamps count from the session's start and
    whose `start_ns` is the session's start plus the first of them. A publisher in a container with finer timestamps
    (MPEG-TS: 1/90,000 s) gets the same agreement by giving `start_ns` to the nanosecond, unrounded.
    """

    time_base: Fraction  # seconds per tick
    origin_ticks: int  # timestamp of the frame at origin_ns
    origin_ns: int  # its time, UTC
    session_start_ns: int  # origin of the milliseconds, and of the grid

    def time_ns(self, ticks: int) -> int:
        """Return the time of a frame, from its timestamp in `time_base`."""
        tb = self.time_base
        since_start = (self.origin_ns - self.session_start_ns) * tb.denominator  # in ns / denominator
        since_origin = (ticks - self.origin_ticks) * tb.numerator * NS_PER_S
        elapsed_ms = round_half_away(since_start + since_origin, tb.denominator * NS_PER_MS)
        return self.session_start_ns + elapsed_ms * NS_PER_MS


@dataclass(frozen=True)
class GridSpec:
    """The grid on which frames are sampled; the same for every step of a lane."""

    fps: Fraction  # grid times per second; exact, so 30000/1001 is possible
    max_hold_ns: int = DEFAULT_MAX_HOLD_NS  # no frame stands for a grid time further after it than this

    def __post_init__(self) -> None:
        if not isinstance(self.fps, Fraction) or self.fps <= 0:
            raise ValueError(f"grid fps must be a Fraction above 0, got {self.fps!r}; try Fraction(str(fps))")
        if self.max_hold_ns < 0:
            raise ValueError(f"max_hold_ns must be 0 or more, got {self.max_hold_ns}")

    def index_at_or_before(self, elapsed_ns: int) -> int:
        """Return the last grid index with time ≤ `elapsed_ns`; negative before the session's start."""
        return elapsed_ns * self.fps.numerator // (NS_PER_S * self.fps.denominator)

    def index_at_or_after(self, elapsed_ns: int) -> int:
        """Return the first grid index with time ≥ `elapsed_ns`."""
        return -(-elapsed_ns * self.fps.numerator // (NS_PER_S * self.fps.denominator))

    def elapsed_ns(self, index: int) -> int:
        """Return a grid time since the session's start, rounded to ns. To show and store, not to compare."""
        return round_half_away(index * NS_PER_S * self.fps.denominator, self.fps.numerator)

    @property
    def most_step(self) -> int:
        """Return how far the grid indices of two frames that follow each other lie apart at most, without a silence.

        A frame stands for the grid times of `max_hold_ns` after it; a larger step is a longer silence, or lost video.
        """
        return self.index_at_or_before(self.max_hold_ns) + 1

    def held(self, frame_ns: int, next_ns: int) -> range:
        """Return the grid indices strictly between two frames for which the earlier one stands.

        Args:
            frame_ns: Elapsed time of the earlier frame.
            next_ns: Elapsed time of the frame after it.
        """
        start = max(0, self.index_at_or_before(frame_ns) + 1)
        hold_stop = self.index_at_or_before(frame_ns + self.max_hold_ns) + 1
        return range(start, max(start, min(self.index_at_or_after(next_ns), hold_stop)))


def walk_grid(frames: Iterable[tuple[int, Frame]], grid: GridSpec) -> Iterator[tuple[int, Frame]]:
    """Pair the grid indices that a run of frames decides with their frames, looking one frame ahead.

    Grid times after the last frame are left to whoever knows what follows (`step_sampler`).

    Args:
        frames: Elapsed time in ns, never falling, and the frame.
        grid: The grid.

    Yields:
        Grid index, strictly rising, and its frame; a frame may come several times or not at all.
    """
    next_index = 0
    last: tuple[int, Frame] | None = None
    for elapsed_ns, frame in frames:
        if last is not None:
            for index in grid.held(last[0], elapsed_ns):
                yield index, last[1]
        index = grid.index_at_or_before(elapsed_ns)
        if index >= next_index and index == grid.index_at_or_after(elapsed_ns):
            yield index, frame
        next_index = max(next_index, index + 1)  # of two frames at one time the first decides, the second goes on
        last = elapsed_ns, frame


@dataclass(frozen=True)
class SamplerState:
    """What sampling must remember of one session between segments. Frozen; `step_sampler` makes the next one."""

    session: str
    next_grid_index: int = 0  # everything below is decided
    tail_ns: int | None = None  # time of the newest frame, ns UTC; None at the start and after something missing
    tail_frame: np.ndarray | None = field(default=None, repr=False)  # (H, W, 3) uint8, that frame

    def header(self) -> dict[str, Any]:
        """Return its JSON part."""
        return {
            "version": STATE_VERSION,
            "session": self.session,
            "next_grid_index": self.next_grid_index,
            "tail_ns": self.tail_ns,
        }

    def to_tensors(self) -> dict[str, np.ndarray]:
        """Return its arrays, for safetensors: `tail_frame`, or nothing."""
        return {} if self.tail_frame is None else {"tail_frame": self.tail_frame}

    @classmethod
    def from_snapshot(cls, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> SamplerState:
        """Build the state that `header` and `to_tensors` described.

        Raises:
            ValueError: If it was written by another version, or its parts do not belong together.
        """
        check_version(header, "sampler")
        tail_frame = tensors.get("tail_frame")
        if (tail_frame is None) != (header["tail_ns"] is None):
            raise ValueError(
                f"sampler state of session {header['session']!r}: tail_ns and tail_frame must come together, "
                f"got tail_ns={header['tail_ns']} and tail_frame={'no' if tail_frame is None else 'an'} array"
            )
        return cls(header["session"], header["next_grid_index"], header["tail_ns"], tail_frame)


class Sampled(NamedTuple):
    """What `step_sampler` found in a segment."""

    frames: np.ndarray  # (n, H, W, 3) uint8 RGB
    grid_indices: np.ndarray  # (n,) int64, strictly rising
    state: SamplerState
    n_skipped: int  # grid times that the segment offered again after they had passed: its clock jumped back


def step_sampler(state: SamplerState, decoded: DecodedSegment, grid: GridSpec) -> Sampled:
    """Take the next segment of a session: the grid times up to its first frame, then its own.

    The frames of any way of cutting a session are the same. Runs no I/O and changes nothing in place; the state
    holds a copy of its frame, not a view into the segment's memory.

    Args:
        state: From `SamplerState(session)`, the step before, or a snapshot.
        decoded: The next segment of the same session, failed or not.
        grid: The grid that it was decoded with.

    Raises:
        ValueError: If the segment belongs to another session.
    """
    meta = decoded.meta
    if meta.session != state.session:
        raise ValueError(f"the sampler's state is of session {state.session!r}, got a segment of {meta.where}")
    if decoded.failed:
        nothing = SamplerState(state.session, state.next_grid_index)
        return Sampled(decoded.frames[:0], decoded.grid_indices[:0], nothing, 0)

    first_ns = decoded.first_ns - meta.session_start_ns
    fill = range(0)
    if state.tail_ns is not None and not meta.gap_segments:
        held = grid.held(state.tail_ns - meta.session_start_ns, first_ns)
        fill = range(max(held.start, state.next_grid_index), held.stop)

    kept = decoded.grid_indices >= state.next_grid_index
    frames, indices = decoded.frames[:-1][kept], decoded.grid_indices[kept]
    if fill:
        assert state.tail_frame is not None
        filler = np.broadcast_to(state.tail_frame, (len(fill), *state.tail_frame.shape))
        frames, indices = np.concatenate([filler, frames]), np.concatenate([np.asarray(fill, np.int64), indices])

    passed = grid.index_at_or_before(decoded.tail_ns - meta.session_start_ns) + 1
    tail_frame = decoded.frames[-1].copy()
    tail_frame.setflags(write=False)
    after = SamplerState(state.session, max(state.next_grid_index, passed), decoded.tail_ns, tail_frame)
    return Sampled(frames, indices, after, int(kept.size - kept.sum()))


@dataclass(frozen=True)
class FrameChunk:
    """Sampled frames that are encoded together: K of them, or fewer while they wait and at a session's end."""

    frames: np.ndarray = field(repr=False)  # (n, H, W, 3) uint8 RGB
    grid_indices: np.ndarray  # (n,) int64, strictly rising

    @classmethod
    def empty(cls, frame_hw: tuple[int, int]) -> FrameChunk:
        """Return the pending frames of a session that starts."""
        return cls(np.zeros((0, *frame_hw, 3), np.uint8), np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.grid_indices)

    def header(self) -> dict[str, Any]:
        """Return its JSON part."""
        return {"version": STATE_VERSION, "grid_indices": self.grid_indices.tolist()}

    def to_tensors(self) -> dict[str, np.ndarray]:
        """Return its arrays, for safetensors."""
        return {"pending_frames": self.frames}

    @classmethod
    def from_snapshot(cls, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> FrameChunk:
        """Build what `header` and `to_tensors` described.

        Raises:
            ValueError: If it was written by another version, or its parts do not belong together.
        """
        check_version(header, "pending frames")
        frames, indices = tensors["pending_frames"], np.asarray(header["grid_indices"], np.int64)
        if len(frames) != len(indices):
            raise ValueError(f"pending frames: got {len(frames)} frames for {len(indices)} grid indices")
        return cls(frames, indices)


def assemble_chunks(
    pending: FrameChunk, frames: np.ndarray, grid_indices: np.ndarray, chunk_frames: int, most_step: int
) -> tuple[tuple[FrameChunk, ...], FrameChunk]:
    """Put new frames behind the waiting ones and take every full chunk off the front.

    Where a segment ends does not show in the chunks. No chunk goes across a silence: what waited before it is a short
    chunk of its own, as what waits at a session's end is (`flush`).

    Args:
        pending: Fewer than `chunk_frames` frames, from `FrameChunk.empty` or the call before.
        frames: (n, H, W, 3) uint8 RGB, from `step_sampler`.
        grid_indices: (n,) int64.
        chunk_frames: K, the frames of a chunk.
        most_step: From a frame's grid index to the next one's, without a silence between (`GridSpec.most_step`).

    Returns:
        Chunks of K frames, or fewer before a silence, and what waits now; all own their memory.
    """
    frames = np.concatenate([pending.frames, frames])
    indices = np.concatenate([pending.grid_indices, grid_indices])
    silences = np.flatnonzero(np.diff(indices) > most_step) + 1
    starts = [0, *silences.tolist()]
    chunks = []
    for start, stop in zip(starts, [*starts[1:], len(indices)], strict=True):
        is_last = stop == len(indices)
        n_taken = (stop - start) // chunk_frames * chunk_frames if is_last else stop - start
        for first in range(start, start + n_taken, chunk_frames):
            last = min(first + chunk_frames, stop)
            chunks.append(FrameChunk(frames[first:last], indices[first:last]))
        rest = start + n_taken
    return tuple(chunks), FrameChunk(frames[rest:].copy(), indices[rest:].copy())


def flush(pending: FrameChunk) -> tuple[tuple[FrameChunk, ...], FrameChunk]:
    """End a session: return what waits as a last, short chunk (none if nothing waits), and an empty rest."""
    height, width = pending.frames.shape[1:3]
    return ((pending,) if len(pending) else ()), FrameChunk.empty((height, width))


def check_version(header: Mapping[str, Any], what: str) -> None:
    """Refuse a state that another version of the code wrote.

    Raises:
        ValueError: If `header` has no or another version.
    """
    if header.get("version") != STATE_VERSION:
        raise ValueError(
            f"{what} state has version {header.get('version')!r}, this code reads {STATE_VERSION}; "
            "go on with the stormline that wrote it, or start with a new output"
        )
