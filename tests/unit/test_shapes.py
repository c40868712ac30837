"""The world of shapes: what its truth says must be what its pixels show."""

from __future__ import annotations

import doctest
import json
import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from stormline.models.training import shapes
from stormline.models.training.shapes import ShapesSpec, ShapesWorld, parse_shapes_url
from stormline.models.training.shapes_plan import CLEARANCE, plan_episode
from stormline.models.training.shapes_spec import (
    COLOURS,
    DIRECTIONS,
    KINDS,
    MIN_PHASE_S,
    NEEDLE_SHAPE,
    SHAPES,
    SIZES,
)

FPS = 2.0


def colour_mask(frame: np.ndarray, colour: str) -> np.ndarray:
    """Return (H, W) bool: the pixels that have a colour of the palette, a little softened."""
    return np.abs(frame.astype(int) - COLOURS[colour]).max(axis=2) < 24


def centroid(mask: np.ndarray) -> tuple[float, float]:
    rows, cols = np.nonzero(mask)
    return (cols.mean() + 0.5) / mask.shape[1], (rows.mean() + 0.5) / mask.shape[0]


def window_frames(world: ShapesWorld, start_s: float, stop_s: float, size_px: int = 64) -> np.ndarray:
    return world.render_many(start_s + np.arange((stop_s - start_s) * FPS) / FPS, size_px)


def test_a_world_when_made_again_or_drawn_in_another_order_then_gives_the_same_pixels():
    spec = ShapesSpec(seed=7, size_px=48, scene_episodes=1)
    times = np.arange(0.0, 60.0, 0.7)
    shuffled = np.random.default_rng(0).permutation(len(times))

    whole = ShapesWorld(spec).render_many(times)
    other = ShapesWorld(spec)
    other.truth(500.0, 600.0)
    apart = np.stack([other.render(times[i]) for i in shuffled])

    assert whole.shape == (len(times), 48, 48, 3)
    assert whole.dtype == np.uint8
    assert np.array_equal(apart, whole[shuffled])
    assert not np.array_equal(whole, ShapesWorld(ShapesSpec(seed=8, size_px=48, scene_episodes=1)).render_many(times))


def test_a_world_far_away_in_time_is_reached_without_what_lies_before():
    world = ShapesWorld(ShapesSpec(seed=1, size_px=64))

    frames = world.render_many(5e8 + np.arange(24) / FPS)

    assert len(world._plans) <= 2
    assert len(np.unique(frames.reshape(24, -1), axis=0)) > 4  # something goes on there


def test_frames_come_at_their_times_and_end_before_stop():
    world = ShapesWorld(ShapesSpec(seed=2, size_px=32))

    frames = list(world.frames(fps=10.0, start_s=5.0, stop_s=6.0))

    assert np.array_equal(np.stack(frames), world.render_many([5.0 + i / 10.0 for i in range(10)]))
    assert len(list(islice(world.frames(fps=10.0), 25))) == 25  # without a stop, without end


@pytest.mark.parametrize("edges", ["leave", "stay", "bounce", "wrap"])
def test_objects_at_any_moment_have_their_colour_at_their_centre_and_lie_where_the_pixels_say(edges):
    world = ShapesWorld(ShapesSpec(seed=11, size_px=128, edges=edges, n_changes=(1, 3)))
    times = np.arange(0.0, 240.0, 1.7)
    seen = 0

    for t_s, frame in zip(times, world.render_many(times), strict=True):
        objects = world.objects_at(t_s)
        assert {c for c in COLOURS if colour_mask(frame, c).sum() > 60} <= {o.look.colour for o in objects}
        for each in objects:
            whole = all(each.radius <= v <= 1.0 - each.radius for v in (each.x, each.y))
            if not whole:
                assert edges in ("leave", "wrap")
                continue
            assert tuple(frame[int(each.y * 128), int(each.x * 128)]) == COLOURS[each.look.colour]
            x, y = centroid(colour_mask(frame, each.look.colour))
            assert abs(x - each.x) < 0.01
            assert abs(y - each.y) < 0.04  # a triangle's centroid lies below the middle of its height
            seen += 1

    assert seen > 100


@pytest.mark.parametrize("background", ["plain", "gradient", "texture", "checker"])
def test_backgrounds_are_never_taken_for_an_object(background):
    world = ShapesWorld(ShapesSpec(seed=3, background=background, scene_episodes=1, n_objects=(0, 0)))

    frames = world.render_many(np.arange(20) * 12.0, 64)

    assert not any(colour_mask(frame, colour).any() for frame in frames for colour in COLOURS)
    assert (frames.reshape(20, -1, 3).std(axis=1).max() > 1.0) == (background != "plain")


def test_a_small_object_is_at_least_ten_pixels_across_in_a_frame_of_64():
    world = ShapesWorld(ShapesSpec(seed=4, edges="stay"))
    times = np.arange(0.0, 400.0, 3.1)

    widths = {}
    for t_s, frame in zip(times, world.render_many(times, 64), strict=True):
        for each in world.objects_at(t_s):
            cols = np.flatnonzero((np.abs(frame.astype(int) - COLOURS[each.look.colour]).max(axis=2) < 90).any(axis=0))
            key = each.look.shape, each.look.size
            if each.radius in (0.095, 0.155):  # not while it grows or shrinks
                widths[key] = min(widths.get(key, 99), cols[-1] - cols[0] + 1)

    assert set(widths) == {(shape, size) for shape in SHAPES for size in SIZES}
    assert min(widths.values()) >= 10
    assert all(widths[shape, "large"] > 1.4 * widths[shape, "small"] for shape in SHAPES)


def test_a_windows_directions_are_those_in_which_the_pixels_move():
    world = ShapesWorld(ShapesSpec(seed=21, edges="stay", n_objects=(1, 2)))
    checked = Counter()

    for start_s in range(0, 1000, 10):
        truth = world.truth(start_s, start_s + 10)
        frames = window_frames(world, start_s, start_s + 10)
        for facts in truth.objects:
            alone = sum(facts.look.colour in f.colours for f in truth.objects) == 1
            if not alone or not truth.clear or len(facts.motions) != 1 or len(facts.colours) != 1:
                continue
            masks = [colour_mask(frame, facts.look.colour) for frame in frames]
            track = np.array([centroid(m) for m in masks if m.sum() > 30])
            dx, dy = track[-1] - track[0]
            if facts.motions == ("still",):
                assert math.hypot(dx, dy) < 0.02
                assert facts.speed == "still"
            else:
                assert math.hypot(dx, dy) > 0.03
                towards = DIRECTIONS[facts.motions[0]]
                assert (dx * towards[0] + dy * towards[1]) / math.hypot(dx, dy) > math.cos(math.pi / 12)
            checked[facts.motions[0]] += 1

    assert len(checked) == 9, checked
    assert sum(checked.values()) > 40


def test_a_windows_appearing_leaving_colours_and_sizes_are_those_of_its_pixels():
    world = ShapesWorld(ShapesSpec(seed=5, edges="stay", n_objects=(1, 2), n_changes=(1, 3), scene_episodes=0))
    checked = Counter()

    for start_s in range(0, 1000, 10):
        truth = world.truth(start_s, start_s + 10)
        if not truth.clear:
            continue
        frames = window_frames(world, start_s, start_s + 10)
        areas = {c: np.array([colour_mask(f, c).sum() for f in frames]) for c in COLOURS}
        assert {c for c, a in areas.items() if a.max() > 20} == {c for f in truth.objects for c in f.colours}
        shared = Counter(c for f in truth.objects for c in f.colours)
        for facts in truth.objects:
            if any(shared[c] > 1 for c in facts.colours):
                continue
            total = sum(areas[c] for c in facts.colours)
            assert facts.appears == (total[0] <= 20)
            assert facts.leaves == (total[-1] <= 20)
            first_seen = [int(np.argmax(areas[c] > 20)) for c in facts.colours]
            assert first_seen == sorted(first_seen)
            there = total[total > 20]
            grew = there[-1] / there[0]
            assert (grew > 1.8, grew < 0.55) == (
                facts.sizes == ("small", "large"),
                facts.sizes == ("large", "small"),
            )
            checked.update(e.kind for e in facts.events)

    assert min(checked[k] for k in ("appears", "leaves", "changes colour", "grows", "shrinks")) > 4, checked


@pytest.mark.parametrize("edges", ["leave", "stay", "bounce", "wrap"])
def test_objects_never_touch_and_leave_the_frame_only_where_they_may(edges):
    spec = ShapesSpec(seed=6, edges=edges, n_objects=(2, 4), n_changes=(0, 3), episode_s=14.0)
    together = 0

    for index in range(60):
        plans = plan_episode(spec, index)
        times = np.arange(index * 14.0, (index + 1) * 14.0, 0.05)
        for i, plan in enumerate(plans):
            assert index * 14.0 < plan.appears_s < plan.leaves_s < (index + 1) * 14.0
            x, y = plan.position(times)
            alive, radius = plan.alive(times), plan.radius(times)
            inside = (np.minimum(x, y) >= radius) & (np.maximum(x, y) <= 1.0 - radius)
            if edges in ("stay", "bounce"):
                assert inside[alive].all()
            elif edges == "leave":
                out_s = plan.events[-2].t_s  # on its last way it may leave, and then it is out when it is gone
                assert inside[alive & (times <= out_s)].all()
                gone = max(abs(x[alive][-1] - 0.5), abs(y[alive][-1] - 0.5)) > 0.5
                assert inside[alive].all() or gone
            for other in plans[:i]:
                both = alive & other.alive(times)
                other_x, other_y = other.position(times)
                gap = np.hypot(x - other_x, y - other_y) - radius - other.radius(times)
                together += both.any()
                assert not both.any() or gap[both].min() > 0.5 * CLEARANCE

    assert together > 60


def test_events_are_in_order_within_their_range_and_apart_for_one_object():
    world = ShapesWorld(ShapesSpec(seed=9, n_changes=(1, 4)))

    events = world.events(30.0, 900.0)

    assert [e.t_s for e in events] == sorted(e.t_s for e in events)
    assert all(30.0 <= e.t_s < 900.0 for e in events)
    assert {e.kind for e in events} == set(KINDS)
    parts = [*world.events(30.0, 471.3), *world.events(471.3, 900.0)]
    assert parts == events
    for object_id in {e.object_id for e in events if e.look}:
        times = np.array([e.t_s for e in events if e.object_id == object_id])
        assert not len(times) > 1 or np.diff(times).min() >= MIN_PHASE_S - 0.002


def test_bouncing_objects_turn_at_the_frames_edge_and_the_events_say_so():
    world = ShapesWorld(ShapesSpec(seed=10, edges="bounce"))
    turned = 0

    for event in world.events(0.0, 600.0):
        if event.kind != "turns":
            continue
        before, after = world.objects_at(event.t_s - 0.01), world.objects_at(event.t_s + 0.01)
        assert [o.direction for o in before if o.object_id == event.object_id] == [event.before]
        (state,) = [o for o in after if o.object_id == event.object_id]
        (later,) = [o for o in world.objects_at(event.t_s + 0.05) if o.object_id == event.object_id]
        dx, dy = later.x - state.x, later.y - state.y
        towards = DIRECTIONS[event.after]
        assert (dx * towards[0] + dy * towards[1]) / math.hypot(dx, dy) > 0.99
        turned += 1

    assert turned > 50


def test_an_event_near_a_windows_end_is_named_apart_and_not_in_its_truth():
    world = ShapesWorld(ShapesSpec(seed=12))
    event = next(e for e in world.events(20.0, 200.0) if e.kind == "appears")

    just_before = world.truth(event.t_s - 9.5, event.t_s + 0.5)
    just_after = world.truth(event.t_s - 0.5, event.t_s + 9.5)
    around = world.truth(event.t_s - 5.0, event.t_s + 5.0)

    assert event in just_before.edge_events
    assert all(f.object_id != event.object_id for f in just_before.objects)
    assert event in just_after.edge_events
    assert not just_after.clear
    assert [f.appears for f in just_after.objects if f.object_id == event.object_id] == [False]
    assert event in around.events
    assert [f.appears for f in around.objects if f.object_id == event.object_id] == [True]


def test_captions_use_a_closed_vocabulary_and_name_every_object_in_order():
    world = ShapesWorld(ShapesSpec(seed=13, n_changes=(0, 3)))
    verbs = "a appears and moves stays still then starts moving stops turns changes to grows shrinks leaves"
    words = {*verbs.split(), "nothing", "is", "there", "the", "background"}
    words |= {*COLOURS, *SHAPES, *SIZES, *DIRECTIONS}

    truths = [world.truth(s, s + 10.0) for s in range(3, 3003, 10)]

    said = {word.strip(",;") for truth in truths for word in truth.caption.split()}
    assert said <= words
    assert said >= words - {"nothing", "is", "there"}
    for truth in truths:
        named = [clause for clause in truth.caption.split("; ") if clause.startswith("a ")]
        assert [" ".join(c.replace(",", "").split()[1:4]) for c in named] == [str(f.look) for f in truth.objects]
        begun = [f.events[0].t_s for f in truth.objects if f.appears]
        assert begun == sorted(begun)


def test_a_caption_tells_one_known_window_word_for_word():
    world = ShapesWorld(ShapesSpec(seed=1))

    captions = [world.truth(s, s + 10.0).caption for s in (10, 50)]

    assert captions == [  # as seen in its frames
        "a small orange square moves left, then leaves; "
        "a small yellow cross appears and moves right, then grows; "
        "a large orange diamond appears and moves right, then shrinks, then leaves",
        "a large purple star moves up, then turns right, then leaves",
    ]


def test_the_examples_in_the_module_run():
    assert doctest.testmod(shapes).attempted == 3
    assert doctest.testmod(shapes).failed == 0


def test_directions_colours_and_shapes_are_balanced():
    events = [e for seed in range(10) for e in ShapesWorld(ShapesSpec(seed=seed)).events(0.0, 1200.0) if e.look]

    for counts in (
        Counter(e.after for e in events if e.kind == "appears" and e.after != "still"),
        Counter(e.look.colour for e in events if e.kind == "appears"),
        Counter(e.look.shape for e in events if e.kind == "appears"),
        Counter(e.look.size for e in events if e.kind == "appears"),
    ):
        mean = sum(counts.values()) / len(counts)
        assert all(0.8 * mean < n < 1.2 * mean for n in counts.values()), counts


def test_needles_are_rare_still_stars_and_nothing_else_is_a_star():
    spec = ShapesSpec(seed=14, n_objects=(1, 1), n_changes=(0, 0), still_share=1.0, episode_s=30.0, needles_per_min=0.5)
    world = ShapesWorld(spec)

    truth = world.truth(0.0, 3600.0)

    needles = truth.needles()
    assert 15 <= len(needles) <= 45  # 30 expected in an hour
    assert [f for f in truth.objects if f.look.shape == NEEDLE_SHAPE] == list(needles)
    for facts in needles:
        begin_s, end_s = facts.events[0].t_s, facts.events[-1].t_s
        assert 2.5 <= end_s - begin_s <= 4.0
        frames = world.render_many(np.arange(math.ceil(begin_s * FPS), math.ceil(end_s * FPS)) / FPS, 64)
        assert len(frames) >= 5
        assert all(colour_mask(frame, facts.look.colour).sum() > 25 for frame in frames)
    assert not ShapesWorld(ShapesSpec(seed=14)).truth(0.0, 600.0).needles()


def test_truth_when_written_then_holds_every_event_and_each_whole_window_in_order(tmp_path):
    world = ShapesWorld(ShapesSpec(seed=15))
    path = tmp_path / "truth.jsonl"

    n_lines = world.write_truth(path, 0.0, 65.0, window_s=10.0)

    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert n_lines == len(lines)
    windows = [r for r in records if r["type"] == "window"]
    assert [(r["start_s"], r["stop_s"]) for r in windows] == [(10.0 * i, 10.0 * i + 10.0) for i in range(6)]
    assert [r["caption"] for r in windows] == [world.truth(r["start_s"], r["stop_s"]).caption for r in windows]
    events = [r for r in records if r["type"] == "event"]
    assert [(r["t_s"], r["text"]) for r in events] == [(e.t_s, e.text) for e in world.events(0.0, 65.0)]
    ends = [r["t_s"] if r["type"] == "event" else r["stop_s"] for r in records]
    assert ends == sorted(ends)
    live = list(islice(world.truth_lines(0.0, None, window_s=10.0), 200))
    assert [json.loads(line)["type"] for line in live].count("window") > 20


def test_a_shapes_url_when_read_then_gives_the_world_it_describes():
    url = "shapes:?seed=3&size=128&fps=5&duration=2m&background=texture&objects=0-2&changes=1&needles=0.5&edges=wrap"

    spec, fps, duration_s = parse_shapes_url(url)

    assert spec == ShapesSpec(
        seed=3,
        size_px=128,
        background="texture",
        n_objects=(0, 2),
        n_changes=(1, 1),
        needles_per_min=0.5,
        edges="wrap",
    )
    assert (fps, duration_s) == (5.0, 120.0)
    assert parse_shapes_url("shapes:") == (ShapesSpec(), 10.0, None)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("shapes:?sed=1", "unknown key 'sed'.*seed, size"),
        ("shapes:?seed=x", "seed got 'x', expected a whole number"),
        ("shapes:?size=8", "size_px: got 8, expected 32 to"),
        ("shapes:?fps=0", "fps got '0'"),
        ("shapes:?fps=nan", "fps got 'nan'"),
        ("shapes:?duration=-3", "duration got '-3'"),
        ("shapes:?background=lava", "background got 'lava', expected one of plain"),
        ("shapes:?objects=3-1", "n_objects: got"),
        ("shapes:?needles=9", "needles_per_min: got 9.0.*shorten episode_s"),
        ("shapes:?still=nan", "still_share: got nan"),
        ("shapes:?seed=1&seed=2", "seed is given twice"),
        ("shapes:seed=1", "expected shapes:"),
        ("shapes://host/?seed=1", "expected shapes:"),
    ],
)
def test_a_shapes_url_when_wrong_then_the_error_says_what_was_expected(url, says):
    with pytest.raises(ValueError, match=says):
        parse_shapes_url(url)


@pytest.mark.parametrize("t_s", [-0.1, 1e9, math.nan])
def test_a_time_outside_of_the_world_is_refused(t_s):
    with pytest.raises(ValueError, match="time in a world of shapes"):
        ShapesWorld(ShapesSpec()).render(t_s)
