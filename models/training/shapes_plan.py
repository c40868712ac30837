"""What happens in one episode of the world of shapes: who is there, where they go and what they do, and when.

An episode is a pure function of (spec, index), drawn from a counter-based generator keyed with both, so that any
moment of an endless world is reached without the moments before it. Every object lives inside its episode. Its life
is drafted first (times, directions, changes) in coordinates relative to its start; then a start is looked for at
which it stays in the frame and never touches another object. That is what makes a caption checkable: no object
hides another, none leaves by accident, and what one object does is at least `MIN_PHASE_S` apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from .shapes_spec import (
    COLOURS,
    DIRECTIONS,
    MIN_PHASE_S,
    NEEDLE_SHAPE,
    RADIUS,
    RESIZE_S,
    SHAPES,
    SIZES,
    SPEEDS,
    STILL,
    WALL,
    Edges,
    Event,
    Look,
    ObjectPlan,
    ShapesSpec,
    changed_look,
    direction_of,
    fold,
    place_of,
)

T = TypeVar("T")

SEPARATION_S = 0.6  # wished between events of different objects: more than one frame at 2 fps, so that order shows
CLEARANCE = 0.02  # kept free between two objects
CORNER = 1.13  # a square's corner reaches this much further than its radius
_N_DRAFTS = 16  # lives tried for an object before it is given up
_N_STARTS = 64  # places tried for each of them
_GRID_S = 0.1  # spacing of the times at which objects are kept apart


class Dice:
    """Random choices that depend on (seed, index, salt) alone, on any machine and any version of numpy."""

    def __init__(self, seed: int, index: int, salt: int = 0):
        # Philox is counter-based: a key opens its stream at once. Its raw output is guaranteed to stay the same.
        self._bits = np.random.Philox(key=np.array([seed, index | salt << 56], np.uint64))
        self._drawn: list[float] = []

    def unit(self) -> float:
        """Return a number in [0, 1)."""
        if not self._drawn:
            self._drawn = self.units(64).tolist()
        return self._drawn.pop()

    def units(self, n: int) -> np.ndarray:
        """Return (n,) numbers in [0, 1)."""
        return (self._bits.random_raw(n) >> np.uint64(11)) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * self.unit()

    def integer(self, low: int, high: int) -> int:
        """Return a whole number in [low, high], both included."""
        return low + int(self.unit() * (high - low + 1))

    def choice(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[int(self.unit() * len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """Return all of the options in a random order."""
        return [options[i] for i in np.argsort(self.units(len(options)), kind="stable")]


def plan_episode(spec: ShapesSpec, index: int) -> tuple[ObjectPlan, ...]:
    """Plan the objects of one episode, in absolute time.

    Args:
        spec: The world.
        index: The episode, from 0: it covers [index * episode_s, (index + 1) * episode_s).

    Returns:
        The objects, any needle first, none of which ever touches another.
    """
    dice = Dice(spec.seed, index)
    colours = dice.shuffled(tuple(COLOURS))  # each colour belongs to one object of an episode, so that it names it
    placed: list[ObjectPlan] = []
    if dice.unit() < spec.needles_per_min * spec.episode_s / 60.0:
        _place(placed, dice, spec, index, colours, needle=True)
    for _ in range(dice.integer(*spec.n_objects)):
        _place(placed, dice, spec, index, colours, needle=False)
    return tuple(placed)


def _place(
    placed: list[ObjectPlan], dice: Dice, spec: ShapesSpec, index: int, colours: list[str], *, needle: bool
) -> None:
    """Draft lives until one fits among the objects already placed, and add it; give up after `_N_DRAFTS`."""
    others = SHAPES if spec.needles_per_min == 0 else tuple(s for s in SHAPES if s != NEEDLE_SHAPE)
    look = Look(dice.choice(SIZES), colours.pop(), NEEDLE_SHAPE if needle else dice.choice(others))
    taken_s = [e.t_s for other in placed for e in other.events]
    # Chosen before it is known what fits, so that what fits most easily is not seen more often.
    still = needle or dice.unit() < spec.still_share
    direction = STILL if still else dice.choice(tuple(DIRECTIONS))
    for attempt in range(_N_DRAFTS):
        life = _Life(dice, spec, index * spec.episode_s, look, direction, colours, taken_s, needle=needle)
        crowded = any(abs(t - e[0]) < SEPARATION_S for t in taken_s for e in life.happenings)
        if crowded and attempt < _N_DRAFTS - 4:
            continue
        plans = (life.plan_at(start, index * 16 + len(placed)) for start in _free_starts(life, placed, dice))
        plan = next((plan for plan in plans if _is_unhurried(plan)), None)
        if plan is not None:
            colours[:] = [c for c in colours if all(c != e.after for e in plan.events)]
            placed.append(plan)
            return


def _is_unhurried(plan: ObjectPlan) -> bool:
    """Whether all that it does is far enough apart to be seen; only bouncing may make it otherwise."""
    return all(b.t_s - a.t_s > MIN_PHASE_S - 0.01 for a, b in itertools.pairwise(plan.events))


def _free_starts(life: _Life, placed: list[ObjectPlan], dice: Dice) -> list[tuple[float, float]]:
    """Return a few starts at which a drafted life keeps clear of all placed objects; often none."""
    (x_low, x_high), (y_low, y_high) = life.start_range()
    xs = x_low + (x_high - x_low) * dice.units(_N_STARTS)
    ys = y_low + (y_high - y_low) * dice.units(_N_STARTS)
    free = np.ones(_N_STARTS, bool)
    path, radii = np.array(life.path), np.array(life.radii)
    for other in placed:
        begin, end = max(path[0, 0], other.appears_s), min(path[-1, 0], other.leaves_s)
        if begin >= end:
            continue
        times = np.linspace(begin, end, 2 + int((end - begin) / _GRID_S))
        x = fold(xs[:, None] + np.interp(times, path[:, 0], path[:, 1]), life.radius_max, life.edges)
        y = fold(ys[:, None] + np.interp(times, path[:, 0], path[:, 2]), life.radius_max, life.edges)
        other_x, other_y = other.position(times)
        reach = CORNER * (np.interp(times, radii[:, 0], radii[:, 1]) + other.radius(times)) + CLEARANCE
        free &= ((x - other_x) ** 2 + (y - other_y) ** 2 > reach**2).all(axis=1)  # (_N_STARTS,)
    return [(float(xs[i]), float(ys[i])) for i in np.flatnonzero(free)[:8]]


class _Life:
    """A drafted life: times, directions and changes, in coordinates relative to a start that is yet to be found."""

    def __init__(
        self,
        dice: Dice,
        spec: ShapesSpec,
        origin_s: float,
        look: Look,
        direction: str,
        spare_colours: Sequence[str],
        taken_s: Sequence[float],
        *,
        needle: bool,
    ):
        self.dice, self.look, self.needle, self.taken_s = dice, look, needle, taken_s
        self.edges: Edges = "stay" if needle else spec.edges
        self.spare_colour = spare_colours[-1] if spare_colours else None
        self.wishes = [] if needle else self._wishes(dice.integer(*spec.n_changes))
        self.radius = RADIUS[look.size]
        self.radius_max = RADIUS["large"] if "size" in self.wishes else self.radius
        self.speed = dice.choice(tuple(SPEEDS))
        self.per_s = dice.between(*SPEEDS[self.speed])
        self.t_s, self.end_s = self._span(origin_s, spec.episode_s)
        self.direction = direction
        self.may_stop = spec.n_changes[1] > 0
        self.at, self.low, self.high = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
        self.exit_axis: int | None = None
        self.path = [(self.t_s, 0.0, 0.0)]
        self.radii = [(self.t_s, self.radius)]
        self.happenings: list[tuple[float, str, str, str]] = [(self.t_s, "appears", "", self.direction)]
        while not self._live_one_phase():
            pass
        self.happenings.append((self.t_s, "leaves", self.direction, ""))

    def _wishes(self, n: int) -> list[str]:
        options = ["motion", "motion", "size"] + (["colour"] if self.spare_colour else [])
        return self.dice.shuffled(options)[:n]

    def _span(self, origin_s: float, episode_s: float) -> tuple[float, float]:
        """Return when it appears, and when it has left at the latest, with 0.3 s between it and other episodes."""
        first_s, last_s = origin_s + 0.3, origin_s + episode_s - 0.3
        if self.needle:
            begin_s = self._moment(first_s, last_s - 4.0)
            return begin_s, self._moment(begin_s + 2.5, begin_s + 4.0)
        slack_s = max(0.0, last_s - first_s - MIN_PHASE_S * (len(self.wishes) + 2))
        late_s = 0.25 * slack_s + 0.5 * MIN_PHASE_S
        return self._moment(first_s, first_s + late_s), self._moment(last_s - late_s, last_s)

    def _moment(self, low_s: float, high_s: float) -> float:
        """Return a time between two, if a few tries find one then one at which nothing else happens."""
        t_s = low_s
        for _ in range(6):
            t_s = round(self.dice.between(low_s, high_s), 3)
            if all(abs(t_s - other_s) >= SEPARATION_S for other_s in self.taken_s):
                break
        return t_s

    def _length_s(self, low_s: float, high_s: float) -> float:
        """Return how long a phase lasts, so that it ends at such a moment."""
        return self._moment(self.t_s + low_s, self.t_s + max(low_s, high_s)) - self.t_s

    def _room(self, direction: str, axis: int) -> float:
        """Return how far it can go along one axis before its path no longer fits into the frame."""
        if self.edges in ("bounce", "wrap"):
            return math.inf
        free = 1.0 - 2.0 * (self.radius_max + WALL)
        towards = DIRECTIONS[direction][axis]
        return self.low[axis] + free - self.at[axis] if towards > 0 else self.at[axis] - self.high[axis] + free

    def _room_s(self, direction: str) -> float:
        """Return for how long it can go in a direction."""
        return min(
            self._room(direction, axis) / (abs(part) * self.per_s)
            for axis, part in enumerate(DIRECTIONS[direction])
            if part
        )

    def _live_one_phase(self) -> bool:
        """Go on until the next thing that it does, and do it. Return whether its life is over."""
        left_s = self.end_s - self.t_s
        if not self.wishes:
            return self._finish(left_s)
        slack_s = left_s - MIN_PHASE_S * (len(self.wishes) + 1)
        wish = self.wishes.pop(0)
        if slack_s < 0:  # the episode is too short for all that was wished
            return False
        longest_s = MIN_PHASE_S + slack_s / (len(self.wishes) + 1)
        if self.direction != STILL:
            room_s = self._room_s(self.direction) - (0.0 if wish == "motion" else MIN_PHASE_S)
            if room_s < MIN_PHASE_S:  # it would reach the wall before it could do that and be seen to go on
                return False
            longest_s = min(longest_s, room_s)
        self._advance(self._length_s(MIN_PHASE_S, longest_s))
        self._grant(wish)
        return False

    def _finish(self, left_s: float) -> bool:
        """Live the last phase: to the end of its span, to the wall, or out of the frame."""
        if self.direction == STILL:
            self._advance(left_s)
            return True
        if self.edges == "leave" and self.dice.unit() < 0.7 and self._leave_frame(left_s):
            return True
        room_s = self._room_s(self.direction)
        if self.may_stop and left_s - room_s > MIN_PHASE_S:  # rather than vanish early, in the middle of its way
            self._advance(self._length_s(max(MIN_PHASE_S, 0.6 * room_s), room_s))
            self._stop()
            return False
        self._advance(min(left_s, room_s))
        return True

    def _leave_frame(self, left_s: float) -> bool:
        """Go out through the edge ahead, if there is time to be seen going. Return whether it did."""
        axes = [axis for axis, part in enumerate(DIRECTIONS[self.direction]) if part]
        axis = self.dice.choice(axes)
        towards = DIRECTIONS[self.direction][axis]
        per_s = abs(towards) * self.per_s
        across = self.radius_max + WALL + self.radius  # from touching the wall to having left
        longest_s = (self._room(self.direction, axis) + across) / per_s
        for other in axes:
            if other != axis:
                longest_s = min(longest_s, self._room(self.direction, other) / per_s)
        been = self.high[axis] - self.at[axis] if towards > 0 else self.at[axis] - self.low[axis]
        shortest_s = max(MIN_PHASE_S, (been + across) / per_s, (across + 0.1) / per_s)  # past where it has been
        if min(left_s, longest_s) < shortest_s:
            return False
        self.exit_axis = axis
        self._advance(self._length_s(shortest_s, min(left_s, longest_s)))
        return True

    def _advance(self, length_s: float) -> None:
        until_s = round(self.t_s + length_s, 3)
        if self.direction != STILL:
            step = (until_s - self.t_s) * self.per_s
            for axis, part in enumerate(DIRECTIONS[self.direction]):
                self.at[axis] += step * part
                if self.exit_axis != axis:
                    self.low[axis] = min(self.low[axis], self.at[axis])
                    self.high[axis] = max(self.high[axis], self.at[axis])
        self.t_s = until_s
        self.path.append((until_s, self.at[0], self.at[1]))

    def _grant(self, wish: str) -> None:
        """Do what was wished, now."""
        if wish == "colour":
            assert self.spare_colour is not None
            self.happenings.append((self.t_s, "changes colour", self.look.colour, self.spare_colour))
        elif wish == "size":
            after = "large" if self.look.size == "small" else "small"
            self.radii += [(self.t_s, self.radius), (self.t_s + RESIZE_S, RADIUS[after])]
            self.radius = RADIUS[after]
            self.happenings.append((self.t_s, "grows" if after == "large" else "shrinks", self.look.size, after))
        elif self.direction != STILL and self.dice.unit() < 0.5:
            self._stop()
        else:
            before, self.direction = self.direction, self._new_direction()
            kind = "starts moving" if before == STILL else "turns"
            self.happenings.append((self.t_s, kind, before, self.direction))

    def _stop(self) -> None:
        self.happenings.append((self.t_s, "stops", self.direction, STILL))
        self.direction = STILL

    def _new_direction(self) -> str:
        there = DIRECTIONS.get(self.direction, (0.0, 0.0))
        sharp = [d for d, (x, y) in DIRECTIONS.items() if x * there[0] + y * there[1] < 0.1]  # 90 degrees or more
        return self.dice.choice([d for d in sharp if self._room_s(d) >= MIN_PHASE_S])  # never none: it can go back

    def start_range(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the ranges of x and of y from which the whole path fits into the frame, or ends just outside."""
        wall = self.radius_max + WALL
        if self.edges in ("bounce", "wrap"):
            return (wall, 1.0 - wall), (wall, 1.0 - wall)
        ranges = [(wall - self.low[axis], 1.0 - wall - self.high[axis]) for axis in (0, 1)]
        if self.exit_axis is not None:
            outward = DIRECTIONS[self.direction][self.exit_axis] > 0
            start = (1.0 + self.radius if outward else -self.radius) - self.at[self.exit_axis]
            ranges[self.exit_axis] = (start, start)
        return ranges[0], ranges[1]

    def plan_at(self, start: tuple[float, float], object_id: int) -> ObjectPlan:
        """Return the life as it is lived from a start, with what it meets at the frame's edges."""
        path = np.array(self.path) + np.array((0.0, *start))
        plan = ObjectPlan(
            object_id=object_id,
            shape=self.look.shape,
            speed=self.speed,
            needle=self.needle,
            appears_s=self.path[0][0],
            leaves_s=self.t_s,
            path=path,
            radii=np.array(self.radii),
            radius_max=self.radius_max,
            edges=self.edges,
        )
        happenings = _with_bounces(self.happenings, plan) if self.edges == "bounce" else self.happenings
        return _with_events(plan, self.look, happenings)


Happening = tuple[float, str, str, str]  # time, kind, before, after


def _with_events(plan: ObjectPlan, look: Look, happenings: Sequence[Happening]) -> ObjectPlan:
    """Return the plan with its happenings told as events: what it looked like, and where it was."""
    times = np.array([h[0] for h in happenings])
    xs, ys = plan.position(times)
    events = []
    for (t_s, kind, before, after), x, y in zip(happenings, xs, ys, strict=True):
        place = place_of(float(x), float(y))
        events.append(Event(t_s, kind, plan.object_id, look, before, after, place, plan.needle))
        look = changed_look(look, events[-1])
    return replace(plan, events=tuple(events))


def _with_bounces(happenings: Sequence[Happening], plan: ObjectPlan) -> list[Happening]:
    """Return the happenings with a turn for each bounce, and with the directions as they show after bouncing."""
    low, width = plan.radius_max + WALL, 1.0 - 2.0 * (plan.radius_max + WALL)
    bounces: list[tuple[float, int]] = []
    for (t0, *here), (t1, *there) in zip(plan.path[:-1], plan.path[1:], strict=True):
        for axis, (a, b) in enumerate(zip(here, there, strict=True)):
            k0, k1 = (a - low) / width, (b - low) / width
            for wall in range(math.floor(min(k0, k1)) + 1, math.ceil(max(k0, k1))):
                t_s = round(t0 + (t1 - t0) * (wall - k0) / (k1 - k0), 3)
                if plan.appears_s < t_s < plan.leaves_s:
                    bounces.append((t_s, axis))
    told: list[Happening] = []
    flip, direction = [1.0, 1.0], STILL
    for item in sorted([*bounces, *happenings], key=lambda item: item[0]):
        before = direction
        if len(item) == 2:
            flip[item[1]] *= -1.0
            direction = _flipped(before, [-1.0 if axis == item[1] else 1.0 for axis in (0, 1)])
            told.append((item[0], "turns", before, direction))
            continue
        t_s, kind, old, new = item
        if kind in ("appears", "starts moving", "stops", "turns"):
            direction = _flipped(new, flip)
            old, new = before if old else "", direction
        elif kind == "leaves":
            old = before
        told.append((t_s, kind, old, new))
    return told


def _flipped(direction: str, flip: Sequence[float]) -> str:
    if direction == STILL:
        return STILL
    x, y = DIRECTIONS[direction]
    return direction_of(x * flip[0], y * flip[1])
