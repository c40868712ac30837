"""Drawing the world of shapes: backgrounds, and objects with soft edges, many frames at once.

An object is drawn from its signed distance: how far inside its outline each pixel's centre lies, in pixels, clipped
to a coverage between 0 and 1, which softens the outline by one pixel. Only the square around the object is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .shapes_plan import Dice
from .shapes_spec import COLOURS, ObjectPlan, ShapesSpec

Plane = np.ndarray

_BACKGROUND_SALT = 1  # keeps a scene's choices apart from those of the episode with the same number
_DARK, _BRIGHT = 28.0, 92.0  # of 255: backgrounds are darker and greyer than every colour of an object
_CONTRAST = 24.0  # between the two shades of a pattern, at least
_TINT = 12.0  # how far a background's red, green and blue lie apart


def _circle(x: Plane, y: Plane, r: Plane) -> Plane:
    return np.sqrt(x * x + y * y) - r


def _square(x: Plane, y: Plane, r: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - 0.84 * r


def _diamond(x: Plane, y: Plane, r: Plane) -> Plane:
    return (np.abs(x) + np.abs(y) - 1.08 * r) * math.sqrt(0.5)


def _cross(x: Plane, y: Plane, r: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.33 * r, np.maximum(x, y) - r)


def _triangle(x: Plane, y: Plane, r: Plane) -> Plane:
    # Upright, from -r at the tip to 0.8 r at the base, which is 1.9 r wide.
    slope_x, slope_y = 1.8, 0.95
    side = (np.abs(x) * slope_x - (y + r) * slope_y) / math.hypot(slope_x, slope_y)
    return np.maximum(side, y - 0.8 * r)


def _star(x: Plane, y: Plane, r: Plane) -> Plane:
    # Five points: fold the plane onto one half of a point, where the outline is a single straight edge
    # (after Inigo Quilez, "2D distance functions", sdStar5).
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = np.abs(x), -y * np.ones_like(x)
    for kx, ky in ((cos, -sin), (-cos, -sin)):
        beyond = 2.0 * np.maximum(kx * x + ky * y, 0.0)
        x, y = x - beyond * kx, y - beyond * ky
    x, y = np.abs(x), y - 1.05 * r
    inner = 0.5  # radius of the notches, of the tips' radius
    edge_x, edge_y = inner * sin, inner * cos - 1.0
    return (y * edge_x - x * edge_y) / math.hypot(edge_x, edge_y)


OUTLINES: dict[str, Callable[[Plane, Plane, Plane], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "star": _star,
}


def draw_object(frames: np.ndarray, plan: ObjectPlan, times_s: np.ndarray) -> None:
    """Draw an object into those frames in which it is there.

    Args:
        frames: (T, S, S, 3) uint8, changed in place.
        plan: The object.
        times_s: (T,) float64, the frames' times.
    """
    index = np.flatnonzero(plan.alive(times_s))
    if not index.size:
        return
    size_px = frames.shape[1]
    times_s = times_s[index]
    x, y = (centre * size_px - 0.5 for centre in plan.position(times_s))  # pixel centres lie on whole numbers
    r = plan.radius(times_s) * size_px
    side = min(size_px, 2 * math.ceil(plan.radius_max * 1.1 * size_px) + 3)
    left = np.clip(np.rint(x).astype(np.int64) - side // 2, 0, size_px - side)
    top = np.clip(np.rint(y).astype(np.int64) - side // 2, 0, size_px - side)
    cols, rows = left[:, None] + np.arange(side), top[:, None] + np.arange(side)  # (n, side)
    dx = (cols - x[:, None]).astype(np.float32)[:, None, :]
    dy = (rows - y[:, None]).astype(np.float32)[:, :, None]
    distance = OUTLINES[plan.shape](dx, dy, r.astype(np.float32)[:, None, None])
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]  # (n, side, side, 1)
    at = (index[:, None, None], rows[:, :, None], cols[:, None, :])
    under = frames[at]
    frames[at] = np.rint(under + (_colours(plan, times_s)[:, None, None, :] - under) * cover).astype(np.uint8)


def _colours(plan: ObjectPlan, times_s: np.ndarray) -> np.ndarray:
    """Return the object's colour at (n,) times: (n, 3) float32."""
    look = plan.events[0].look
    assert look is not None
    changes = [e for e in plan.events if e.kind == "changes colour"]
    palette = np.array([COLOURS[look.colour], *(COLOURS[e.after] for e in changes)], np.float32)
    return palette[np.searchsorted([e.t_s for e in changes], times_s, side="right")]


def draw_background(spec: ShapesSpec, scene: int, size_px: int) -> np.ndarray:
    """Return one scene's background: (S, S, 3) uint8, the same picture at every size."""
    dice = Dice(spec.seed, scene, _BACKGROUND_SALT)
    kind = dice.choice(("plain", "gradient", "texture", "checker"))
    if spec.background != "mixed":
        kind = spec.background
    darker = dice.between(_DARK, _BRIGHT - _CONTRAST)
    ends = [_shade(dice, darker), _shade(dice, dice.between(darker + _CONTRAST, _BRIGHT))]
    weight = _PATTERNS[kind](dice, size_px)[..., None]  # (S, S, 1) in [0, 1]
    return np.rint(ends[0] + (ends[1] - ends[0]) * weight).astype(np.uint8)


def _shade(dice: Dice, brightness: float) -> np.ndarray:
    """Return a grey with a tint: (3,) float64."""
    return brightness + (dice.units(3) - 0.5) * _TINT


def _coordinates(size_px: int) -> tuple[np.ndarray, np.ndarray]:
    u = (np.arange(size_px) + 0.5) / size_px
    return u[None, :], u[:, None]


def _plain(dice: Dice, size_px: int) -> np.ndarray:
    return np.zeros((size_px, size_px))


def _gradient(dice: Dice, size_px: int) -> np.ndarray:
    angle = dice.between(0.0, 2.0 * math.pi)
    x, y = _coordinates(size_px)
    along = math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5)
    return np.clip(along / math.sqrt(2.0) + 0.5, 0.0, 1.0)


def _checker(dice: Dice, size_px: int) -> np.ndarray:
    across = dice.integer(3, 8)
    x, y = _coordinates(size_px)
    return ((np.floor(x * across) + np.floor(y * across)) % 2.0).astype(np.float64)


def _texture(dice: Dice, size_px: int) -> np.ndarray:
    """Return noise of three scales, each a grid of random values with straight lines between them."""
    total = np.zeros((size_px, size_px))
    for cells, strength in ((4, 0.5), (9, 0.3), (23, 0.2)):
        knots = dice.units((cells + 1) ** 2).reshape(cells + 1, cells + 1)
        at = (np.arange(size_px) + 0.5) / size_px * cells
        low = np.minimum(at.astype(np.int64), cells - 1)
        part = at - low
        rows = knots[low] * (1.0 - part[:, None]) + knots[low + 1] * part[:, None]  # (S, cells + 1)
        total += strength * (rows[:, low] * (1.0 - part) + rows[:, low + 1] * part)
    return np.clip((total - 0.5) * 1.8 + 0.5, 0.0, 1.0)


_PATTERNS = {"plain": _plain, "gradient": _gradient, "texture": _texture, "checker": _checker}
