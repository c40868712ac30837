import asyncio

import numpy as np
import pytest

from stormline.models.prompts import VideoAnswer
from stormline.operators import annotate
from stormline.operators.errors import PromptError, SettingsError
from stormline.operators.queries import StandingQuery
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
from stormline.operators.scenes import SceneSpec

SECOND_NS = 10**9
START_NS = 1000 * SECOND_NS
SCENES = SceneSpec(min_ns=4 * SECOND_NS, max_ns=6 * SECOND_NS, sensitivity=3.0)


def query(id="caption", **fields):
    return StandingQuery.model_validate({"id": id, "prompt": f"{id}?", "window_s": 4, "token_budget": 1000, **fields})


def alert(id="alert", **fields):
    return query(id, **{"kind": "alert", "window_s": 2, **fields})


def Annotate(queries, ask, model_name, snapshots=None):  # noqa: N802 (the step, with a list of queries)
    return annotate.Annotate(lambda: queries, ask, model_name, SCENES, snapshots)


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
    (result,) = AnnotatedSegment.from_row(out[1]).results
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

    (result,) = AnnotatedSegment.from_row(out[1]).results
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
    queries = [query("short", window_s=4), query("long", window_s=10), query("scene", window_s=None, scenes=True)]
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


def refusing_long_prompts(said):
    async def answer(prompt):
        if len(prompt.text) > 9:
            raise PromptError("the prompt has 10809 tokens")
        return await saying(said)(prompt)

    return answer


def letters(rows):
    segments = [AnnotatedSegment.from_row(row) for row in rows if row.kind == AnnotatedSegment.KIND]
    return [(d.reason, d.detail, d.start_ns) for s in segments for d in s.encoded.dead_letters]


def test_answer_when_a_question_does_not_fit_the_model_then_a_dead_letter_and_the_others_are_answered():
    long, ask = "long " * 9, refusing_long_prompts("yyyy")
    rows = [segment_row(i, index=i, end=i == 3) for i in range(4)]

    out = run(Annotate([query("a", prompt=long), query("b"), alert("c", prompt=long), alert("d")], ask, "m"), rows)

    assert [r.query_id for r in results(out)] == ["d", "b", "b"]
    told = [(reason, detail.split("'")[1], start_ns - START_NS) for reason, detail, start_ns in letters(out)]
    of_a = [("not_asked", "a", at * SECOND_NS) for at in (0, 4)]
    of_c = [("not_asked", "c", at * SECOND_NS) for at in (0, 2, 4, 6)]
    assert sorted(told) == sorted([*of_a, *of_c])
    assert all("10809 tokens" in detail for _, detail, _ in letters(out))


def saying(text):
    """Return an LLM that answers window after window with these letters: y for yes, everything else for no."""

    async def answer(prompt):
        index = int(prompt.chunks[0].tokens[0, 0])
        await asyncio.sleep(0)  # so that answers come in no order of their own
        said = "Yes, it does." if text[index] == "y" else "No."
        return VideoAnswer(said, prompt_tokens=9, video_tokens=6, generated_tokens=1, finish_reason="stop")

    return answer


def results(rows):
    return [r for row in rows if row.kind == AnnotatedSegment.KIND for r in AnnotatedSegment.from_row(row).results]


def told(rows):
    """Return when each alert began (+) and ended (-), in seconds from the session's start."""
    return [("+" if r.alert else "-") + str((r.start_ns - START_NS) // SECOND_NS) for r in results(rows)]


def alert_rows(said, **fields):
    return [segment_row(i, index=i, end=i == len(said) - 1, **fields) for i in range(len(said))]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("nnn", []),
        ("nynn", ["+2", "-4"]),
        ("nyyyn", ["+2", "-8"]),  # once for the occurrence, not once for each window
        ("ynyny", ["+0", "-2", "+4", "-6", "+8"]),  # a no arms it again
        ("yyy", ["+0"]),
    ],
)
def test_alert_when_it_holds_over_several_windows_then_is_told_once_for_each_occurrence(said, expected):
    out = run(Annotate([alert()], saying(said), "m"), alert_rows(said))

    assert told(out) == expected
    assert {r.kind for r in results(out)} <= {"alert"}


@pytest.mark.parametrize("cut", range(1, 9))
def test_alert_when_the_lane_crashes_anywhere_then_told_as_if_it_had_not(cut):
    said = "nyyynyyny"
    rows = alert_rows(said)
    expected = told(run(Annotate([alert()], saying(said), "m"), rows))

    before = run(Annotate([alert()], saying(said), "m"), [*rows[:cut], barrier_row(cut)])
    snapshots = snapshots_of(before[-1])
    rest = [segment_row(i, index=cut + i, end=cut + i == len(said) - 1) for i in range(len(said) - cut)]
    after = run(Annotate([alert()], saying(said), "m", snapshots), rest)

    assert told(before) + told(after) == expected


def test_alert_when_a_barrier_passes_then_its_snapshot_waits_for_the_answers_before_it_alone():
    released = asyncio.Event()

    async def late(prompt):
        if int(prompt.chunks[0].tokens[0, 0]) == 2:
            await released.wait()
        return await saying("yyn")(prompt)

    async def scenario():
        step = Annotate([alert()], late, "m")
        rows = [segment_row(0, index=0), segment_row(1, index=1), barrier_row(2), segment_row(3, index=2)]
        waiting = asyncio.create_task(feed(step, rows[3:]))
        out = await asyncio.wait_for(feed(step, rows[:3]), 5)
        released.set()
        return out, await waiting

    out, last = asyncio.run(scenario())

    assert told(out) == ["+0"]
    assert told(last) == ["-4"]
    after = run(Annotate([alert()], saying("yyn"), "m", snapshots_of(out[-1])), [segment_row(0, index=2, end=True)])
    assert told(after) == ["-4"], "it did not know that the alert held already"


def snapshots_of(row):
    return {(key.topic, key.partition): bytes(blob) for key, blob in Barrier.from_row(row).snapshots.items()}


def test_alert_when_the_session_ends_then_the_next_one_begins_anew():
    rows = [
        segment_row(0, index=0, end=True),
        segment_row(1, index=0, session="s2"),
        segment_row(2, index=1, session="s2"),
    ]

    assert told(run(Annotate([alert()], saying("yy"), "m"), rows)) == ["+0", "+0"]


class Changing:
    """Standing queries that change while the step runs."""

    def __init__(self, *queries):
        self.now = list(queries)

    def __call__(self):
        if isinstance(self.now, Exception):
            raise self.now
        return self.now


def run_with_changes(queries, ask, stages):
    """Run stages of (change to make, rows), one step over all of them; return the rows of each."""

    async def scenario():
        step = annotate.Annotate(queries, ask, "m", SCENES)
        outs = []
        for change, rows in stages:
            change()
            outs.append(await feed(step, rows))
        return outs

    return asyncio.run(scenario())


def test_queries_when_one_is_added_then_from_a_barrier_and_a_windows_start_on():
    queries = Changing(query("a"))
    rows = [segment_row(i, index=i) for i in range(3)]
    more = [barrier_row(3), *[segment_row(4 + i, index=3 + i) for i in range(4)]]

    before, after = run_with_changes(
        queries, describe, [(lambda: None, rows), (lambda: queries.now.append(query("b")), more)]
    )

    assert answers(before) == [("cam", "a? 0-2:0 2-4:1")]
    # b comes in the midst of [4, 8) and begins with [8, 12).
    assert answers(after) == [("cam", asked) for asked in ("a? 0-2:2 2-4:3", "a? 0-2:4 2-4:5", "b? 0-2:4 2-4:5")]


def test_queries_when_changed_or_removed_then_open_windows_finish_or_go():
    queries = Changing(query("a"), query("b"), alert("c"))
    change = lambda: setattr(queries, "now", [query("a", prompt="new?")])  # noqa: E731
    rows = [segment_row(0, index=0)]
    more = [barrier_row(1), *[segment_row(2 + i, index=1 + i) for i in range(3)]]

    _, out = run_with_changes(queries, saying("y" * 9), [(lambda: None, rows), (change, more)])

    assert [(r.query_id, r.prompt) for r in results(out)] == [("a", "a?"), ("a", "new?")]


def test_queries_when_a_crash_comes_after_a_change_then_the_open_window_is_still_the_old_one():
    old, new = query("a", prompt="old?"), query("a", prompt="new?")
    before = run(Annotate([old], describe, "m"), [segment_row(0, index=0), barrier_row(1)])

    out = run(Annotate([new], describe, "m", snapshots_of(before[-1])), [segment_row(i, index=1 + i) for i in range(3)])

    assert [r.prompt for r in results(out)] == ["old?", "new?"]


def test_queries_when_an_alerts_question_changes_then_what_held_before_means_nothing():
    queries = Changing(alert())
    rows = [segment_row(i, index=i) for i in range(3)]
    cheaper = [barrier_row(3), segment_row(4, index=3)]
    another = [barrier_row(5), *(segment_row(6 + i, index=4 + i) for i in range(3))]
    stages = [
        (lambda: None, rows),
        (lambda: setattr(queries, "now", [alert(token_budget=16)]), cheaper),
        (lambda: setattr(queries, "now", [alert(prompt="Else?")]), another),
    ]

    outs = run_with_changes(queries, saying("y" * 9), stages)

    assert [told(out) for out in outs] == [["+0"], [], ["+8"]]


def test_queries_when_one_was_removed_while_no_lane_ran_then_its_window_and_what_held_are_gone():
    queries = [query("a"), alert("c"), query("b")]
    before = run(Annotate(queries, saying("yyyy"), "m"), [segment_row(0, index=0), barrier_row(1)])
    rows = [segment_row(0, index=1), barrier_row(1)]

    out = run(Annotate([query("b")], saying("yyyy"), "m", snapshots_of(before[-1])), rows)
    again = run(Annotate([alert("c")], saying("yyyy"), "m", snapshots_of(out[-1])), [segment_row(0, index=2)])

    assert [r.query_id for r in results(out)] == ["b"]
    assert told(again) == ["+4"]


def test_queries_when_an_alert_watches_a_stream_no_more_then_what_held_before_means_nothing_later():
    queries = Changing(alert(window_s=4))
    rows = [segment_row(i, index=i) for i in range(3)]
    elsewhere = [barrier_row(3), *(segment_row(4 + i, index=3 + i) for i in range(3))]
    back = [barrier_row(7), *(segment_row(8 + i, index=6 + i) for i in range(4))]
    stages = [
        (lambda: None, rows),
        (lambda: setattr(queries, "now", [alert(window_s=4, streams="yard")]), elsewhere),
        (lambda: setattr(queries, "now", [alert(window_s=4)]), back),
    ]

    outs = run_with_changes(queries, saying("y" * 10), stages)

    assert [told(out) for out in outs] == [["+0"], [], ["+12"]]


def test_queries_when_an_alert_is_a_caption_for_a_while_then_what_held_before_means_nothing_later():
    queries = Changing(alert(window_s=4))
    rows = [segment_row(i, index=i) for i in range(3)]
    captions = [barrier_row(3), *(segment_row(4 + i, index=3 + i) for i in range(4))]
    back = [barrier_row(8), *(segment_row(9 + i, index=7 + i) for i in range(4))]
    stages = [
        (lambda: None, rows),
        (lambda: setattr(queries, "now", [query("alert", window_s=4)]), captions),
        (lambda: setattr(queries, "now", [alert(window_s=4)]), back),
    ]

    outs = run_with_changes(queries, saying("y" * 11), stages)

    assert [[(r.kind, r.alert) for r in results(out)] for out in outs] == [
        [("alert", True)],
        [("caption", False)],
        [("caption", False), ("alert", True)],
    ]


def test_queries_when_they_cannot_be_read_then_the_last_ones_stay():
    queries = Changing(query("a"))
    fail = lambda: setattr(queries, "now", SettingsError("half a file"))  # noqa: E731

    _, out = run_with_changes(
        queries,
        describe,
        [(lambda: None, [segment_row(0, index=0)]), (fail, [barrier_row(1), segment_row(2, index=1, end=True)])],
    )

    assert answers(out) == [("cam", "a? 0-2:0 2-4:1")]


def test_windows_when_several_queries_share_chunks_then_the_snapshot_holds_each_once():
    one = run(Annotate([query("a")], describe, "m"), [segment_row(0), barrier_row(1)])
    two = run(Annotate([query("a"), query("b")], describe, "m"), [segment_row(0), barrier_row(1)])

    sizes = [len(next(iter(snapshots_of(out[-1]).values()))) for out in (one, two)]

    tokens_bytes = 16 * 4 * 2
    assert sizes[1] - sizes[0] > 0
    assert [blob.count(np.zeros(16 * 4, np.float16).tobytes()) for blob in snapshots_of(two[-1]).values()] == [1]
    assert sizes[0] > tokens_bytes


@pytest.mark.parametrize("policy", ["uniform", "recent", "global_local", "changes"])
@pytest.mark.parametrize("cut", [3, 150, 299])
def test_whole_video_when_far_over_what_is_held_and_the_lane_crashes_then_answered_as_if_it_had_not(policy, cut):
    asked = [query(window_s=3600, token_budget=32, token_policy=policy)]
    rows = [segment_row(i, index=i, end=i == 299) for i in range(300)]

    whole = answers(run(Annotate(asked, describe, "m"), rows))
    before = run(Annotate(asked, describe, "m"), [*rows[:cut], barrier_row(cut)])
    rest = [segment_row(i, index=cut + i, end=cut + i == 299) for i in range(300 - cut)]
    after = run(Annotate(asked, describe, "m", snapshots_of(before[-1])), rest)

    assert answers(after) == whole
    assert len(whole) == 1
    assert AnnotatedSegment.from_row(after[-1]).results[0].start_ns == START_NS
    assert len(next(iter(snapshots_of(before[-1]).values()))) < 40_000 + 16 * 32 * 4 * 2
