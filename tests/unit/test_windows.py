import numpy as np
import pytest

from stormline.models.selection import HELD_NEWEST, VideoChunk, select_chunks
from stormline.operators.queries import StandingQuery
from stormline.operators.rows import Chunk
from stormline.operators.windows import add_chunk, close_session

SECOND_NS = 10**9


def chunk(index, start_s, session="s1", session_start_s=100):
    return Chunk(
        stream_id="cam",
        session=session,
        chunk_index=index,
        start_ns=(session_start_s + start_s) * SECOND_NS,
        end_ns=(session_start_s + start_s + 2) * SECOND_NS,
        session_start_ns=session_start_s * SECOND_NS,
        n_frames=4,
        scene_score=0.0,
        topic="video",
        partition=0,
        offset=index,
        append_ns=0,
        tokens=np.zeros((1, 2), np.float16),
    )


def query(id="q", **fields):
    return StandingQuery.model_validate({"id": id, **fields})


def closed_windows(chunks, window_s):
    asked, windows, closed = query(window_s=window_s), {}, []
    for c in chunks:
        windows, full = add_chunk(windows, c, {"q": asked})
        closed += full
    return closed, windows["q"]


def indices(windows):
    return [[c.chunk_index for c in w.chunks] for w in windows]


def test_window_when_its_last_chunk_arrives_then_closes_at_once_with_its_own_chunks():
    closed, still_open = closed_windows([chunk(i, 2 * i) for i in range(5)], window_s=4)

    assert indices(closed) == [[0, 1], [2, 3]]
    assert [c.chunk_index for c in still_open.chunks] == [4]
    assert (closed[1].start_ns, closed[1].end_ns) == (104 * SECOND_NS, 108 * SECOND_NS)


def test_window_when_a_chunk_straddles_its_end_then_belongs_to_where_it_begins():
    closed, _ = closed_windows([chunk(0, 0), chunk(1, 2), chunk(2, 4), chunk(3, 6)], window_s=3)

    assert indices(closed) == [[0, 1], [2]]


def test_window_when_its_end_never_comes_then_closes_with_a_chunk_of_a_later_one():
    closed, _ = closed_windows([chunk(0, 0), chunk(1, 2), chunk(2, 5), chunk(3, 9)], window_s=6)

    assert indices(closed) == [[0, 1, 2]]
    closed, _ = closed_windows([chunk(0, 0), chunk(1, 2), chunk(2, 9), chunk(3, 11)], window_s=6)
    assert indices(closed) == [[0, 1], [2, 3]], "the first after a gap begins its window, though late"


def test_window_when_nothing_was_seen_for_several_windows_then_no_empty_ones():
    closed, still_open = closed_windows([chunk(0, 0), chunk(1, 40)], window_s=4)

    assert len(closed) == 1
    assert still_open.window_index == 10


def test_window_when_the_session_changes_then_closes_though_the_index_is_the_same():
    closed, still_open = closed_windows([chunk(0, 0), chunk(0, 0, session="s2")], window_s=4)

    assert [w.session for w in closed] == ["s1"]
    assert still_open.session == "s2"


def test_session_when_it_ends_then_only_its_own_window_closes():
    _, window = closed_windows([chunk(0, 0)], window_s=4)

    assert close_session({"q": window}, "s1") == ({}, [window])
    assert close_session({"q": window}, "other") == ({"q": window}, [])


def test_query_when_added_in_the_midst_of_a_window_then_begins_with_the_next():
    asked, windows, closed = query(window_s=6), {}, []

    for c in [chunk(i, 2 * i) for i in range(4, 10)]:  # from 8 s on, in the window [6, 12)
        windows, full = add_chunk(windows, c, {"q": asked})
        closed += full

    assert indices(closed) == [[6, 7, 8]]
    assert indices(windows.values()) == [[9]]


def test_query_when_added_at_a_windows_start_then_begins_at_once():
    windows, _ = add_chunk({}, chunk(3, 6), {"q": query(window_s=6)})

    assert indices(windows.values()) == [[3]]
    assert not windows["q"].passed


def test_query_when_the_session_ends_in_a_window_that_it_joined_then_nothing_closes():
    windows, _ = add_chunk({}, chunk(4, 8), {"q": query(window_s=6)})

    assert close_session(windows, "s1") == ({}, [])


def test_query_when_changed_then_the_open_window_stays_as_it_began_and_the_next_is_as_it_is_now():
    old, new = query(window_s=6, prompt="old?"), query(window_s=4, prompt="new?")
    windows, closed = add_chunk({}, chunk(0, 0), {"q": old})

    for c in [chunk(i, 2 * i) for i in range(1, 7)]:
        windows, full = add_chunk(windows, c, {"q": new})
        closed += full

    # [0, 6) as before; 6 is in the midst of [4, 8), so that the new one begins with [8, 12).
    assert [(w.query.prompt, w.start_ns // SECOND_NS - 100) for w in closed] == [("old?", 0), ("new?", 8)]
    assert indices(closed) == [[0, 1, 2], [4, 5]]


def test_query_when_it_watches_a_stream_no_more_then_finishes_its_window_and_begins_no_other():
    windows, _ = add_chunk({}, chunk(0, 0), {"q": query(window_s=4)})

    windows, first = add_chunk(windows, chunk(1, 2), {})
    windows, second = add_chunk(windows, chunk(2, 4), {})

    assert indices(first) == [[0, 1]]
    assert second == []
    assert windows == {}


def night_long(n_chunks, policy, budget=8):
    """Return the open window after so many chunks."""
    asked = query(window_s=86_400, token_budget=budget, token_policy=policy)
    windows = {}
    for i in range(n_chunks):
        windows, _ = add_chunk(windows, chunk(i, 2 * i), {"q": asked})
    return windows["q"]


@pytest.mark.parametrize("policy", ["uniform", "global_local", "changes"])
def test_window_when_it_lasts_all_night_then_holds_a_bounded_even_choice_with_its_first_and_newest(policy):
    for n_chunks in (16 * 8 + HELD_NEWEST, 1000, 5000):
        window = night_long(n_chunks, policy)
        places = [c.chunk_index for c in window.chunks]
        gaps = np.diff(places)

        assert len(places) <= 16 * 8 + 8
        assert (places[0], places[-2:]) == (0, [n_chunks - 2, n_chunks - 1])
        assert gaps.max() <= n_chunks / 50
        assert (window.start_ns, window.end_ns) == (100 * SECOND_NS, (100 + 2 * n_chunks) * SECOND_NS)


def test_window_when_it_fits_then_holds_all_and_beyond_only_what_could_not_be_chosen_of_recent_goes():
    assert [c.chunk_index for c in night_long(16 * 8, "uniform").chunks] == list(range(16 * 8))
    for n_chunks in (5, 9, 200):
        window = night_long(n_chunks, "recent")
        all_of_it = [VideoChunk(2 * i, 2 * i + 2, np.zeros((1, 2), np.float16)) for i in range(n_chunks)]
        held = [all_of_it[c.chunk_index] for c in window.chunks]

        assert select_chunks(held, 8, "recent") == select_chunks(all_of_it, 8, "recent")
        assert len(held) <= 9
        assert (window.start_ns, window.end_ns) == (100 * SECOND_NS, (100 + 2 * n_chunks) * SECOND_NS)


def test_recent_window_of_a_night_when_it_is_waited_out_then_the_next_begins_at_its_own_first_chunk():
    asked = query(window_s=100, token_budget=2, token_policy="recent")
    windows, closed = {}, []
    for i in range(101):
        windows, full = add_chunk(windows, chunk(i, 2 * i), {"q": asked})
        closed += full

    assert [(w.start_ns, w.end_ns) for w in closed] == [
        (100 * SECOND_NS, 200 * SECOND_NS), (200 * SECOND_NS, 300 * SECOND_NS)
    ]  # fmt: skip
