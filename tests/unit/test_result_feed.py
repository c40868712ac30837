"""Following committed results: each once and in order, from any place on, whoever listens and however slowly."""

import asyncio
from contextlib import aclosing
from itertools import islice

import pytest
from output_folder import StoppedError, StopsBeforeManifest

from stormline.operators.rows import Position, Result
from stormline.pipeline import result_tail
from stormline.pipeline.checkpoint import KEPT_EPOCHS, MANIFEST_NAME, epoch_folder, list_committed
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.recovery import recover
from stormline.pipeline.result_feed import ResultFeed
from stormline.pipeline.result_tail import Cursor, ResultTail, newest_cursor

NOON_NS = 1_769_860_800 * 10**9  # 2026-01-31T12:00:00Z
DAY_NS = 86_400 * 10**9


def make_result(text, stream="c", start_ns=NOON_NS):
    made_ns = int(text) * 10**9
    return Result("q", "caption", stream, "s", start_ns, start_ns, "?", text, False, 1, "", 1.0, "m", made_ns)


class Lanes:
    """Writes results as lanes would; answers are counted up, so that they say which row it is."""

    def __init__(self, root, count=1):
        self.root = root
        self.n = 0
        self.offset = 0
        self.start(count)

    def start(self, count, cls=EpochWriter):
        recovery = recover(self.root, lanes=count, identity={})
        self.writers = [
            cls(recovery.for_lane(lane, [("video", lane)]), model="m", identity={}) for lane in range(count)
        ]

    def commit(self, n_rows=1, lane=0, day=0):
        """Commit so many results, or an epoch without any; return their answers."""
        answers = [str(self.n + i) for i in range(n_rows)]
        self.n += n_rows
        self.offset += 1
        results = [make_result(text, f"cam-{lane}", NOON_NS + day * DAY_NS) for text in answers]
        self.writers[lane].commit(results=results, positions=[Position("video", lane, self.offset)], snapshots={})
        return answers


def poll(tail):
    return [event.values["answer"] for event in tail.poll()]


@pytest.mark.parametrize(
    "cursor",
    [
        Cursor(),
        Cursor({0: 1}),
        Cursor({0: 1}, (0, 2, 5)),
        Cursor({0: 43_200, 1: 43_199, 7: 12}),
        Cursor({lane: 1_000_000 + lane % 5 for lane in range(1024)}, (1023, 1_000_100, 300)),
    ],
)
def test_cursor_when_written_as_text_then_read_back(cursor):
    text = str(cursor)

    assert Cursor.parse(text) == cursor
    assert len(text) <= 16 + 4 * len(cursor.epochs)
    assert text.replace("-", "").replace("_", "").isalnum()


@pytest.mark.parametrize("text", ["", "1", "noon", "AQ", "AQAA", "/w==", "é", "A" * 100_000, "_____"])
def test_cursor_when_the_text_is_none_then_refused(text):
    with pytest.raises(ValueError, match="no cursor"):
        Cursor.parse(text)


def test_tail_when_rows_are_committed_then_each_comes_once_and_in_order(tmp_path):
    tail = ResultTail(tmp_path)
    assert poll(tail) == []

    lanes = Lanes(tmp_path)
    first = lanes.commit(3)
    assert poll(tail) == first
    assert poll(tail) == []
    lanes.commit(0)
    second = lanes.commit(2)

    assert poll(tail) == second
    assert tail.cursor == newest_cursor(tmp_path)


def test_tail_when_far_behind_or_from_the_start_then_all_that_was_pruned_from_the_manifests_comes_too(tmp_path):
    lanes = Lanes(tmp_path)
    answers = [text for n in range(3 * KEPT_EPOCHS) for text in lanes.commit(1 + n % 2, day=n % 2)]

    assert len(list_committed(tmp_path, 0)) == KEPT_EPOCHS
    assert poll(ResultTail(tmp_path)) == answers
    assert poll(ResultTail(tmp_path, Cursor({0: 2}))) == answers[3:]


def test_tail_when_an_epoch_has_rows_of_two_days_then_their_ids_stay(tmp_path):
    lanes = Lanes(tmp_path)
    results = [make_result(str(day), start_ns=NOON_NS + day * DAY_NS) for day in (1, 0, 1)]
    lanes.writers[0].commit(results=results, positions=[Position("video", 0, 1)], snapshots={})

    events = list(ResultTail(tmp_path).poll())

    assert [(event.row_id, event.values["answer"]) for event in events] == [
        ("0-1-0", "0"),
        ("0-1-1", "1"),
        ("0-1-2", "1"),
    ]


def test_tail_when_nothing_is_new_then_no_file_is_opened(tmp_path, monkeypatch):
    lanes = Lanes(tmp_path)
    lanes.commit()
    tail = ResultTail(tmp_path)
    poll(tail)

    def refuse(*_, **__):
        raise AssertionError("opened a file although nothing was new")

    monkeypatch.setattr(result_tail, "read_manifest", refuse)
    monkeypatch.setattr(result_tail, "find_rows", refuse)
    assert poll(tail) == []


def test_tail_when_it_goes_on_from_any_event_then_the_rest_comes(tmp_path):
    lanes = Lanes(tmp_path, count=3)
    for n in range(9):
        lanes.commit(1 + n % 3, lane=n % 3)
    whole = list(ResultTail(tmp_path).poll())

    for i, event in enumerate(whole):
        rest = list(ResultTail(tmp_path, Cursor.parse(str(event.cursor))).poll())
        assert sorted(e.row_id for e in rest) == sorted(e.row_id for e in whole[i + 1 :])
    assert len({event.row_id for event in whole}) == len(whole) == 18


def test_tail_when_left_in_the_middle_of_a_poll_then_the_next_goes_on_there(tmp_path):
    lanes = Lanes(tmp_path, count=2)
    answers = [*lanes.commit(3, lane=1), *lanes.commit(3, lane=0)]
    tail = ResultTail(tmp_path)

    first = [event.values["answer"] for event in islice(tail.poll(), 2)]

    assert first + poll(tail) == answers


def test_tail_when_the_number_of_lanes_changes_then_nothing_is_missed_or_repeated(tmp_path):
    lanes = Lanes(tmp_path, count=2)
    lanes.commit(2, lane=0)
    lanes.commit(2, lane=1)
    tail = ResultTail(tmp_path)
    seen = poll(tail)

    lanes.start(3)
    more = [text for lane in (2, 0, 1) for text in lanes.commit(1, lane=lane)]
    lanes.start(1)
    more += lanes.commit(1)
    later = ResultTail(tmp_path, Cursor.parse(str(tail.cursor)))

    assert seen == ["0", "1", "2", "3"]
    assert poll(later) == more


def test_tail_when_a_lane_died_before_its_manifest_then_its_rows_come_once_when_they_are_made_again(tmp_path):
    lanes = Lanes(tmp_path)
    seen = lanes.commit()
    tail = ResultTail(tmp_path)
    assert poll(tail) == seen
    lanes.start(1, StopsBeforeManifest)
    with pytest.raises(StoppedError):
        lanes.commit(2)

    assert poll(tail) == []
    lanes.start(1)
    again = lanes.commit(2)
    assert poll(tail) == again


def test_tail_when_files_or_manifests_are_gone_or_damaged_then_the_rest_comes(tmp_path, caplog):
    lanes = Lanes(tmp_path)
    tail = ResultTail(tmp_path)
    for _ in range(3):
        lanes.commit()
    (tmp_path / "results" / "date=2026-01-31" / "lane-000-epoch-00000002.parquet").unlink()
    (epoch_folder(tmp_path, 0, 3) / MANIFEST_NAME).write_text("{")

    assert poll(tail) == ["0", "2"]


def test_cursor_when_of_another_folder_then_ahead(tmp_path):
    lanes = Lanes(tmp_path)
    lanes.commit()
    newest = newest_cursor(tmp_path)

    assert Cursor({0: 2}).is_ahead_of(newest)
    assert Cursor({0: 1, 1: 1}).is_ahead_of(newest)
    assert Cursor({}, (0, 2, 1)).is_ahead_of(newest)
    assert not newest.is_ahead_of(newest)


# Many listeners.


async def take(listening, n):
    events = []
    async for event in listening:
        if not isinstance(event, Cursor):
            events.append(event)
        if len(events) == n:
            return events
    raise AssertionError("the feed ended")


def answers_of(events):
    return [event.values["answer"] for event in events]


def test_feed_when_several_listen_then_each_gets_all_from_its_place_on(tmp_path):
    lanes = Lanes(tmp_path, count=2)
    lanes.commit(2)

    async def listen():
        feed = ResultFeed(tmp_path, poll_s=0)
        async with aclosing(feed.listen(Cursor())) as old, aclosing(feed.listen(idle_s=0)) as new:
            first = await take(old, 2)
            assert isinstance(await anext(new), Cursor)  # from now on
            more = [*lanes.commit(2, lane=1), *lanes.commit(1, lane=0)]
            assert answers_of(await take(old, 3)) == more
            events = await take(new, 3)
            assert answers_of(events) == more
            assert feed.listeners == 2
            async with aclosing(feed.listen(events[0].cursor)) as resumed:
                assert answers_of(await take(resumed, 2)) == more[1:]
        assert feed.listeners == 0
        return answers_of(first)

    assert asyncio.run(listen()) == ["0", "1"]


def test_feed_when_a_listener_falls_behind_what_is_kept_then_it_still_gets_each_once(tmp_path):
    lanes = Lanes(tmp_path, count=2)

    async def listen():
        feed = ResultFeed(tmp_path, poll_s=0, keep_events=3)
        async with aclosing(feed.listen(idle_s=0)) as slow, aclosing(feed.listen(idle_s=0)) as quick:
            assert isinstance(await anext(slow), Cursor)
            assert isinstance(await anext(quick), Cursor)
            expected = lanes.commit(1)
            got = answers_of(await take(slow, 1))
            await take(quick, 1)
            for n in range(6):
                expected += lanes.commit(2, lane=n % 2)
                await take(quick, 2)
            assert len(feed._kept) == 3
            got += answers_of(await take(slow, 12))
            expected += lanes.commit(1)
            return got + answers_of(await take(slow, 1)), expected

    got, expected = asyncio.run(listen())
    assert got == expected


def test_feed_when_the_disk_fails_for_a_moment_then_nothing_is_missed(tmp_path, monkeypatch, caplog):
    lanes = Lanes(tmp_path)
    real = result_tail.list_lanes
    failures = [OSError("no")]

    def sometimes(root):
        if failures and lanes.n:
            raise failures.pop()
        return real(root)

    async def listen():
        feed = ResultFeed(tmp_path, poll_s=0)
        async with aclosing(feed.listen(idle_s=0)) as listening:
            assert isinstance(await anext(listening), Cursor)
            monkeypatch.setattr(result_tail, "list_lanes", sometimes)
            expected = lanes.commit(3)
            return answers_of(await take(listening, 3)), expected

    got, expected = asyncio.run(listen())
    assert got == expected
    assert "results_not_read" in caplog.text


def test_feed_when_nobody_listens_then_it_does_not_look(tmp_path):
    async def listen():
        feed = ResultFeed(tmp_path, poll_s=0)
        async with aclosing(feed.listen(idle_s=0)) as listening:
            await anext(listening)
            (poller,) = [task for task in asyncio.all_tasks() if task.get_name() == "result-feed"]
        await asyncio.gather(poller, return_exceptions=True)
        return poller.cancelled()

    assert asyncio.run(listen())


def test_tail_when_a_damaged_checkpoint_was_taken_back_then_a_follower_far_behind_misses_nothing(tmp_path):
    lanes = Lanes(tmp_path)
    lanes.commit()
    place = newest_cursor(tmp_path)
    for _ in range(10):
        lanes.commit()
    (epoch_folder(tmp_path, 0, 11) / MANIFEST_NAME).write_text("{")
    recover(tmp_path, lanes=1, identity={})
    assert len(list_committed(tmp_path, 0)) < KEPT_EPOCHS

    assert poll(ResultTail(tmp_path, place)) == [str(n) for n in range(1, 10)]
