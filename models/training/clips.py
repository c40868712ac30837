"""Clips of the world of shapes, with what to ask about them: the training data, as a function of a number.

Clip i of a split is always the same clip. Its world's seed comes from i, and the splits' seeds lie apart
(`HELD_OUT_SEED`), so nothing that is evaluated was ever trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .questions import WindowView
from .shapes import Event, ObjectState, ShapesSpec, ShapesWorld
from .shapes_spec import BACKGROUND_CHANGES, COLOURS, DIRECTIONS, SHAPES, SIZES, STILL

FPS = 2.0
HELD_OUT_SEED = 1 << 40  # training worlds have seeds below, held-out ones from here on
# Of feeds that are shown or measured live: no evaluation draws from this stream.
FEEDS_SEED = HELD_OUT_SEED + (99 << 32)
WORLDS = ("shapes", "scenes", "needles")

MOTIONS = (STILL, *DIRECTIONS)
SPEED_NAMES = (STILL, "slow", "fast")
CHANGE_NAMES = ("appears", "leaves", "starts moving", "stops", "turns", "changes colour", "grows", "shrinks")
UNKNOWN = -100  # label of a place that says nothing; cross entropy ignores it
RECENT_S = 1.5  # for how long a change is told at its place: three frames
AGE_S = 5.0  # for how long an object's last change is told with how long ago it was
_SETTLED_S = 0.75  # after a change of motion, until two frames show the new one
_BACKWARDS = {"appears": "leaves", "leaves": "appears", "starts moving": "stops", "stops": "starts moving"} | {
    "grows": "shrinks",
    "shrinks": "grows",
}


@dataclass(frozen=True, eq=False)
class Clip:
    """A piece of a world at 2 fps, played forwards or backwards. Its frames are drawn when they are asked for."""

    seed: int
    world: ShapesWorld
    start_s: float  # in the world's time, of the earliest frame
    n_frames: int
    backwards: bool
    augment: bool = True

    def window(self, first: int, stop: int) -> WindowView:
        """Return the view of frames [first, stop) as played; backwards, in the world's own direction of time."""
        if self.backwards:
            first, stop = self.n_frames - stop, self.n_frames - first
        return WindowView(self.world, self.start_s + first / FPS, self.start_s + stop / FPS)

    def plan(self) -> None:
        """Work out what happens in it, so that nothing is left to work out as windows are asked about."""
        _ = self.window(0, self.n_frames).full

    def times_s(self) -> np.ndarray:
        """Return the frames' times in the world, as played: (n_frames,)."""
        times = self.start_s + np.arange(self.n_frames) / FPS
        return times[::-1] if self.backwards else times

    def render(self) -> np.ndarray:
        """Draw the frames as played: (n_frames, size, size, 3) uint8 RGB, contiguous."""
        frames = self.world.render_many(self.times_s())
        return _with_camera(frames, np.random.default_rng([self.seed, 13])) if self.augment else frames


def world_of(seed: int, kind: str, needle_frames: int = 64, size_px: int = 64) -> ShapesWorld:
    """Return a world of one of `WORLDS`.

    ``shapes`` is busy: one to three objects at a time, and more changes than the demo's feed has. ``scenes`` is the
    same, but its background changes after every second episode in place of every fifth: as often as not where it may,
    so that when it may tells nothing. ``needles`` is dull: at most one object at a time and little change, with one to
    two needles in `needle_frames` frames on average.

    Raises:
        ValueError: On an unknown kind.
    """
    rng = np.random.default_rng([seed, 11])
    if kind in ("shapes", "scenes"):
        return ShapesWorld(
            ShapesSpec(
                seed=seed,
                size_px=size_px,
                n_objects=((1, 3), (1, 2), (0, 2), (2, 3))[int(rng.integers(4))],
                n_changes=((0, 2), (1, 2), (1, 3))[int(rng.integers(3))],
                episode_s=float(rng.choice([10.0, 12.0, 14.0])),
                still_share=0.25,
                scene_episodes=2 if kind == "scenes" else 5,
            )
        )
    if kind == "needles":
        per_min = float(rng.uniform(1.0, 2.2)) * 60.0 * FPS / needle_frames
        return ShapesWorld(
            ShapesSpec(
                seed=seed,
                size_px=size_px,
                n_objects=(0, 1),
                n_changes=(0, 1),
                episode_s=8.0,
                scene_episodes=15,
                needles_per_min=min(per_min, 6.0),
            )
        )
    raise ValueError(f"kind of world is {kind!r}; expected one of {WORLDS}")


def seed_of(index: int, stream: int, *, held_out: bool) -> int:
    """Return the seed of clip `index` of one of 256 streams of clips (stages, evaluations) of a split.

    Raises:
        ValueError: If the split has no such clip.
    """
    if not (0 <= index < 1 << 32 and 0 <= stream < 256):
        raise ValueError(f"clip {index} of stream {stream}; expected 0 to 2**32 - 1 of streams 0 to 255")
    return index + (stream << 32) + (HELD_OUT_SEED if held_out else 0)


def make_clip(
    seed: int,
    n_frames: int,
    kind: str = "shapes",
    *,
    size_px: int = 64,
    backwards: bool | None = None,
    backwards_share: float = 0.5,
    augment: bool = True,
    needle_frames: int | None = None,
) -> Clip:
    """Choose a clip: its world, the time in it, its direction and its light all follow from the seed.

    Args:
        seed: From `seed_of`.
        n_frames: 1 or more.
        kind: One of `WORLDS`.
        size_px: Side of a frame.
        backwards: Play it backwards, or not; None tosses a coin,
        backwards_share: which says so this often.
        augment: Vary brightness and contrast, and add a little noise, as a camera and a codec do.
        needle_frames: Frames in which one to two needles come on average, where the kind has needles; by default
            the whole clip.
    """
    rng = np.random.default_rng([seed, 7])
    world = world_of(seed, kind, needle_frames or n_frames, size_px)
    start_s = round(float(rng.uniform(0.0, 60.0)), 3)
    coin = bool(rng.random() < backwards_share)
    return Clip(seed, world, start_s, n_frames, coin if backwards is None else backwards, augment)


def _with_camera(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return frames with a gain and an offset per clip, and noise per pixel; half of the clips stay as drawn."""
    if rng.random() < 0.5:
        return frames
    gain, offset, noise = rng.uniform(0.92, 1.06), rng.uniform(-6.0, 6.0), rng.uniform(0.0, 5.0)
    seen = frames.astype(np.float32) * np.float32(gain) + np.float32(offset)
    seen += rng.standard_normal(frames.shape, np.float32) * np.float32(noise)
    return np.clip(seen, 0.0, 255.0).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class PlaceLabels:
    """What is at each place of each frame: for the first stages, which learn to see before they learn to speak.

    Arrays are (T, grid, grid) int64, `UNKNOWN` where nothing can be told, but `offset` and `age`.
    """

    colour: np.ndarray  # 0 for nothing, else 1 + index into COLOURS
    shape: np.ndarray  # index into SHAPES
    size: np.ndarray  # index into SIZES
    motion: np.ndarray  # index into MOTIONS
    speed: np.ndarray  # index into SPEED_NAMES
    change: np.ndarray  # 0 for none of late, else 1 + index into CHANGE_NAMES
    background: np.ndarray  # 0, or 1 where the whole background changed of late
    offset: np.ndarray  # (T, grid, grid, 2) float32: the object's centre from the place's, in places; NaN for none
    age: np.ndarray  # (T, grid, grid) float32: seconds since the object's last change that was seen; NaN for none


def label_places(clip: Clip, grid: int) -> PlaceLabels:
    """Label a clip's places with the object that covers them; the nearest one, if several do."""
    shape = (clip.n_frames, grid, grid)
    labels = PlaceLabels(
        colour=np.zeros(shape, np.int64),
        shape=np.full(shape, UNKNOWN, np.int64),
        size=np.full(shape, UNKNOWN, np.int64),
        motion=np.full(shape, UNKNOWN, np.int64),
        speed=np.full(shape, UNKNOWN, np.int64),
        change=np.zeros(shape, np.int64),
        background=np.zeros(shape, np.int64),
        offset=np.full((*shape, 2), np.nan, np.float32),
        age=np.full(shape, np.nan, np.float32),
    )
    times = clip.times_s()
    events = clip.world.events(max(0.0, float(times.min()) - AGE_S), float(times.max()) + AGE_S)
    for frame, t_s in enumerate(times.tolist()):
        told = _events_before(events, t_s, clip.backwards)
        recent = [each for each in told if each[1] < RECENT_S]
        labels.background[frame] = any(
            kind == BACKGROUND_CHANGES and age <= (frame - 1) / FPS for kind, age, _ in recent
        )
        _label_leavers(labels, frame, recent, clip, grid)
        for state in clip.world.objects_at(t_s):
            own = [(kind, age) for kind, age, e in told if e.object_id == state.object_id and kind != "leaves"]
            _label_object(labels, frame, state, own, clip, grid)
    return labels


def _events_before(events: Sequence[Event], t_s: float, backwards: bool) -> list[tuple[str, float, Event]]:
    """Return (kind as played, age in s, event) of what happened in the last `AGE_S`, as played; the latest last."""
    told = []
    for event in events:
        age_s = event.t_s - t_s if backwards else t_s - event.t_s
        kind = _BACKWARDS.get(event.kind, event.kind) if backwards else event.kind
        if 0.0 <= age_s < AGE_S and kind in (*CHANGE_NAMES, BACKGROUND_CHANGES):
            told.append((kind, age_s, event))
    return sorted(told, key=lambda item: -item[1])


def _label_leavers(
    labels: PlaceLabels, frame: int, recent: list[tuple[str, float, Event]], clip: Clip, grid: int
) -> None:
    """Label where an object was last seen before it left."""
    for kind, _, event in recent:
        if kind == "leaves":
            last_s = event.t_s + (0.01 if clip.backwards else -0.01)
            for state in clip.world.objects_at(max(0.0, last_s)):
                if state.object_id == event.object_id:
                    row, col = (min(grid - 1, max(0, int(u * grid))) for u in (state.y, state.x))
                    labels.change[frame, row, col] = 1 + CHANGE_NAMES.index("leaves")


def _label_object(
    labels: PlaceLabels, frame: int, state: ObjectState, own: list[tuple[str, float]], clip: Clip, grid: int
) -> None:
    centres = (np.arange(grid) + 0.5) / grid
    dx, dy = (state.x - centres) * grid, (state.y - centres) * grid  # in places
    reach = max(0.5, 0.8 * state.radius * grid)
    near = np.maximum(np.abs(dy)[:, None], np.abs(dx)[None, :]) <= reach  # (grid, grid)
    distance = np.hypot(dy[:, None], dx[None, :])
    taken = np.hypot(labels.offset[frame, ..., 0], labels.offset[frame, ..., 1])
    rows, cols = np.nonzero(near & ~(taken < distance))
    labels.colour[frame, rows, cols] = 1 + tuple(COLOURS).index(state.look.colour)
    labels.shape[frame, rows, cols] = SHAPES.index(state.look.shape)
    labels.size[frame, rows, cols] = SIZES.index(state.look.size)
    labels.offset[frame, rows, cols] = np.stack([dx[cols], dy[rows]], axis=1)
    settled = frame >= 2 and all(age >= _SETTLED_S for kind, age in own if kind in CHANGE_NAMES[:5])
    motion = state.direction
    if clip.backwards and motion != STILL:
        motion = MOTIONS[1 + (MOTIONS.index(motion) - 1 + 4) % 8]
    labels.motion[frame, rows, cols] = MOTIONS.index(motion) if settled else UNKNOWN
    labels.speed[frame, rows, cols] = SPEED_NAMES.index(state.speed) if settled else UNKNOWN
    # What happened before the clip's first frame cannot be seen.
    seen = [(kind, age) for kind, age in own if age <= (frame - 1) / FPS]
    late = [kind for kind, age in seen if age < RECENT_S]
    labels.change[frame, rows, cols] = 1 + CHANGE_NAMES.index(late[-1]) if late else 0
    labels.age[frame, rows, cols] = seen[-1][1] if seen else np.nan
