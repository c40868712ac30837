import numpy as np

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


def closed_windows(chunks, window_s):
    window, closed = None, []
    for c in chunks:
        window, full = add_chunk(window, c, window_s * SECOND_NS)
        closed += [full] if full else []
    return closed, window


def test_window_when_a_chunk_of_the_next_arrives_then_closes_with_its_own_chunks():
    closed, still_open = closed_windows([chunk(i, 2 * i) for i in range(6)], window_s=4)

    assert [[c.chunk_index for c in w.chunks] for w in closed] == [[0, 1], [2, 3]]
    assert [c.chunk_index for c in still_open.chunks] == [4, 5]
    assert (closed[1].start_ns, closed[1].end_ns) == (104 * SECOND_NS, 108 * SECOND_NS)


def test_window_when_a_chunk_straddles_its_end_then_belongs_to_where_it_begins():
    closed, _ = closed_windows([chunk(0, 0), chunk(1, 2), chunk(2, 4), chunk(3, 6)], window_s=3)

    assert [[c.chunk_index for c in w.chunks] for w in closed] == [[0, 1], [2]]


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

    assert close_session(window, "s1") == (None, window)
    assert close_session(window, "other") == (window, None)
    assert close_session(None, "s1") == (None, None)
