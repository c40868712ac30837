"""Questions about a window of the world of shapes, with answers that follow from its truth.

Three families, after published benchmarks:

    ordered    TempCompass (arXiv 2403.00476): the same frames in another order have another answer
    needles    VNBench (arXiv 2406.09367): a star in a long, dull video: seen, colour, which first, how many
    alerts     yes or no, as many no as yes

and plain ones (is there, what colour, how many, which), when something happens, what an object does, and whole
captions.

That an ordered question needs the order holds by construction. Each offers two answers, and the clip played backwards
has the other one (`Question.reversed_answer`). Clips are asked about in both directions, so whoever sees the set of
frames but not their order is right exactly half the time, whatever the frames' positions or counts give away.

A question is only asked of what frames can show: about an object to which nothing happens within a second of the
window's ends, under a name that fits no other object seen in the window.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..processing import format_time
from .shapes import MARGIN_S, ObjectFacts, ShapesWorld, WindowTruth
from .shapes_spec import BACKGROUND_CHANGES, COLOURS, DIRECTIONS, NEEDLE_SHAPE, SHAPES, SIZES, STILL

CAPTION_PROMPT = "Describe what happens."
MIN_SEEN_S = 2.0  # how long an object must be seen for a question on its way: four frames at 2 fps
ORDER_GAP_S = 1.0  # between two things whose order is asked: two frames at 2 fps
TOLD_EVERY_S = 2.0  # the times that a prompt shows, from the window's begin: of each four frames at 2 fps
_CLEAR_OF_NEXT_S = 0.6  # how far a thing must be from both such times around it for the earlier one to be its time
_MOST_TOLD = 5  # objects in one answer
_DULL_BACKGROUND = 0.8  # share left out of windows whose background stays: about as many then have one that changes
CHANGES = ("turns", "stops", "starts moving", "changes colour", "grows", "shrinks")

ORDERED_KINDS = ("direction", "size change", "colour change", "presence", "stop or start", "first change")
NEEDLE_KINDS = ("needle seen", "needle colour", "needle first", "needle count")
PLAIN_KINDS = ("exists", "colour", "shape", "size", "count", "speed", "moves")
TOLD_KINDS = ("objects", "motion", "actions", "after", "when", "caption")
KINDS = (*ORDERED_KINDS, *NEEDLE_KINDS, *PLAIN_KINDS, *TOLD_KINDS, "alert", "background")
NAMED_ONLY = frozenset(("background",))  # came later: not asked by recipes that do not name them, as before
ORDER_NEEDED = frozenset((*ORDERED_KINDS, "needle first"))  # half right is all that a set of frames gives

_OPPOSITE = dict(zip(DIRECTIONS, [*list(DIRECTIONS)[4:], *list(DIRECTIONS)[:4]], strict=True))
_YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """One question with its answer."""

    kind: str  # one of KINDS
    prompt: str
    answer: str
    reversed_answer: str | None  # when the clip is played backwards; None where the truth does not tell
    options: tuple[str, ...] = ()  # what it offers; () where it is open
    topic: str = ""  # what answers are balanced within: the kind of event that an alert is about

    def __post_init__(self) -> None:
        if self.options and self.answer not in self.options:
            raise ValueError(f"question {self.prompt!r}: answer {self.answer!r} is none of its options {self.options}")


class WindowView:
    """What can be asked about [start_s, stop_s) of a world."""

    def __init__(self, world: ShapesWorld, start_s: float, stop_s: float):
        self.world, self.start_s, self.stop_s = world, start_s, stop_s
        self.needles_named = world.spec.needles_per_min > 0

    @cached_property
    def truth(self) -> WindowTruth:
        """Return what the frames show for sure."""
        return self.world.truth(self.start_s, self.stop_s, MARGIN_S)

    @cached_property
    def full(self) -> WindowTruth:
        """Return all that is there, also what only touches the window's ends."""
        return self.world.truth(self.start_s, self.stop_s, 0.0)

    @cached_property
    def clear_objects(self) -> list[ObjectFacts]:
        """Return the objects to which nothing happens near the window's ends: as the caption tells them."""
        full = {facts.object_id: facts for facts in self.full.objects}
        return [f for f in self.truth.objects if full[f.object_id].events == f.events]

    @cached_property
    def needles(self) -> list[ObjectFacts]:
        """Return the needles, if they come and go inside the window or show for sure; in order of time."""
        return sorted(self.full.needles(), key=lambda f: f.events[0].t_s if f.events else 0.0)

    def name(self, facts: ObjectFacts) -> str | None:
        """Return words that fit this object and no other one seen in the window, or None."""
        others = [f for f in self.full.objects if f.object_id != facts.object_id and f.look.shape == facts.look.shape]
        if len(facts.colours) > 1:
            return None if others else f"the {facts.look.shape}"
        if any(facts.look.colour in f.colours for f in others):
            return None
        return f"the {facts.look.colour} {facts.look.shape}"

    def seen_s(self, facts: ObjectFacts) -> float:
        """Return how long a clear object is seen in the window."""
        begin, end = self.start_s, self.stop_s
        for event in facts.events:
            begin = event.t_s if event.kind == "appears" else begin
            end = event.t_s if event.kind == "leaves" else end
        return end - begin

    def told_time(self, t_s: float | None, *, backwards: bool = False) -> str | None:
        """Return the time that a prompt shows last before a moment, or None where that is too near to another one."""
        if t_s is None:
            return None
        since_s = self.stop_s - t_s if backwards else t_s - self.start_s
        if not _CLEAR_OF_NEXT_S <= since_s % TOLD_EVERY_S <= TOLD_EVERY_S - _CLEAR_OF_NEXT_S:
            return None
        return format_time(since_s // TOLD_EVERY_S * TOLD_EVERY_S)

    def happens(self, kind: str) -> bool | None:
        """Tell whether something of this kind happens, or None where it is too near to the window's ends to tell."""
        if any(e.kind == kind for e in self.truth.events):
            return True
        return None if any(e.kind == kind for e in self.full.events) else False


def ask(
    view: WindowView,
    rng: np.random.Generator,
    n_questions: int,
    weights: Mapping[str, float],
    *,
    backwards: bool = False,
) -> list[Question]:
    """Ask about a window.

    Kinds that the window allows are drawn by weight, each at most once before any comes again, then a question of
    that kind. Yes and no come equally often wherever the window allows both.

    Args:
        view: The window.
        rng: Decides; the same state gives the same questions.
        n_questions: The most; a window in which little happens gives fewer.
        weights: Of kinds; those not named are not asked.
        backwards: Whether the clip is played backwards. Answers are then those to the reversed clip, and questions
            whose answer is not known then are left out.
    """
    pools: dict[str, list[Question]] = {}
    for kind, weight in weights.items():
        if weight > 0 and (found := _usable(kind, view, rng, backwards)):
            pools[kind] = found
    asked: list[Question] = []
    while pools and len(asked) < n_questions:
        round_kinds = list(pools)
        keys = rng.exponential(size=len(round_kinds)) / [weights[kind] for kind in round_kinds]
        for kind in [round_kinds[i] for i in np.argsort(keys)][: n_questions - len(asked)]:
            asked.append(pools[kind].pop(int(rng.integers(len(pools[kind])))))
            if not pools[kind]:
                del pools[kind]
    return asked


def _usable(kind: str, view: WindowView, rng: np.random.Generator, backwards: bool) -> list[Question]:
    found = _ASKERS[kind](view, rng)
    if not backwards:
        return found
    return [
        replace(q, answer=q.reversed_answer, reversed_answer=q.answer) for q in found if q.reversed_answer is not None
    ]


def _two(kind: str, prompt: str, answer: str, other: str, rng: np.random.Generator) -> Question:
    """Return an ordered question, `prompt` with places {a} and {b} for the two answers in a random order."""
    a, b = (answer, other) if rng.random() < 0.5 else (other, answer)
    return Question(kind, prompt.format(a=a, b=b), answer, other, (a, b))


def _named(view: WindowView) -> Iterator[tuple[ObjectFacts, str]]:
    for facts in view.clear_objects:
        name = view.name(facts)
        if name is not None:
            yield facts, name


def _ask_direction(view: WindowView, rng: np.random.Generator) -> list[Question]:
    return [
        _two("direction", f"Does {name} move {{a}} or {{b}}?", f.motions[0], _OPPOSITE[f.motions[0]], rng)
        for f, name in _named(view)
        if f.motions[0] != STILL and len(f.motions) == 1 and view.seen_s(f) >= MIN_SEEN_S
    ]


def _ask_size_change(view: WindowView, rng: np.random.Generator) -> list[Question]:
    asked = []
    for f, name in _named(view):
        if len(f.sizes) == 2:
            answer, other = ("grow", "shrink") if f.sizes[1] == "large" else ("shrink", "grow")
            asked.append(_two("size change", f"Does {name} {{a}} or {{b}}?", answer, other, rng))
    return asked


def _ask_colour_change(view: WindowView, rng: np.random.Generator) -> list[Question]:
    asked = []
    for f, name in _named(view):
        if len(f.colours) == 2:
            there, back = (f"from {a} to {b}" for a, b in (f.colours, f.colours[::-1]))
            asked.append(_two("colour change", f"Does {name} change {{a}} or {{b}}?", there, back, rng))
    return asked


def _ask_presence(view: WindowView, rng: np.random.Generator) -> list[Question]:
    asked = []
    for f, name in _named(view):
        if f.appears != f.leaves:
            answer, other = ("appear", "leave") if f.appears else ("leave", "appear")
            asked.append(_two("presence", f"Does {name} {{a}} or {{b}}?", answer, other, rng))
    return asked


def _ask_stop_or_start(view: WindowView, rng: np.random.Generator) -> list[Question]:
    asked = []
    for f, name in _named(view):
        if len(f.motions) == 2 and STILL in f.motions:
            answer, other = ("start", "stop") if f.motions[0] == STILL else ("stop", "start")
            asked.append(_two("stop or start", f"Does {name} {{a}} or {{b}} moving?", answer, other, rng))
    return asked


def _only_change_s(facts: ObjectFacts) -> float | None:
    """Return when an object changes, if it does so just once."""
    times = [e.t_s for e in facts.events if e.kind in CHANGES]
    return times[0] if len(times) == 1 else None


def _ask_first_change(view: WindowView, rng: np.random.Generator) -> list[Question]:
    changes = []
    for f, name in _named(view):
        if (t_s := _only_change_s(f)) is not None:
            changes.append((t_s, name))
    asked = []
    for (t0, first), (t1, second) in itertools.combinations(sorted(changes), 2):
        if t1 - t0 >= ORDER_GAP_S:
            asked.append(_two("first change", "Which changes first, {a} or {b}?", first, second, rng))
    return asked


def _ask_needle_seen(view: WindowView, rng: np.random.Generator) -> list[Question]:
    if not view.needles_named or (not view.truth.needles() and view.needles):
        return []
    answer = "yes" if view.needles else "no"
    return [Question("needle seen", f"Is there a {NEEDLE_SHAPE}?", answer, answer, _YES_NO)]


def _whole_needles(view: WindowView) -> list[ObjectFacts] | None:
    """Return the needles if all of them come and go inside the window, clear of its ends, else None."""
    if not view.needles_named or len(view.truth.needles()) != len(view.needles):
        return None
    return view.needles if all(f.appears and f.leaves for f in view.truth.needles()) else None


def _ask_needle_colour(view: WindowView, rng: np.random.Generator) -> list[Question]:
    if not view.needles_named or len(view.needles) != 1 or len(view.truth.needles()) != 1:
        return []
    colour = view.needles[0].look.colour
    return [Question("needle colour", f"What colour is the {NEEDLE_SHAPE}?", colour, colour)]


def _ask_needle_first(view: WindowView, rng: np.random.Generator) -> list[Question]:
    needles = _whole_needles(view)
    if needles is None or len(needles) < 2 or len({f.look.colour for f in needles}) < len(needles):
        return []
    pairs = [pair for pair in itertools.combinations(needles, 2)]
    first, second = pairs[int(rng.integers(len(pairs)))]
    a, b = f"the {first.look.colour} {NEEDLE_SHAPE}", f"the {second.look.colour} {NEEDLE_SHAPE}"
    return [_two("needle first", "Which is seen first, {a} or {b}?", a, b, rng)]


def _ask_needle_count(view: WindowView, rng: np.random.Generator) -> list[Question]:
    needles = _whole_needles(view)
    if needles is None or len(needles) > 4:
        return []
    # Most windows of a dull video have none or one; they are asked less, so that the answers are balanced.
    if len(needles) < 2 and rng.random() < 0.5:
        return []
    return [Question("needle count", f"How many {NEEDLE_SHAPE}s are seen?", str(len(needles)), str(len(needles)))]


def _ask_exists(view: WindowView, rng: np.random.Generator) -> list[Question]:
    there = {(colour, f.look.shape) for f in view.full.objects for colour in f.colours}
    clear = sorted({(f.look.colour, f.look.shape) for f in view.clear_objects if len(f.colours) == 1})
    if not clear:  # a yes is not possible, so there is no no either
        return []
    if rng.random() < 0.5:
        colour, shape = clear[int(rng.integers(len(clear)))]
        return [_plain("exists", f"Is there a {colour} {shape}?", "yes", _YES_NO)]
    colours, shapes = list(COLOURS), list(SHAPES)
    if rng.random() < 0.7:  # a near miss: right colour, wrong shape, or the other way round
        if rng.random() < 0.5:
            colours = sorted({colour for colour, _ in there})
        else:
            shapes = sorted({shape for _, shape in there})
    absent = [pair for pair in itertools.product(colours, shapes) if pair not in there]
    if not absent:
        return []
    colour, shape = absent[int(rng.integers(len(absent)))]
    return [_plain("exists", f"Is there a {colour} {shape}?", "no", _YES_NO)]


def _plain(kind: str, prompt: str, answer: str, options: tuple[str, ...] = ()) -> Question:
    return Question(kind, prompt, answer, answer, options)


def _ask_colour(view: WindowView, rng: np.random.Generator) -> list[Question]:
    shapes = [f.look.shape for f in view.full.objects]
    return [
        _plain("colour", f"What colour is the {f.look.shape}?", f.look.colour)
        for f in view.clear_objects
        if len(f.colours) == 1 and shapes.count(f.look.shape) == 1
    ]


def _ask_shape(view: WindowView, rng: np.random.Generator) -> list[Question]:
    colours = [colour for f in view.full.objects for colour in f.colours]
    return [
        _plain("shape", f"What shape is the {f.look.colour} one?", f.look.shape)
        for f in view.clear_objects
        if len(f.colours) == 1 and colours.count(f.look.colour) == 1
    ]


def _ask_size(view: WindowView, rng: np.random.Generator) -> list[Question]:
    return [
        _plain("size", f"Is {name} small or large?", f.look.size, SIZES)
        for f, name in _named(view)
        if len(f.sizes) == 1
    ]


def _ask_count(view: WindowView, rng: np.random.Generator) -> list[Question]:
    if len(view.full.objects) != len(view.truth.objects) or len(view.full.objects) > 6:
        return []
    return [_plain("count", "How many objects are seen?", str(len(view.full.objects)))]


def _ask_objects(view: WindowView, rng: np.random.Generator) -> list[Question]:
    """Ask for the objects' looks, in a caption's order: from left to right, then as they appear."""
    looks = [str(f.look) for f in view.truth.objects]
    if not looks or looks != [str(f.look) for f in view.full.objects] or len(looks) > _MOST_TOLD:
        return []
    if len(looks) == 1 and rng.random() < 0.5:  # one alone has no order
        return []
    return [Question("objects", "Which objects are seen?", "; ".join(f"a {look}" for look in looks), None)]


def _ask_speed(view: WindowView, rng: np.random.Generator) -> list[Question]:
    return [
        _plain("speed", f"Is {name} slow or fast?", f.speed, ("slow", "fast"))
        for f, name in _named(view)
        if f.motions[0] != STILL and len(f.motions) == 1 and view.seen_s(f) >= MIN_SEEN_S
    ]


def _ask_moves(view: WindowView, rng: np.random.Generator) -> list[Question]:
    return [
        _plain("moves", f"Does {name} move or stay still?", "stay still" if f.motions[0] == STILL else "move")
        for f, name in _named(view)
        if len(f.motions) == 1 and view.seen_s(f) >= MIN_SEEN_S
    ]


def _ask_motion(view: WindowView, rng: np.random.Generator) -> list[Question]:
    return [
        Question("motion", f"Which way does {name} move?", f.motions[0], _OPPOSITE[f.motions[0]])
        for f, name in _named(view)
        if f.motions[0] != STILL and len(f.motions) == 1 and view.seen_s(f) >= MIN_SEEN_S
    ]


def _ask_actions(view: WindowView, rng: np.random.Generator) -> list[Question]:
    return [
        Question("actions", f"What does {name} do?", f.clause.removeprefix(f"a {f.look} "), None)
        for f, name in _named(view)
    ]


def _ask_after(view: WindowView, rng: np.random.Generator) -> list[Question]:
    """Ask what an object does next; its changes' own words tell, so that it cannot be read off one frame."""
    asked = []
    for f, name in _named(view):
        for event, following in itertools.pairwise(f.events):
            done = event.text.removeprefix(f"the {event.look} ")
            told = following.text.removeprefix(f"the {following.look} ")
            if event.kind != "appears":
                asked.append(Question("after", f"What does {name} do after it {done}?", told, None))
    return asked


def _ask_when(view: WindowView, rng: np.random.Generator) -> list[Question]:
    """Ask for the time that the prompt shows last before something happens."""
    asked = []
    for f, name in _named(view):
        if (t_s := _only_change_s(f)) is not None:
            asked.append((f"When does {name} change?", t_s, t_s))
        came, went = ([e.t_s for e in f.events if e.kind == kind] for kind in ("appears", "leaves"))
        if came:
            asked.append((f"When does {name} appear?", came[0], went[0] if went else None))
        if went:
            asked.append((f"When does {name} leave?", went[0], came[0] if came else None))
    told = [(prompt, view.told_time(t_s), view.told_time(back_s, backwards=True)) for prompt, t_s, back_s in asked]
    return [Question("when", prompt, answer, back) for prompt, answer, back in told if answer is not None]


def _ask_caption(view: WindowView, rng: np.random.Generator) -> list[Question]:
    if not view.truth.clear or len(view.full.objects) > _MOST_TOLD:
        return []
    if not view.full.objects and rng.random() < 0.7:  # dull windows are many; this many are enough
        return []
    return [Question("caption", CAPTION_PROMPT, view.truth.caption, None)]


def _ask_alert(view: WindowView, rng: np.random.Generator) -> list[Question]:
    """Ask what a guard would; yes and no by the toss of a coin, among what the window allows."""
    asked: dict[str, list[Question]] = {"yes": [], "no": []}
    for kind, words in _ALERT_WORDS.items():
        happens = view.happens(kind)
        if happens is not None:
            answer = "yes" if happens else "no"
            same = answer if kind in ("turns", "changes colour") else None
            asked[answer].append(Question("alert", f"Does anything {words}?", answer, same, _YES_NO, kind))
    for f, name in _named(view):
        for kind, words in _ALERT_WORDS.items():
            answer = "yes" if any(e.kind == kind for e in f.events) else "no"
            asked[answer].append(Question("alert", f"Does {name} {words}?", answer, None, _YES_NO, kind))
    if not asked["yes"] or not asked["no"]:
        return []
    answer = "yes" if rng.random() < 0.5 else "no"
    return [asked[answer][int(rng.integers(len(asked[answer])))]]


def _ask_background(view: WindowView, rng: np.random.Generator) -> list[Question]:
    changes = view.happens(BACKGROUND_CHANGES)
    if changes is None or (not changes and rng.random() < _DULL_BACKGROUND):
        return []
    return [_plain("background", "Does the background change?", "yes" if changes else "no", _YES_NO)]


_ALERT_WORDS = {
    "appears": "appear",
    "leaves": "leave",
    "starts moving": "start moving",
    "stops": "stop",
    "turns": "turn",
    "changes colour": "change colour",
    "grows": "grow",
    "shrinks": "shrink",
}
_ASKERS: dict[str, Callable[[WindowView, np.random.Generator], list[Question]]] = {
    "direction": _ask_direction,
    "size change": _ask_size_change,
    "colour change": _ask_colour_change,
    "presence": _ask_presence,
    "stop or start": _ask_stop_or_start,
    "first change": _ask_first_change,
    "needle seen": _ask_needle_seen,
    "needle colour": _ask_needle_colour,
    "needle first": _ask_needle_first,
    "needle count": _ask_needle_count,
    "exists": _ask_exists,
    "colour": _ask_colour,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "objects": _ask_objects,
    "speed": _ask_speed,
    "moves": _ask_moves,
    "motion": _ask_motion,
    "actions": _ask_actions,
    "after": _ask_after,
    "when": _ask_when,
    "caption": _ask_caption,
    "alert": _ask_alert,
    "background": _ask_background,
}


def question_corpus(n_windows: int = 400, seed: int = 0) -> Iterator[str]:
    """Yield questions and answers of many windows, for learning a tokenizer; always the same ones."""
    from .clips import world_of

    # The words of those left out are all in the others.
    weights: dict[str, float] = {kind: 1.0 for kind in KINDS if kind not in ("when", "objects", "background")}
    for i in range(n_windows):
        world = world_of(seed + i, "needles" if i % 4 == 0 else "shapes")
        rng = np.random.default_rng([seed, i])
        for question in ask(WindowView(world, 20.0, 30.0), rng, 24, weights):
            yield question.prompt
            yield question.answer
    for words in itertools.product(SIZES, COLOURS, SHAPES):
        yield f"a {' '.join(words)} moves {' '.join(DIRECTIONS)}"


def exact(answer: str, truth: str) -> bool:
    """Tell whether an answer is the true one, but for case, spaces and a full stop."""
    return _folded(answer) == _folded(truth)


def caption_recall(answer: str, truth: str) -> float:
    """Return the share of a caption's clauses that an answer has, in any order, minus those it made up; 0 to 1."""
    said, true = _clauses(answer), _clauses(truth)
    common = sum(min(said.count(clause), true.count(clause)) for clause in set(true))
    return common / max(len(said), len(true))


def _clauses(caption: str) -> Sequence[str]:
    return [_folded(clause) for clause in caption.split(";")]


def _folded(text: str) -> str:
    return " ".join(text.lower().removesuffix(".").split())
