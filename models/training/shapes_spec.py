"""What a world of shapes is made of: its vocabulary, its settings, and the records that describe what happens in it.

Lengths are fractions of the frame's width, x to the right and y down; times are seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 40, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 225, 40),
    "green": (40, 180, 60),
    "cyan": (50, 215, 225),
    "blue": (50, 90, 240),
    "purple": (165, 60, 205),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
NEEDLE_SHAPE = "star"  # where needles are asked for, no other object has this shape
SIZES = ("small", "large")
RADIUS = {"small": 0.095, "large": 0.155}  # 12 and 20 px across at 64 px
_H = math.sqrt(0.5)
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "down-right": (_H, _H),
    "down": (0.0, 1.0),
    "down-left": (-_H, _H),
    "left": (-1.0, 0.0),
    "up-left": (-_H, -_H),
    "up": (0.0, -1.0),
    "up-right": (_H, -_H),
}
STILL = "still"
SPEEDS = {"slow": (0.07, 0.09), "fast": (0.18, 0.22)}  # widths a second: 5 and 13 px a second at 64 px
BACKGROUNDS = ("plain", "gradient", "texture", "checker", "mixed")
EDGES = ("leave", "stay", "bounce", "wrap")
BACKGROUND_CHANGES = "background changes"
KINDS = (
    "appears",
    "leaves",
    "starts moving",
    "stops",
    "turns",
    "changes colour",
    "grows",
    "shrinks",
    BACKGROUND_CHANGES,
)

MIN_PHASE_S = 1.5  # between two things that one object does: three frames at 2 fps
RESIZE_S = 0.5  # how long growing and shrinking take
WALL = 0.015  # kept free between an object and the frame's edge

Edges = Literal["leave", "stay", "bounce", "wrap"]
Background = Literal["plain", "gradient", "texture", "checker", "mixed"]


@dataclass(frozen=True)
class ShapesSpec:
    """What a world of shapes is made of. Two equal specs give the same pixels and the same truth.

    Attributes:
        seed: In [0, 2**63).
        size_px: Height and width of a rendered frame.
        n_objects: Objects of an episode, [least, most], at most 4; one that finds no free place is left out.
        n_changes: Things that an object does between appearing and leaving, [least, most], as far as they fit;
            where most is not 0, one may also stop before a wall.
        episode_s: Length of an episode. Objects live inside one; short ones give more events a minute.
        background: Kind of background, or "mixed" for one kind per scene.
        scene_episodes: Episodes between two changes of the background; 0 keeps one for ever.
        edges: What the frame's edge means to a moving object: it may leave through it, stays inside, bounces or wraps.
        still_share: Share of objects that stand still when they appear.
        needles_per_min: How often a needle appears: a still star for 2.5 to 4 s, otherwise no stars at all.
    """

    seed: int = 0
    size_px: int = 256
    n_objects: tuple[int, int] = (1, 3)
    n_changes: tuple[int, int] = (0, 2)
    episode_s: float = 12.0
    background: Background = "mixed"
    scene_episodes: int = 5
    edges: Edges = "leave"
    still_share: float = 0.25
    needles_per_min: float = 0.0

    def __post_init__(self) -> None:
        _check("seed", self.seed, 0 <= self.seed < 2**63, "a whole number in [0, 2**63)")
        _check("size_px", self.size_px, 32 <= self.size_px <= 4096, "32 to 4096 pixels")
        _check(
            "n_objects",
            self.n_objects,
            0 <= self.n_objects[0] <= self.n_objects[1] <= 4,
            "two numbers, least and most, in 0 to 4",
        )
        _check(
            "n_changes",
            self.n_changes,
            0 <= self.n_changes[0] <= self.n_changes[1] <= 4,
            "two numbers, least and most, in 0 to 4",
        )
        _check("episode_s", self.episode_s, 5.0 <= self.episode_s <= 600.0, "5 to 600 seconds")
        _check("background", self.background, self.background in BACKGROUNDS, f"one of {', '.join(BACKGROUNDS)}")
        _check("scene_episodes", self.scene_episodes, self.scene_episodes >= 0, "0 (never changes) or more")
        _check("edges", self.edges, self.edges in EDGES, f"one of {', '.join(EDGES)}")
        _check("still_share", self.still_share, 0.0 <= self.still_share <= 1.0, "a share, 0 to 1")
        most = 60.0 / self.episode_s
        _check(
            "needles_per_min",
            self.needles_per_min,
            0.0 <= self.needles_per_min <= most,
            f"0 to {most:g}, one an episode; shorten episode_s for more",
        )


def _check(name: str, got: object, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"ShapesSpec.{name}: got {got!r}, expected {expected}")


@dataclass(frozen=True)
class Look:
    """What an object looks like, as a caption names it."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Event:
    """Something that happens at one moment: a frame at `t_s` already shows it.

    `before` and `after` hold what changes: directions of motion (also of an object as it appears or leaves),
    colours or sizes. Growing and shrinking begin at `t_s` and take `RESIZE_S`.
    """

    t_s: float
    kind: str  # one of KINDS
    object_id: int  # -1 for the background
    look: Look | None  # just before the event; as it appears for "appears"; None for the background
    before: str = ""
    after: str = ""
    place: str = ""  # where in the frame, from `place_of`
    needle: bool = False

    @property
    def text(self) -> str:
        """Return it as a sentence without a full stop."""
        if self.kind == BACKGROUND_CHANGES:
            return "the background changes"
        if self.kind == "appears":
            motion = "and stays still" if self.after == STILL else f"and moves {self.after}"
            return f"a {self.look} appears {motion}"
        tail = {"starts moving": f" {self.after}", "turns": f" {self.after}", "changes colour": f" to {self.after}"}
        return f"the {self.look} {self.kind}{tail.get(self.kind, '')}"


def changed_look(look: Look, event: Event) -> Look:
    """Return what an object looks like after an event."""
    if event.kind == "changes colour":
        return replace(look, colour=event.after)
    return replace(look, size=event.after) if event.kind in ("grows", "shrinks") else look


def changed_motion(motion: str, event: Event) -> str:
    """Return an object's direction, or "still", after an event; one that has left keeps what it had."""
    return event.after if event.kind in ("appears", "starts moving", "stops", "turns") else motion


@dataclass(frozen=True)
class ObjectState:
    """One object at one moment."""

    object_id: int
    look: Look  # the size is the one being grown or shrunk to
    direction: str  # one of DIRECTIONS, or "still"
    speed: str  # slow, fast or still
    place: str  # from `place_of`
    x: float  # centre, as a fraction of the frame
    y: float
    radius: float
    needle: bool


@dataclass(frozen=True)
class ObjectPlan:
    """One object's whole life. `path` is unfolded: straight on through edges where the object bounces or wraps."""

    object_id: int
    shape: str
    speed: str  # slow or fast, for as often as it moves
    needle: bool
    appears_s: float
    leaves_s: float
    path: np.ndarray = field(repr=False)  # (n, 3) float64: time, x, y; linear between
    radii: np.ndarray = field(repr=False)  # (n, 2) float64: time, radius; linear between
    radius_max: float
    edges: Edges
    events: tuple[Event, ...] = ()  # in order of time, from "appears" to "leaves"

    def alive(self, times_s: np.ndarray) -> np.ndarray:
        """Return (n,) bool: whether it is there, from appearing until just before leaving."""
        return (times_s >= self.appears_s) & (times_s < self.leaves_s)

    def position(self, times_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return its centre's x and y at (n,) times, each (n,)."""
        x = np.interp(times_s, self.path[:, 0], self.path[:, 1])
        y = np.interp(times_s, self.path[:, 0], self.path[:, 2])
        return fold(x, self.radius_max, self.edges), fold(y, self.radius_max, self.edges)

    def radius(self, times_s: np.ndarray) -> np.ndarray:
        """Return its radius at (n,) times."""
        return np.interp(times_s, self.radii[:, 0], self.radii[:, 1])

    def state_at(self, t_s: float) -> ObjectState:
        """Return what it is and does at one moment, which must lie in its life."""
        look, motion = self.events[0].look, STILL
        assert look is not None
        for event in self.events:
            if event.t_s <= t_s:
                look, motion = changed_look(look, event), changed_motion(motion, event)
        times = np.array([t_s])
        x, y = (float(centre[0]) for centre in self.position(times))
        speed = STILL if motion == STILL else self.speed
        radius = float(self.radius(times)[0])
        return ObjectState(self.object_id, look, motion, speed, place_of(x, y), x, y, radius, self.needle)


def fold(u: np.ndarray, radius: float, edges: Edges) -> np.ndarray:
    """Bring coordinates that ran straight on through the frame's edge back to where they show."""
    if edges == "wrap":
        return (u + radius) % (1.0 + 2.0 * radius) - radius
    if edges == "bounce":
        low, width = radius + WALL, 1.0 - 2.0 * (radius + WALL)
        phase = ((u - low) / width) % 2.0
        return low + width * np.minimum(phase, 2.0 - phase)
    return u


def place_of(x: float, y: float) -> str:
    """Name the ninth of the frame that holds a point: "top left", "left", "middle"…"""
    across = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    down = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
    return f"{down} {across}".strip() or "middle"


def direction_of(dx: float, dy: float) -> str:
    """Name the direction, of eight, that is nearest to a movement."""
    eighth = round(math.atan2(dy, dx) / (math.pi / 4)) % 8
    return tuple(DIRECTIONS)[eighth]
