"""What a window of the world of shapes shows: a caption, and the facts that questions can be asked about.

The truth of a window says only what its frames can show. What happens within `margin_s` of either end of the window
may fall between the sampled frames there, so it counts as having happened before the window, or as not happening in
it; the default of one second holds at least two frames at 2 fps. `WindowTruth.edge_events` names what was left out
in this way, and `clear` says that there was nothing to leave out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .shapes_spec import BACKGROUND_CHANGES, STILL, Event, Look, ObjectPlan, changed_look, changed_motion

MARGIN_S = 1.0  # two sampled frames at 2 fps


@dataclass(frozen=True)
class ObjectFacts:
    """One object, as far as a window shows it. Pairs and lists are in order of time."""

    object_id: int
    look: Look  # when it is first seen in the window: what the caption calls it
    last_look: Look
    needle: bool
    speed: str  # slow or fast; still for one that does not move in the window
    motions: tuple[str, ...]  # directions, and "still": first the one it has when first seen
    colours: tuple[str, ...]
    sizes: tuple[str, ...]
    appears: bool
    leaves: bool
    place: str  # where it is first seen, from `place_of`
    x: float  # the same as a fraction of the frame
    y: float
    events: tuple[Event, ...]

    @property
    def clause(self) -> str:
        """Return the caption's part for this object, such as "a large red circle moves right, then stops"."""
        first = [*(["appears"] if self.appears else []), *self._initial_motion()]
        rest = [_phrase(e) for e in self.events if e.kind != "appears"]
        actions = [" and ".join(first), *rest] if first else rest
        return f"a {self.look} {', then '.join(actions)}"

    def _initial_motion(self) -> list[str]:
        if self.motions == (STILL,):
            return ["stays still"]
        return [] if self.motions[0] == STILL else [f"moves {self.motions[0]}"]


@dataclass(frozen=True)
class WindowTruth:
    """What happens in [start_s, stop_s), and can be told from its frames."""

    start_s: float
    stop_s: float
    objects: tuple[ObjectFacts, ...]  # first those there at the start, from left to right, then as they appear
    events: tuple[Event, ...]  # in order of time
    edge_events: tuple[Event, ...]  # too near to an end of the window to be in the truth

    @property
    def clear(self) -> bool:
        """Whether nothing happens so near to an end of the window that frames may or may not show it."""
        return not self.edge_events

    @property
    def caption(self) -> str:
        """Return one sentence for the window, the same for the same truth: objects in order, joined with "; "."""
        clauses = [facts.clause for facts in self.objects] or ["nothing is there"]
        if any(e.kind == BACKGROUND_CHANGES for e in self.events):
            clauses.append("the background changes")
        return "; ".join(clauses)

    def needles(self) -> tuple[ObjectFacts, ...]:
        """Return the needles among the objects."""
        return tuple(facts for facts in self.objects if facts.needle)


def window_truth(
    plans: Iterable[ObjectPlan],
    background_events: Iterable[Event],
    start_s: float,
    stop_s: float,
    margin_s: float = MARGIN_S,
) -> WindowTruth:
    """Work out a window's truth from the plans of all episodes that it touches.

    Args:
        plans: Objects, also such as are not seen in the window.
        background_events: Changes of the background, likewise.
        start_s: Begin of the window, included.
        stop_s: Its end, not included.
        margin_s: How near to an end of the window an event is left out.

    Raises:
        ValueError: If the window is empty or the margin negative.
    """
    if not start_s < stop_s or margin_s < 0:
        raise ValueError(
            f"window of shapes: got [{start_s}, {stop_s}) with a margin of {margin_s} s,"
            " expected start < stop and margin >= 0"
        )
    inner = (min(start_s + margin_s, stop_s), max(stop_s - margin_s, start_s))
    plans = tuple(plans)
    told = [e for plan in plans for e in plan.events] + list(background_events)
    told = sorted((e for e in told if start_s <= e.t_s < stop_s), key=_in_order)
    inside = tuple(e for e in told if inner[0] <= e.t_s <= inner[1])
    outside = tuple(e for e in told if not inner[0] <= e.t_s <= inner[1])
    facts = [f for plan in plans if (f := _object_facts(plan, *inner)) is not None]
    facts.sort(key=lambda f: (f.events[0].t_s if f.appears else -1.0, f.x, f.object_id))
    return WindowTruth(start_s, stop_s, tuple(facts), inside, outside)


def _in_order(event: Event) -> tuple[float, int]:
    return event.t_s, event.object_id


def _object_facts(plan: ObjectPlan, begin_s: float, end_s: float) -> ObjectFacts | None:
    """Tell an object's life between two times, or None if it is not there."""
    if plan.leaves_s < begin_s or plan.appears_s > end_s or begin_s > end_s:
        return None
    look, motion = plan.events[0].look, plan.events[0].after
    assert look is not None
    seen: list[Event] = []
    for event in plan.events:
        if begin_s <= event.t_s <= end_s:
            seen.append(event)
        elif event.t_s < begin_s:
            look, motion = changed_look(look, event), changed_motion(motion, event)
    last_look, looks, motions = look, [look], [motion]
    for event in seen:
        last_look = changed_look(last_look, event)
        looks.append(last_look)
        motions.append(changed_motion(motions[-1], event))
    first_s = max(begin_s, plan.appears_s)
    state = plan.state_at(first_s)
    told_motions = _without_repeats(motions)
    return ObjectFacts(
        object_id=plan.object_id,
        look=look,
        last_look=last_look,
        needle=plan.needle,
        speed=STILL if told_motions == (STILL,) else plan.speed,
        motions=told_motions,
        colours=_without_repeats([each.colour for each in looks]),
        sizes=_without_repeats([each.size for each in looks]),
        appears=any(e.kind == "appears" for e in seen),
        leaves=any(e.kind == "leaves" for e in seen),
        place=state.place,
        x=state.x,
        y=state.y,
        events=tuple(seen),
    )


def _without_repeats(items: list[str]) -> tuple[str, ...]:
    return tuple(item for i, item in enumerate(items) if i == 0 or item != items[i - 1])


def _phrase(event: Event) -> str:
    if event.kind in ("starts moving", "turns"):
        return f"{event.kind} {event.after}"
    return f"changes to {event.after}" if event.kind == "changes colour" else event.kind
