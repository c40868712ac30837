"""Questions of the world of shapes: true, balanced, and the ordered ones not answerable without the order."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from stormline.models.training.clips import (
    AGE_S,
    FEEDS_SEED,
    HELD_OUT_SEED,
    RECENT_S,
    Clip,
    label_places,
    make_clip,
    seed_of,
    world_of,
)
from stormline.models.training.evaluate import draw_items
from stormline.models.training.questions import (
    KINDS,
    NEEDLE_KINDS,
    ORDER_NEEDED,
    WindowView,
    ask,
    caption_recall,
    exact,
    question_corpus,
)
from stormline.models.training.shapes import MARGIN_S, ShapesSpec, ShapesWorld, parse_shapes_url
from stormline.models.training.shapes_spec import BACKGROUND_CHANGES, COLOURS, DIRECTIONS, SHAPES
from stormline.pipeline.commands.demo import shapes_feed

ALL = dict.fromkeys(KINDS, 1.0)


def asked_of(n_windows, world="shapes", n_frames=32):
    """Return (clip, questions) of many windows."""
    asked = []
    for i in range(n_windows):
        clip = make_clip(seed_of(i, 250, held_out=True), n_frames, world, backwards=False)
        asked.append((clip, ask(clip.window(0, n_frames), np.random.default_rng(i), 40, ALL)))
    return asked


@pytest.fixture(scope="module")
def many():
    """Questions about 250 busy and 120 dull windows of 16 s."""
    return [*asked_of(250), *asked_of(120, "needles")]


def test_ask_when_many_windows_then_every_kind_comes_up(many):
    kinds = Counter(q.kind for _, questions in many for q in questions)

    assert set(kinds) == set(KINDS)


def test_objects_when_several_then_told_in_the_order_of_the_caption(many):
    told = [(clip.window(0, clip.n_frames), q) for clip, questions in many for q in questions if q.kind == "objects"]

    assert any(";" in q.answer for _, q in told)
    for view, q in told:
        clauses = view.truth.caption.split("; ")
        assert all(clause.startswith(look) for look, clause in zip(q.answer.split("; "), clauses, strict=False))
        assert len(q.answer.split("; ")) == len(view.full.objects)


def test_ordered_question_when_played_backwards_then_the_other_option_is_right(many):
    for _, questions in many:
        for q in questions:
            if q.kind in ORDER_NEEDED:
                assert len(q.options) == 2
                assert {q.answer, q.reversed_answer} == set(q.options)


def test_ordered_question_when_answered_from_the_set_of_frames_then_exactly_half_right(many):
    """Whatever is read from frames without their order is the same for a clip and its reversal."""
    right = total = 0
    for clip, questions in many:
        of_set = np.random.default_rng(clip.seed)  # any function of the set of frames
        for q in questions:
            if q.kind in ORDER_NEEDED:
                guess = q.options[int(of_set.integers(2))]
                right += (guess == q.answer) + (guess == q.reversed_answer)
                total += 2

    assert total > 200
    assert right * 2 == total


def is_there(clip, t_s, words):
    """Tell whether an object that fits all the words is in the world at a time."""
    return any(words <= {state.look.shape, state.look.colour} for state in clip.world.objects_at(t_s))


def test_when_something_appears_then_the_first_frame_of_that_time_lacks_it_and_the_last_has_it(many):
    compared = 0
    for clip, questions in many:
        for q in (q for q in questions if q.kind == "when" and q.prompt.endswith("appear?")):
            words = set(q.prompt.removesuffix(" appear?").split()) & {*SHAPES, *COLOURS}
            for backwards, told in ((False, q.answer), (True, q.reversed_answer)):
                if told is not None:
                    first = (int(told[1:3]) * 60 + int(told[4:6])) * 2
                    times_s = replace(clip, backwards=backwards).times_s()
                    assert not is_there(clip, times_s[first], words)
                    assert is_there(clip, times_s[first + 3], words)
                    compared += 1

    assert compared > 100


def test_clip_when_played_backwards_then_the_same_frames_in_the_reverse_order():
    seed = seed_of(5, 0, held_out=False)
    forwards = make_clip(seed, 12, backwards=False, augment=False)
    backwards = make_clip(seed, 12, backwards=True, augment=False)

    np.testing.assert_array_equal(forwards.render()[::-1], backwards.render())
    assert backwards.window(0, 4).start_s == forwards.window(8, 12).start_s


def test_direction_when_asked_then_pixels_move_that_way():
    """Measured in the frames, not read from the plan: the centre of what differs from an empty background."""
    checked = 0
    for i in range(300):
        clip = make_clip(seed_of(i, 251, held_out=True), 8, backwards=False, augment=False)
        spec = clip.world.spec
        empty = ShapesWorld(ShapesSpec(**{**vars(spec), "n_objects": (0, 0)}))
        view = clip.window(0, 8)
        if len(view.full.objects) != 1 or any(e.object_id == -1 for e in view.full.events):
            continue
        asked = ask(view, np.random.default_rng(i), 40, {"direction": 1.0})
        times = clip.times_s()
        for q in asked:
            changed = np.abs(clip.render().astype(int) - empty.render_many(times).astype(int)).sum(-1) > 90
            inside = [c for c in changed if c.any() and not (c[0] | c[-1] | c[:, 0] | c[:, -1]).any()]
            if len(inside) < 4:
                continue
            first, last = (np.argwhere(c).mean(0)[::-1] for c in (inside[0], inside[-1]))
            way = np.array(DIRECTIONS[q.answer])
            assert (last - first) @ way > 0.9 * np.linalg.norm(last - first)
            checked += 1

    assert checked >= 10


def test_yes_and_no_when_many_windows_then_equally_often(many):
    for kind in ("alert", "exists"):
        answers = Counter(q.answer for _, questions in many for q in questions if q.kind == kind)
        n = sum(answers.values())

        assert n > 100
        assert abs(answers["yes"] - n / 2) < 4 * np.sqrt(n) / 2  # four standard deviations of a fair coin


def test_background_when_asked_then_yes_where_it_changes_clear_of_the_ends_and_no_where_it_never_does(many):
    answers = Counter()
    for clip, questions in many:
        view = clip.window(0, clip.n_frames)
        for q in (q for q in questions if q.kind == "background"):
            times = [e.t_s for e in view.full.events if e.kind == "background changes"]
            clear = [t_s for t_s in times if view.start_s + MARGIN_S <= t_s <= view.stop_s - MARGIN_S]
            assert q.answer == ("yes" if clear else "no")
            assert clear or not times  # one too near to an end may or may not be seen: nothing is asked
            answers[q.answer] += 1

    assert min(answers["yes"], answers["no"]) >= 10


def test_name_when_two_objects_share_it_then_nothing_is_asked_about_them(many):
    for clip, questions in many:
        view = clip.window(0, clip.n_frames)
        for q in questions:
            if q.kind == "motion":
                name = q.prompt.removeprefix("Which way does the ").removesuffix(" move?")
                fits = [f for f in view.full.objects if any(f"{c} {f.look.shape}" == name for c in f.colours)]
                assert len(fits) <= 1


def test_needle_questions_when_the_world_has_no_needles_then_none():
    for _, questions in asked_of(20):
        assert not [q for q in questions if q.kind in NEEDLE_KINDS]


def test_needle_answers_when_asked_then_those_of_the_world():
    answers = defaultdict(list)
    for clip, questions in asked_of(120, "needles", 64):
        needles = clip.window(0, 64).full.needles()
        for q in questions:
            answers[q.kind].append(q.answer)
            if q.kind == "needle seen":
                assert q.answer == ("yes" if needles else "no")
            if q.kind == "needle count":
                assert q.answer == str(len(needles))
            if q.kind == "needle colour":
                assert [f.look.colour for f in needles] == [q.answer]

    assert {"needle seen", "needle count", "needle colour", "needle first"} <= set(answers)
    assert set(answers["needle count"]) >= {"0", "1", "2"}


def test_ask_when_the_same_generator_state_then_the_same_questions():
    view = WindowView(world_of(3, "shapes"), 10.0, 20.0)

    assert ask(view, np.random.default_rng(1), 8, ALL) == ask(view, np.random.default_rng(1), 8, ALL)


def test_seeds_when_splits_then_disjoint():
    assert seed_of(2**32 - 1, 255, held_out=False) < HELD_OUT_SEED <= seed_of(0, 0, held_out=True)
    assert seed_of(0, 1, held_out=False) > seed_of(2**32 - 1, 0, held_out=False)


def test_demo_when_it_shows_a_world_then_one_that_neither_training_nor_evaluation_draws():
    spec, *_ = parse_shapes_url(shapes_feed())
    evaluated = [item.clip.seed for stream in (0, 127) for item in draw_items(8, 1, stream, 8)]

    assert spec.seed >= FEEDS_SEED == seed_of(0, 99, held_out=True)
    assert seed_of(0, 100, held_out=True) <= min(evaluated)


def test_labels_when_played_backwards_then_motion_is_opposite():
    compared = opposite = 0
    for i in range(16):
        seed = seed_of(i, 0, held_out=False)
        forwards = label_places(make_clip(seed, 16, backwards=False), 8)
        backwards = label_places(make_clip(seed, 16, backwards=True), 8)

        np.testing.assert_array_equal(forwards.colour[::-1], backwards.colour)
        a, b = forwards.motion[::-1], backwards.motion
        both = (a > 0) & (b > 0)
        compared += both.sum()
        opposite += ((a - 1 + 4) % 8 == b - 1)[both].sum()

    assert compared > 100
    assert opposite > 0.97 * compared  # an object may turn between two frames


@pytest.mark.parametrize("backwards", [False, True])
def test_labels_when_background_changes_then_told_for_the_next_frames_at_every_place(backwards):
    empty = ShapesWorld(ShapesSpec(seed=5, size_px=64, n_objects=(0, 0), episode_s=10.0, scene_episodes=1))
    clip = Clip(0, empty, 3.2, 64, backwards, augment=False)

    changed = label_places(clip, 8).background

    frames = clip.render()
    cuts = [i for i in range(1, 64) if (frames[i] != frames[i - 1]).any()]
    expected = np.zeros(64, np.int64)
    for cut in cuts:
        expected[cut : cut + 3] = 1
    assert len(cuts) == 3
    np.testing.assert_array_equal(changed, np.broadcast_to(expected[:, None, None], (64, 8, 8)))


@pytest.mark.parametrize("backwards", [False, True])
def test_labels_when_an_object_changed_then_told_how_long_ago_until_five_seconds_later(backwards):
    one = ShapesWorld(ShapesSpec(seed=5, size_px=64, n_objects=(1, 1), episode_s=10.0))
    clip = Clip(0, one, 3.2, 64, backwards, augment=False)

    age = label_places(clip, 8).age

    told, changes = ~np.isnan(age), label_places(clip, 8).change > 0
    for frame in range(1, 64):
        ages = age[frame][told[frame]]
        assert len(set(ages.tolist())) <= 1  # there is one object
        assert ((ages >= 0) & (ages < AGE_S)).all()
        if ages.size and ages[0] >= 0.5:  # half a second before, it was told that much less
            before = age[frame - 1][told[frame - 1]]
            assert before[0] == pytest.approx(ages[0] - 0.5, abs=1e-5)
    assert (age[told & changes] < RECENT_S).all()
    assert told.any(axis=(1, 2)).sum() > changes.any(axis=(1, 2)).sum() > 5


def test_clips_when_few_are_to_run_backwards_then_few_do_and_the_others_stay_as_they_were():
    seeds = [seed_of(i, 0, held_out=False) for i in range(400)]
    half = [make_clip(seed, 8) for seed in seeds]
    fewer = [make_clip(seed, 8, backwards_share=0.25) for seed in seeds]

    assert 160 < sum(clip.backwards for clip in half) < 240
    assert 60 < sum(clip.backwards for clip in fewer) < 140
    assert all(b.start_s == a.start_s and a.backwards >= b.backwards for a, b in zip(half, fewer, strict=True))


def test_scores_when_clauses_are_missing_or_made_up_then_less():
    truth = "a small red circle moves left; a large blue star stays still"

    assert exact("A small red circle moves left;  a large blue star stays still.", truth)
    assert not exact("a small red circle moves left", truth)
    assert caption_recall("a large blue star stays still; a small red circle moves left", truth) == 1.0
    assert caption_recall("a small red circle moves left", truth) == 0.5
    assert caption_recall(f"{truth}; a small green cross leaves", truth) == pytest.approx(2 / 3)


def test_corpus_when_asked_twice_then_the_same():
    assert list(question_corpus(4)) == list(question_corpus(4))


def test_scenes_when_counted_then_the_background_changes_after_every_second_episode():
    changes = {"shapes": 0, "scenes": 0}
    for kind in changes:
        for i in range(20):
            events = world_of(i, kind).events(0.0, 140.0)  # ten to fourteen episodes
            changes[kind] += sum(event.kind == BACKGROUND_CHANGES for event in events)

    assert 4.5 <= changes["scenes"] / 20 <= 7.0
    assert 1.5 <= changes["shapes"] / 20 <= 3.0
