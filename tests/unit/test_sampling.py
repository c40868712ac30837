"""Grid arithmetic, sampling across segments, chunks. Frames are one pixel that holds their number."""

import random
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import load, save

from stormline.operators.rows import DecodedSegment, SegmentMeta
from stormline.operators.sampling import (
    NS_PER_MS,
    NS_PER_S,
    FrameChunk,
    GridSpec,
    MediaClock,
    SamplerState,
    assemble_chunks,
    flush,
    round_half_away,
    step_sampler,
    walk_grid,
)

START_NS = 1_700_000_000_123_456_789
TWO_FPS = GridSpec(Fraction(2))


def make_meta(session="a", gap_segments=0, session_start_ns=START_NS):
    return SegmentMeta(
        "cam", session, 0, session_start_ns, session_start_ns, "", False, gap_segments, "t", 0, 0, 0, 0
    )  # fmt: skip


def make_decoded(frames, grid=TWO_FPS, **meta):
    """Frames: (elapsed ms, number). None of them: a failed segment."""
    timed = [(ms * NS_PER_MS, number) for ms, number in frames]
    walked = list(walk_grid(timed, grid))
    numbers = [number for _, number in walked] + [number for _, number in frames[-1:]]
    return DecodedSegment(
        meta=make_meta(**meta),
        grid_indices=np.array([g for g, _ in walked], np.int64),
        frames=np.array(numbers, np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3),
        first_ns=START_NS + (timed[0][0] if timed else 0),
        tail_ns=START_NS + (timed[-1][0] if timed else 0),
        n_frames=len(frames),
    )


def run(segments, grid=TWO_FPS, state=None):
    """Sample segments one after the other; return [(grid index, frame number)], the state, and what was skipped."""
    state = state or SamplerState("a")
    pairs, n_skipped = [], 0
    for segment in segments:
        sampled = step_sampler(state, segment, grid)
        state, n_skipped = sampled.state, n_skipped + sampled.n_skipped
        pairs += zip(sampled.grid_indices.tolist(), sampled.frames[:, 0, 0, 0].tolist(), strict=True)
    return pairs, state, n_skipped


def sample_ref(frames, grid):
    """The definition, one grid time after the other: the last frame with time ≤ g, if it is not too old."""
    pairs, index = [], 0
    while Fraction(index * NS_PER_S) / grid.fps <= frames[-1][0] * NS_PER_MS:
        time_ns = Fraction(index * NS_PER_S) / grid.fps
        past = [(ms * NS_PER_MS, number) for ms, number in frames if ms * NS_PER_MS <= time_ns]
        if past and time_ns - past[-1][0] <= grid.max_hold_ns:
            pairs.append((index, past[-1][1]))
        index += 1
    return pairs


def test_round_half_away_when_halfway_then_goes_away_from_zero_as_ffmpeg_does():
    assert [round_half_away(n, 2) for n in (-3, -1, 0, 1, 3)] == [-2, -1, 0, 1, 2]
    assert [round_half_away(n, 3) for n in (-2, -1, 1, 2)] == [-1, 0, 0, 1]


@pytest.mark.parametrize("fps", ["2", "1/3", "30000/1001", "24000/1001", "7"])
def test_grid_indices_when_around_a_grid_time_then_are_exact(fps):
    grid = GridSpec(Fraction(fps))
    for index in (0, 1, 2, 999, 10**7 + 1):
        exact = Fraction(index * NS_PER_S) / grid.fps
        below, above = int(exact), -int(-exact // 1)

        assert grid.index_at_or_before(below) == (index if below == exact else index - 1)
        assert grid.index_at_or_before(above) == index
        assert grid.index_at_or_after(below) == index
        assert grid.index_at_or_after(above + 1) == index + 1
        assert abs(grid.elapsed_ns(index) - exact) <= Fraction(1, 2)


def test_grid_spec_when_fps_is_a_float_then_refuses():
    with pytest.raises(ValueError, match="Fraction above 0"):
        GridSpec(29.97)  # pyright: ignore[reportArgumentType]


def test_media_clock_when_a_segment_starts_at_a_rounded_time_then_agrees_with_the_whole_file():
    tick = Fraction(1001, 30000)
    whole = MediaClock(tick, 7, START_NS, START_NS)
    for first in range(1, 200, 13):
        start_ns = whole.time_ns(7 + first)
        in_ms = MediaClock(Fraction(1, 1000), (start_ns - START_NS) // NS_PER_MS, start_ns, START_NS)
        for i in range(first, first + 20):
            published_ms = round_half_away((i * tick).numerator * 1000, (i * tick).denominator)

            assert in_ms.time_ns(published_ms) == whole.time_ns(7 + i)


def test_media_clock_when_times_are_of_this_century_then_loses_no_nanosecond():
    clock = MediaClock(Fraction(1, 90000), 2**33 - 1, START_NS, START_NS)

    assert clock.time_ns(2**33 - 1 + 90) == START_NS + NS_PER_MS
    assert clock.time_ns(2**33 - 1) == START_NS


@pytest.mark.parametrize("fps", ["2", "30", "30000/1001", "7/3"])
@pytest.mark.parametrize("seed", range(5))
def test_step_sampler_when_cut_anywhere_then_equals_the_definition(fps, seed):
    grid = GridSpec(Fraction(fps), max_hold_ns=700 * NS_PER_MS)
    rng = random.Random(seed)
    steps = [rng.choice([1, 20, 33, 34, 100, 500, 700, 701, 2000]) for _ in range(80)]
    frames = [(sum(steps[:i]), i) for i in range(len(steps))]
    expected = sample_ref(frames, grid)

    for n_cuts in (0, 1, 5, 20, 79):
        bounds = [0, *sorted(rng.sample(range(1, 80), n_cuts)), 80]
        segments = [make_decoded(frames[a:b], grid) for a, b in pairwise(bounds)]
        pairs, _, n_skipped = run(segments, grid)

        assert pairs == expected
        assert n_skipped == 0


def test_walk_grid_when_two_frames_share_a_time_then_the_cut_between_them_does_not_matter():
    frames = [(0, 1), (500, 2), (500, 3), (1000, 4)]

    whole, _, _ = run([make_decoded(frames)])
    cut, _, n_skipped = run([make_decoded(frames[:2]), make_decoded(frames[2:])])

    assert whole == [(0, 1), (1, 2), (2, 4)]
    assert cut == whole
    assert n_skipped == 1  # the second frame at 500 ms offers grid time 1 again


def test_step_sampler_when_a_segment_is_missing_then_nothing_is_invented():
    before, after = make_decoded([(0, 1), (400, 2)]), make_decoded([(1400, 3), (2000, 4)], gap_segments=1)

    pairs, _, _ = run([before, after])

    assert pairs == [(0, 1), (3, 3), (4, 4)]


def test_step_sampler_when_a_segment_failed_then_it_is_a_gap():
    before, failed, after = make_decoded([(0, 1), (400, 2)]), make_decoded([]), make_decoded([(1400, 3), (2000, 4)])

    pairs, state, _ = run([before, failed])
    assert state.tail_frame is None
    assert state.tail_ns is None

    assert run([after], state=state)[0] == [(3, 3), (4, 4)]
    assert pairs == [(0, 1)]


def test_step_sampler_when_silence_outlasts_the_hold_then_holds_that_long_and_no_longer():
    grid = GridSpec(Fraction(2), max_hold_ns=NS_PER_S)

    pairs, _, _ = run([make_decoded([(0, 1)], grid), make_decoded([(5000, 2)], grid)], grid)

    assert pairs == [(0, 1), (1, 1), (2, 1), (10, 2)]


def test_step_sampler_when_the_clock_jumps_back_then_drops_and_counts_what_has_passed():
    first = make_decoded([(0, 1), (1000, 2), (2200, 3)])
    back = make_decoded([(1000, 4), (1600, 5), (2600, 6)])

    pairs, state, n_skipped = run([first, back])

    assert pairs == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2), (5, 5)]
    assert n_skipped == 3
    assert state.next_grid_index == 6


def test_step_sampler_when_frames_lie_before_the_sessions_start_then_the_grid_starts_at_zero():
    pairs, _, _ = run([make_decoded([(-900, 1), (-100, 2), (100, 3), (600, 4)])])

    assert pairs == [(0, 2), (1, 3)]


def test_step_sampler_when_the_segment_is_of_another_session_then_refuses():
    with pytest.raises(ValueError, match=r"session 'a'.*session=b"):
        step_sampler(SamplerState("a"), make_decoded([(0, 1)], session="b"), TWO_FPS)


def test_step_sampler_when_two_sessions_interleave_then_they_stay_apart():
    ones = [make_decoded([(i * 700, i)]) for i in range(6)]
    twos = [make_decoded([(i * 300, 100 + i)], session="b") for i in range(6)]
    alone = run(ones)[0], run(twos, state=SamplerState("b"))[0]

    states, pairs = {"a": SamplerState("a"), "b": SamplerState("b")}, {"a": [], "b": []}
    for segment in [s for pair in zip(ones, twos, strict=True) for s in pair]:
        key = segment.meta.session
        got, states[key], _ = run([segment], state=states[key])
        pairs[key] += got

    assert (pairs["a"], pairs["b"]) == alone


def test_step_sampler_when_called_then_its_state_is_no_view_and_cannot_be_written():
    decoded = make_decoded([(0, 1), (400, 2)])

    state = step_sampler(SamplerState("a"), decoded, TWO_FPS).state
    decoded.frames[:] = 99

    assert state.tail_frame is not None
    assert state.tail_frame.max() == 2
    with pytest.raises(ValueError, match="read-only"):
        state.tail_frame[:] = 0


@pytest.mark.parametrize("n_before", [0, 1, 3])
def test_sampler_state_when_snapshot_and_restored_then_goes_on_the_same(n_before):
    segments = [make_decoded([(i * 700, i), (i * 700 + 650, 50 + i)]) for i in range(6)]
    expected, final, _ = run(segments)
    before, state, _ = run(segments[:n_before])

    tensors = load(save(state.to_tensors()))
    restored = SamplerState.from_snapshot(state.header(), tensors)
    after, restored_final, _ = run(segments[n_before:], state=restored)

    assert before + after == expected
    assert restored_final.header() == final.header()


def test_sampler_state_when_written_by_another_version_then_says_what_to_do():
    header = {**SamplerState("a").header(), "version": 99}

    with pytest.raises(ValueError, match="version 99, this code reads 1; go on with"):
        SamplerState.from_snapshot(header, {})


def test_sampler_state_when_its_parts_do_not_belong_together_then_refuses():
    state = replace(SamplerState("a"), tail_ns=5)

    with pytest.raises(ValueError, match="must come together"):
        SamplerState.from_snapshot(state.header(), {})


def number_frames(numbers):
    return np.array(numbers, np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)


@pytest.mark.parametrize("sizes", [[11], [1] * 11, [3, 0, 8], [4, 4, 3], [9, 2]])
def test_assemble_chunks_when_cut_anywhere_then_chunks_are_the_same(sizes):
    pending, chunks, start = FrameChunk.empty((1, 1)), [], 0
    for size in sizes:
        numbers = np.arange(start, start + size)
        new, pending = assemble_chunks(pending, number_frames(numbers), numbers * 2, chunk_frames=4, most_step=2)
        pending = FrameChunk.from_snapshot(pending.header(), load(save(pending.to_tensors())))
        chunks, start = [*chunks, *new], start + size
    last, rest = flush(pending)

    assert [c.grid_indices.tolist() for c in (*chunks, *last)] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20]]
    assert [c.frames[:, 0, 0, 0].tolist() for c in (*chunks, *last)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert len(rest) == 0
    assert flush(rest)[0] == ()


@pytest.mark.parametrize("sizes", [[14], [1] * 14, [6, 8], [5, 2, 7], [7, 0, 7], [10, 4]])
def test_assemble_chunks_when_there_is_a_silence_then_no_chunk_goes_across_it_however_cut(sizes):
    places = np.array([0, 1, 2, 3, 4, 5, *range(57_600, 57_606), 60_000, 60_001])
    pending, chunks, start = FrameChunk.empty((1, 1)), [], 0
    for size in sizes:
        mine = places[start : start + size]
        frames = number_frames(np.arange(start, start + size))
        new, pending = assemble_chunks(pending, frames, mine, chunk_frames=4, most_step=21)
        chunks, start = [*chunks, *new], start + size

    assert [c.grid_indices.tolist() for c in (*chunks, pending)] == [
        [0, 1, 2, 3],
        [4, 5],
        [57_600, 57_601, 57_602, 57_603],
        [57_604, 57_605],
        [60_000, 60_001],
    ]
    assert [n for c in (*chunks, pending) for n in c.frames[:, 0, 0, 0].tolist()] == list(range(14))


@pytest.mark.parametrize(
    ("fps", "hold_s", "expected"), [("2", 10.0, 21), ("2", 0.0, 1), ("1/20", 10.0, 1), ("30000/1001", 1.0, 30)]
)
def test_grid_when_a_frame_is_held_then_its_longest_step_is_one_more_than_it_stands_for(fps, hold_s, expected):
    grid = GridSpec(Fraction(fps), int(hold_s * 1e9))

    assert grid.most_step == expected
    assert grid.most_step >= len(grid.held(0, 10**15)) + 1


def test_frame_chunk_when_its_parts_do_not_belong_together_then_refuses():
    header = {**FrameChunk.empty((1, 1)).header(), "grid_indices": [1]}

    with pytest.raises(ValueError, match="0 frames for 1 grid indices"):
        FrameChunk.from_snapshot(header, FrameChunk.empty((1, 1)).to_tensors())
