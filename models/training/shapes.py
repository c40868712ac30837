"""An endless world of coloured shapes with its truth beside it: the demo feed, and what the small model learns from.

Shapes appear, move, turn, change colour or size, and leave, on plain or textured backgrounds. A world is a pure
function of (spec, time): any frame can be had at once, in any order, at any size, and so can the truth of any window.

    >>> world = ShapesWorld(ShapesSpec(seed=3, size_px=64))
    >>> world.render(3600.0).shape
    (64, 64, 3)
    >>> isinstance(world.truth(3600.0, 3610.0).caption, str)
    True
"""

from __future__ import annotations

import itertools
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from .shapes_draw import draw_background, draw_object
from .shapes_plan import plan_episode
from .shapes_spec import BACKGROUND_CHANGES, BACKGROUNDS, EDGES, Event, Look, ObjectPlan, ObjectState, ShapesSpec
from .shapes_truth import MARGIN_S, ObjectFacts, WindowTruth, window_truth

__all__ = [
    "MARGIN_S",
    "Event",
    "Look",
    "ObjectFacts",
    "ObjectState",
    "ShapesSpec",
    "ShapesWorld",
    "WindowTruth",
    "parse_shapes_url",
]

K = TypeVar("K")
V = TypeVar("V")

_EPISODES_KEPT = 512  # plans in memory, a few kB each: a window of two hours
_BACKGROUNDS_KEPT = 8  # pictures in memory, 0.2 MB each at 256 px
_WORLD_END_S = 1e9  # 31 years; times stay exact to the millisecond well beyond


class ShapesWorld:
    """An endless world of shapes. Holds nothing but caches, so threads may each have their own at no cost."""

    def __init__(self, spec: ShapesSpec):
        self.spec = spec
        self._plans: OrderedDict[int, tuple[ObjectPlan, ...]] = OrderedDict()
        self._backgrounds: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def render(self, t_s: float, size_px: int | None = None) -> np.ndarray:
        """Draw the frame of one moment.

        Args:
            t_s: Seconds since the world began, in [0, 1e9).
            size_px: Height and width, by default the spec's.

        Returns:
            (S, S, 3) uint8 RGB, the same whatever was drawn before.

        Raises:
            ValueError: If the time lies outside of the world.
        """
        return self.render_many([t_s], size_px)[0]

    def render_many(self, times_s: Sequence[float] | np.ndarray, size_px: int | None = None) -> np.ndarray:
        """Draw the frames of many moments, in any order: (T, S, S, 3) uint8 RGB. Raises as `render` does."""
        times = np.asarray(times_s, np.float64)
        size_px = size_px or self.spec.size_px
        frames = np.empty((len(times), size_px, size_px, 3), np.uint8)
        episodes = self._episodes_of(times)
        for episode in np.unique(episodes).tolist():
            index = np.flatnonzero(episodes == episode)
            part = np.repeat(self._background(self._scene_of(episode), size_px)[None], len(index), axis=0)
            for plan in self._episode(episode):
                draw_object(part, plan, times[index])
            frames[index] = part
        return frames

    def frames(self, fps: float, start_s: float = 0.0, stop_s: float | None = None) -> Iterator[np.ndarray]:
        """Draw frame after frame: frame i, (S, S, 3) uint8 RGB, is that of `start_s + i / fps`, up to `stop_s`."""
        if not fps > 0:
            raise ValueError(f"frames of shapes: got {fps} frames a second, expected more than 0")
        for i in itertools.count():
            t_s = start_s + i / fps
            if stop_s is not None and t_s >= stop_s:
                return
            yield self.render(t_s)

    def objects_at(self, t_s: float) -> list[ObjectState]:
        """Return what is there at one moment, from left to right."""
        (episode,) = self._episodes_of(np.array([t_s])).tolist()
        there = [p.state_at(t_s) for p in self._episode(episode) if p.appears_s <= t_s < p.leaves_s]
        return sorted(there, key=lambda state: (state.x, state.object_id))

    def events(self, start_s: float, stop_s: float) -> list[Event]:
        """Return all that happens in [start_s, stop_s), in order of time."""
        plans, changes = self._between(start_s, stop_s)
        told = [*changes, *(event for plan in plans for event in plan.events)]
        return sorted((e for e in told if start_s <= e.t_s < stop_s), key=lambda e: (e.t_s, e.object_id))

    def truth(self, start_s: float, stop_s: float, margin_s: float = MARGIN_S) -> WindowTruth:
        """Return what frames of [start_s, stop_s) show; see `shapes_truth` on what is left out near its ends."""
        plans, changes = self._between(start_s, stop_s)
        return window_truth(plans, changes, start_s, stop_s, margin_s)

    def truth_lines(self, start_s: float, stop_s: float | None, window_s: float) -> Iterator[str]:
        """Tell events and windows as lines of JSON, in order, without end where `stop_s` is None.

        Windows start at multiples of `window_s`, the first one holds `start_s`, and only whole windows that end by
        `stop_s` are told. A window's line follows those of the events in it, so that a live feed can write the lines
        up to a window's end as it passes. Times are seconds since the world began.
        """
        if not window_s > 0:
            raise ValueError(f"truth of shapes: got windows of {window_s} s, expected more than 0")
        for i in itertools.count(math.floor(start_s / window_s + 1e-9)):
            begin_s, end_s = round(i * window_s, 6), round((i + 1) * window_s, 6)
            if stop_s is not None and begin_s >= stop_s:
                return
            last_s = end_s if stop_s is None else min(end_s, stop_s)
            for event in self.events(max(begin_s, start_s), last_s):
                yield json.dumps(_event_record(event))
            if begin_s >= start_s and last_s == end_s:
                yield json.dumps(_window_record(self.truth(begin_s, end_s)))

    def write_truth(self, path: str | Path, start_s: float, stop_s: float, window_s: float) -> int:
        """Write `truth_lines` to a file, which it replaces; return the number of lines."""
        lines = list(self.truth_lines(start_s, stop_s, window_s))
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return len(lines)

    def _episodes_of(self, times_s: np.ndarray) -> np.ndarray:
        outside = ~((times_s >= 0.0) & (times_s < _WORLD_END_S))
        if outside.any():
            raise ValueError(
                f"time in a world of shapes: got {times_s[outside][0]} s, expected 0 to {_WORLD_END_S:g} s"
            )
        return np.floor(times_s / self.spec.episode_s).astype(np.int64)

    def _scene_of(self, episode: int) -> int:
        return episode // self.spec.scene_episodes if self.spec.scene_episodes else 0

    def _episode(self, episode: int) -> tuple[ObjectPlan, ...]:
        return _remember(self._plans, episode, lambda: plan_episode(self.spec, episode), _EPISODES_KEPT)

    def _background(self, scene: int, size_px: int) -> np.ndarray:
        draw = lambda: draw_background(self.spec, scene, size_px)  # noqa: E731
        return _remember(self._backgrounds, (scene, size_px), draw, _BACKGROUNDS_KEPT)

    def _between(self, start_s: float, stop_s: float) -> tuple[list[ObjectPlan], list[Event]]:
        """Return all objects of the episodes that a window touches, and the background's changes in them."""
        first, last = self._episodes_of(np.array([start_s, min(stop_s, _WORLD_END_S - 1.0)])).tolist()
        plans = [plan for episode in range(first, last + 1) for plan in self._episode(episode)]
        changes = [
            Event(round(episode * self.spec.episode_s, 3), BACKGROUND_CHANGES, -1, None)
            for episode in range(max(first, 1), last + 1)
            if self._scene_of(episode) != self._scene_of(episode - 1)
        ]
        return plans, changes


def _remember(kept: OrderedDict[K, V], key: K, make: Callable[[], V], most: int) -> V:
    """Return what is kept under a key, made if need be, and forget the least recently used beyond `most`."""
    if key not in kept:
        kept[key] = make()
        if len(kept) > most:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def _event_record(event: Event) -> dict[str, Any]:
    record: dict[str, Any] = {"type": "event", "t_s": event.t_s, "text": event.text, "kind": event.kind}
    if event.look is not None:
        record |= {"object_id": event.object_id, "object": str(event.look), "place": event.place}
        record |= {"before": event.before, "after": event.after, "needle": event.needle}
    return record


def _window_record(truth: WindowTruth) -> dict[str, Any]:
    return {
        "type": "window",
        "start_s": truth.start_s,
        "stop_s": truth.stop_s,
        "caption": truth.caption,
        "clear": truth.clear,
        "objects": len(truth.objects),
        "needles": len(truth.needles()),
    }


def parse_shapes_url(url: str) -> tuple[ShapesSpec, float, float | None]:
    """Read a world, a frame rate and a duration from a URL.

    All of its parts may be left out: ``shapes:?seed=1&size=256&fps=10&duration=60&background=texture&objects=1-3
    &changes=0-2&episode=12&scene=5&edges=leave&still=0.25&needles=0.5``. Durations are seconds, also as ``90s``,
    ``10m`` or ``2h``.

    Returns:
        The spec, frames a second (10 where not given), and seconds, or None for without end.

    Raises:
        ValueError: If it is no such URL, or a key or a value is not known. The message names the choices.
    """
    parts = urlsplit(url)
    if parts.scheme != "shapes" or parts.netloc or parts.path or parts.fragment:
        raise ValueError(f"shapes URL: got {url!r}, expected shapes:?key=value&… such as shapes:?seed=1&fps=10")
    fields: dict[str, Any] = {}
    for key, text in parse_qsl(parts.query, keep_blank_values=True):
        if key not in _URL_KEYS:
            raise ValueError(f"shapes URL {url!r}: unknown key {key!r}, expected one of {', '.join(_URL_KEYS)}")
        name, read, expected = _URL_KEYS[key]
        if name in fields:
            raise ValueError(f"shapes URL {url!r}: {key} is given twice")
        try:
            fields[name] = read(text)
        except ValueError:
            raise ValueError(f"shapes URL {url!r}: {key} got {text!r}, expected {expected}") from None
    fps, duration_s = fields.pop("fps", 10.0), fields.pop("duration", None)
    return ShapesSpec(**fields), fps, duration_s


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise ValueError(text)
    return value


def _duration_s(text: str) -> float:
    unit_s = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    return _positive(text[:-1]) * unit_s if unit_s else _positive(text)


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return read


_URL_KEYS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "seed": ("seed", int, "a whole number"),
    "size": ("size_px", int, "pixels, such as 256"),
    "fps": ("fps", _positive, "frames a second, such as 10"),
    "duration": ("duration", _duration_s, "a duration such as 90s, 10m or 2h"),
    "background": ("background", _one_of(BACKGROUNDS), f"one of {', '.join(BACKGROUNDS)}"),
    "objects": ("n_objects", _span, "a number or a range such as 1-3"),
    "changes": ("n_changes", _span, "a number or a range such as 0-2"),
    "episode": ("episode_s", _duration_s, "a duration such as 12s"),
    "scene": ("scene_episodes", int, "a number of episodes, 0 for one background for ever"),
    "edges": ("edges", _one_of(EDGES), f"one of {', '.join(EDGES)}"),
    "still": ("still_share", float, "a share, 0 to 1"),
    "needles": ("needles_per_min", float, "needles a minute, such as 0.5"),
}
