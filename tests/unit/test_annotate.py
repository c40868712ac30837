import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from stormline.models.prompts import VideoAnswer
from stormline.operators.annotate import Annotate
from stormline.operators.rows import (
    AnnotatedSegment,
    Barrier,
    Chunk,
    EncodedSegment,
    Position,
    SegmentMeta,
    block_of,
    rows_of,
)

SECOND_NS = 10**9
START_NS = 1000 * SECOND_NS


def query(id="caption", streams="*", window_s=4.0, token_budget=1000):
    return SimpleNamespace(
        id=id,
        kind="caption",
        streams=streams,
        prompt=f"{id}?",
        window_s=window_s,
        token_budget=token_budget,
        token_policy="uniform",
        max_new_tokens=8,
    )


async def describe(prompt):
    """Answer with what was shown, so that a wrong choice of chunks shows in the answer."""
    seen = " ".join(f"{c.start_s:g}-{c.end_s:g}:{float(c.tokens[0, 0]):g}" for c in prompt.chunks)
    n = sum(len(c.tokens) for c in prompt.chunks)
    return VideoAnswer(
        text=f"{prompt.text} {seen}", prompt_tokens=n + 3, video_tokens=n, generated_tokens=2, finish_reason="stop"
    )


def segment_row(lane_seq, *, stream="cam", session="s1", index=0, end=False, partition=0):
    """Make a row with one chunk of 2 s: chunk `index` of the session."""
    meta = SegmentMeta(stream, session, index, 0, START_NS, "", end, 0, "video", partition, lane_seq, 0, 1)
    start_ns = START_NS + 2 * index * SECOND_NS
    chunk = Chunk(
        stream_id=stream,
        session=session,
        chunk_index=index,
        start_ns=start_ns,
        end_ns=start_ns + 2 * SECOND_NS,
        session_start_ns=START_NS,
        n_frames=4,
        scene_score=0.0,
        topic="video",
        partition=partition,
        offset=lane_seq,
        append_ns=0,
        tokens=np.full((16, 4), index, np.float16),
    )
    return EncodedSegment(meta, (chunk,), (session,) if end else ()).to_row(lane_seq)


def barrier_row(lane_seq):
    return Barrier((Position("video", 0, lane_seq),), made_ns=0).to_row(lane_seq)


async def feed(step, rows):
    async def call(row):
        return [r for table in [t async for t in step(block_of([row]))] for r in rows_of(table)]

    return [row for out in await asyncio.gather(*(call(row) for row in rows)) for row in out]


def run(step, rows):
    return asyncio.run(feed(step, rows))


def answers(rows):
    return [
        (r.stream_id, r.answer)
        for row in rows
        if row.kind == AnnotatedSegment.KIND
        for r in AnnotatedSegment.from_row(row).results
    ]


def test_caption_when_a_window_is_whole_then_its_chunks_are_shown_with_times_from_its_start():
    rows = [segment_row(i, index=i) for i in range(5)]

    out = run(Annotate([query()], describe, "m"), rows)

    assert answers(out) == [("cam", "caption? 0-2:0 2-4:1"), ("cam", "caption? 0-2:2 2-4:3")]
    (result,) = AnnotatedSegment.from_row(out[2]).results
    assert (result.start_ns, result.end_ns) == (START_NS, START_NS + 4 * SECOND_NS)
    assert (result.tokens_used, result.model, result.query_id) == (32, "m", "caption")


def test_caption_when_the_session_ends_then_what_was_left_is_shown_too():
    out = run(Annotate([query()], describe, "m"), [segment_row(0, index=0), segment_row(1, index=1, end=True)])

    assert answers(out) == [("cam", "caption? 0-2:0 2-4:1")]


def test_query_when_it_names_streams_then_only_those_are_asked_about():
    rows = [segment_row(0, stream="gate-1", end=True), segment_row(1, stream="yard", end=True)]

    out = run(Annotate([query("a", streams="gate-*"), query("b")], describe, "m"), rows)

    assert answers(out) == [("gate-1", "a? 0-2:0"), ("gate-1", "b? 0-2:0"), ("yard", "b? 0-2:0")]


def test_budget_when_a_window_is_over_it_then_fewer_tokens_are_shown():
    out = run(Annotate([query(token_budget=16)], describe, "m"), [segment_row(i, index=i) for i in range(3)])

    (result,) = AnnotatedSegment.from_row(out[2]).results
    assert result.tokens_used == 16


def test_streams_when_interleaved_then_each_is_as_alone():
    alone = [
        run(Annotate([query()], describe, "m"), [segment_row(i, index=i, stream=s) for i in range(5)]) for s in "ab"
    ]
    rows = [segment_row(2 * i + k, index=i, stream=s) for i in range(5) for k, s in enumerate("ab")]

    together = run(Annotate([query()], describe, "m"), rows)

    for stream, out in zip("ab", alone, strict=True):
        assert [a for s, a in answers(together) if s == stream] == [a for _, a in answers(out)]


def test_rows_when_calls_start_out_of_order_then_state_and_answers_are_as_in_order():
    rows = [segment_row(i, index=i) for i in range(6)]

    shuffled = run(Annotate([query()], describe, "m"), [rows[i] for i in (3, 0, 5, 1, 4, 2)])

    assert sorted(answers(shuffled)) == sorted(answers(run(Annotate([query()], describe, "m"), rows)))


@pytest.mark.parametrize("cut", range(1, 7))
def test_crash_when_resumed_from_a_barrier_then_as_if_nothing_had_happened(cut):
    queries = [query("short", window_s=4), query("long", window_s=10)]
    plan = [dict(index=i // 2, stream="ab"[i % 2], partition=i % 2, end=i >= 12) for i in range(14)]
    expected = answers(run(Annotate(queries, describe, "m"), [segment_row(i, **p) for i, p in enumerate(plan)]))
    first = [segment_row(i, **p) for i, p in enumerate(plan[: 2 * cut])]

    before = run(Annotate(queries, describe, "m"), [*first, barrier_row(len(first))])
    barrier = Barrier.from_row(before[-1])
    snapshots = {(key.topic, key.partition): bytes(blob) for key, blob in barrier.snapshots.items()}
    rest = [segment_row(i, **p) for i, p in enumerate(plan[2 * cut :])]
    after = run(Annotate(queries, describe, "m", snapshots), rest)

    assert answers(before) + answers(after) == expected


def test_answer_when_there_is_none_then_the_lane_fails_and_nothing_is_left_out():
    async def fail(prompt):
        raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer"):
        run(Annotate([query()], fail, "m"), [segment_row(0, end=True)])
