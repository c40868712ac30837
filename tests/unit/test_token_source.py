"""Tokens by stream and time: out of memory, out of written Parquet folders, and across both."""

import asyncio
import errno
import os
import threading
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from stormline.operators.rows import Chunk, Position
from stormline.pipeline.chunk_index import CANDIDATE_CHUNKS, POOLED_CHUNKS, ChunkIndex, choose_chunks, choose_policy
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.recovery import recover
from stormline.pipeline.token_files import TokenFiles
from stormline.pipeline.token_source import HELD_FOR_S, STORE_PAUSE_S, TokenSource
from stormline.pipeline.token_store import TokenMemory

S_NS = 10**9
NOON_NS = 1_769_860_800 * S_NS  # 2026-01-31T12:00:00Z
EVENING_NS = NOON_NS + 12 * 3600 * S_NS - 4 * S_NS  # two chunks before midnight
IDENTITY = {"model": "m"}


def make_chunk(index, stream="gate", origin_ns=NOON_NS, n_tokens=4):
    """A chunk of two seconds whose tokens are all its index."""
    start_ns = origin_ns + index * 2 * S_NS + 789  # not whole microseconds, as from 30000/1001 frames a second
    tokens = np.full((n_tokens, 3), index, np.float16)
    return Chunk(stream, "s", index, start_ns, start_ns + 2 * S_NS, NOON_NS, 4, 0.5, "video", 0, index, 0, tokens)


class Folder:
    """An output folder that one lane writes to."""

    def __init__(self, root):
        self.root = root
        self._writer = EpochWriter(recover(root, lanes=1, identity=IDENTITY).for_lane(0, (("video", 0),)),
                                   model="m", identity=IDENTITY)  # fmt: skip

    def commit(self, *chunks):
        offset = self._writer.next_epoch
        self._writer.commit(chunks=chunks, positions=[Position("video", 0, offset)], snapshots={})

    def abandon(self, *chunks):
        """Publish the rows of an epoch that is never committed."""

        class CutError(Exception):
            pass

        def stop(number):
            if number == 2:
                raise CutError

        self._writer.step_done = stop
        with pytest.raises(CutError):
            self.commit(*chunks)


class MemoryStore:
    """The token store without Ray."""

    def __init__(self, *chunks, max_bytes=10**9):
        self.memory = TokenMemory(max_bytes)
        for chunk in chunks:
            self.memory.put(chunk)

    async def held(self, stream_id):
        return self.memory.held(stream_id)

    async def pick(self, stream_id, starts_ns):
        return self.memory.pick(stream_id, starts_ns)

    async def streams(self):
        return self.memory.streams()


class DeadStore(MemoryStore):
    dead = True
    n_asked = 0

    async def held(self, stream_id):
        self.n_asked += 1
        if self.dead:
            raise ConnectionError
        return await super().held(stream_id)


class UnreadFiles(TokenFiles):
    """Fails where the disk is touched."""

    def refresh(self):
        raise AssertionError("the disk was touched")


class FailsFirst(TokenFiles):
    """Counts how often it looks at the disk, the first time in vain."""

    n_refreshed = 0

    def refresh(self):
        self.n_refreshed += 1
        if self.n_refreshed == 1:
            raise OSError("too many open files")
        super().refresh()


class AskedWhileReading(TokenFiles):
    """Is asked what it has in the midst of each reading of new files."""

    def __init__(self, root):
        super().__init__(root)
        self.answers = []

    def _take_in(self, files):
        asking = threading.Thread(target=self._ask, daemon=True)
        asking.start()
        asking.join(10)
        assert not asking.is_alive(), "who asks waits for the reading"
        super()._take_in(files)

    def _ask(self):
        self.answers.append((self.span("gate"), self.streams(), len(self.index("gate", 0, 2 * NOON_NS))))


def settled_days(root, n_days):
    """Commit three chunks to each of some days, each in a file of its own; return the days' files, long settled."""
    folder = Folder(root)
    for day in range(n_days):
        for index in range(3):
            folder.commit(make_chunk(index, origin_ns=NOON_NS + day * 24 * 3600 * S_NS))
    days = sorted((root / "tokens").iterdir())
    for date in days:
        os.utime(date, (NOON_NS // S_NS, NOON_NS // S_NS))
    return [sorted(date.iterdir()) for date in days]


def read_all(source, start_s=0, end_s=10**5, stream="gate"):
    """Return what each chunk's tokens say, in order."""

    async def read():
        found = await (await source.look_up(stream)).index(NOON_NS + int(start_s * S_NS), NOON_NS + int(end_s * S_NS))
        return await source.read(found, np.arange(len(found.chunks)))

    return [int(chunk.tokens[0, 0]) for chunk in asyncio.run(read())]


def last_ns(source, stream):
    async def find():
        return await (await source.look_up(stream)).last_ns()

    return asyncio.run(find())


def test_files_when_read_then_the_range_of_that_stream_in_order(tmp_path):
    folder = Folder(tmp_path)
    folder.commit(make_chunk(0), make_chunk(1), make_chunk(1, "yard"))
    folder.commit(make_chunk(2), make_chunk(3), make_chunk(4, "yard"))
    source = TokenSource(TokenFiles(tmp_path), MemoryStore())

    assert read_all(source) == [0, 1, 2, 3]
    assert read_all(source, 3, 4.5) == [1, 2]
    assert read_all(source, stream="yard") == [1, 4]
    assert read_all(source, stream="nobody") == []
    assert last_ns(source, "yard") == make_chunk(4).end_ns // 1000 * 1000
    assert last_ns(source, "nobody") is None


def test_files_when_a_lane_goes_on_writing_then_what_it_commits_is_found(tmp_path):
    folder, files = Folder(tmp_path), TokenFiles(tmp_path)
    source = TokenSource(files, MemoryStore(), clock_s=count().__next__)
    assert read_all(source) == []

    folder.commit(make_chunk(0))
    first = read_all(source)
    folder.commit(make_chunk(1), make_chunk(2, origin_ns=EVENING_NS))

    assert (first, read_all(source)) == ([0], [0, 1, 2])
    assert asyncio.run(source.streams())["gate"].n_chunks == 3


def test_files_when_several_ask_at_the_same_moment_then_they_are_looked_at_once(tmp_path):
    now_s = 0.0
    Folder(tmp_path).commit(make_chunk(0))
    files = FailsFirst(tmp_path)
    source = TokenSource(files, MemoryStore(), clock_s=lambda: now_s)
    with pytest.raises(OSError, match="too many"):
        read_all(source)

    async def ask_together():
        views = await asyncio.gather(*(source.look_up("gate") for _ in range(8)))
        return await asyncio.gather(*(view.last_ns() for view in views))

    assert set(asyncio.run(ask_together())) == {make_chunk(0).end_ns // 1000 * 1000}
    assert files.n_refreshed == 2
    now_s = HELD_FOR_S
    read_all(source)
    assert files.n_refreshed == 3


def test_files_when_asked_while_they_are_read_then_answered_at_once_from_what_was_there(tmp_path):
    folder, files = Folder(tmp_path), AskedWhileReading(tmp_path)
    folder.commit(make_chunk(0), make_chunk(1))
    files.refresh()
    folder.commit(make_chunk(2))
    span = files.span("gate")

    files.refresh()

    assert files.answers == [(None, {}, 0), (span, {"gate": span}, 2)]
    assert files.span("gate")[2] == 3


def test_files_when_chunks_were_read_of_late_then_their_files_are_not_opened_again(tmp_path, monkeypatch):
    folder, files = Folder(tmp_path), TokenFiles(tmp_path)
    for first in range(0, 8, 2):
        folder.commit(make_chunk(first), make_chunk(first + 1))
    source = TokenSource(files, MemoryStore())
    opened = []
    monkeypatch.setattr(files, "_read_files", lambda paths, *args: opened.append(len(paths)) or real(paths, *args))
    real = TokenFiles._read_files.__get__(files)

    assert read_all(source, 0, 8) == [0, 1, 2, 3]
    assert read_all(source, 2, 12) == [1, 2, 3, 4, 5]
    assert read_all(source, 4, 10) == [2, 3, 4]
    assert opened == [2, 1]

    files._cached.max_bytes = 2 * make_chunk(0).tokens.nbytes
    read_all(source, 12, 16)
    assert len(files._cached) == 2
    assert read_all(source, 0, 16) == list(range(8))


def test_choice_when_the_range_moves_on_then_most_of_it_stays():
    starts = 10**18 + 2 * 10**9 * np.arange(18_100, dtype=np.int64)
    index = ChunkIndex(starts, starts + 2 * 10**9, np.full(len(starts), 16, np.int32))
    now, later = (index.where(np.arange(first, first + 18_000)) for first in (0, 30))

    before, after = (set(i.start_ns[choose_chunks(i, 256, "global_local")].tolist()) for i in (now, later))

    assert POOLED_CHUNKS // 2 <= len(before) <= POOLED_CHUNKS + 8
    assert len(before & after) >= len(before) - 8 - 4  # but for the newest, which are read in detail


def test_files_when_an_epoch_is_not_committed_then_its_rows_do_not_count(tmp_path):
    folder = Folder(tmp_path)
    folder.commit(make_chunk(0))
    source = TokenSource(TokenFiles(tmp_path), MemoryStore(), clock_s=count().__next__)
    folder.abandon(make_chunk(1))
    before = read_all(source)

    again = Folder(tmp_path)
    again.commit(make_chunk(1), make_chunk(2))

    assert (before, read_all(source)) == ([0], [0, 1, 2])


def test_files_when_recovery_took_one_away_then_the_rest_is_read(tmp_path):
    folder = Folder(tmp_path)
    folder.commit(make_chunk(0))
    folder.commit(make_chunk(1))
    source = TokenSource(TokenFiles(tmp_path), MemoryStore())
    assert asyncio.run(source.streams())["gate"].n_chunks == 2

    next((tmp_path / "tokens").rglob("*epoch-00000001.parquet")).unlink()

    assert read_all(source) == [1]


def test_files_when_the_disk_fails_once_then_the_next_refresh_has_everything(tmp_path, monkeypatch):
    from stormline.pipeline import token_files

    settled_days(tmp_path, n_days=2)
    files = TokenFiles(tmp_path)
    failures = [OSError(errno.EMFILE, "Too many open files")]
    real = token_files.ds.dataset

    def fail_once(paths, **how):
        if failures:
            raise failures.pop()
        return real(paths, **how)

    monkeypatch.setattr(token_files.ds, "dataset", fail_once)

    with pytest.raises(OSError, match="Too many open files"):
        files.refresh()
    files.refresh()

    assert files.span("gate")[2] == 6


@pytest.mark.parametrize("left", [0, 200])
def test_files_when_one_is_damaged_then_it_alone_is_left_out_and_told_of_once(tmp_path, caplog, left):
    days = settled_days(tmp_path, n_days=3)
    damaged = days[1][0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:left])
    files = TokenFiles(tmp_path)

    for _ in range(3):
        files.refresh()

    assert files.span("gate")[2] == 8
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"{damaged} is damaged" in told

    damaged.write_bytes(whole)  # brought back, which does not change the folder's time
    files.refresh()
    assert files.span("gate")[2] == 9


def test_files_when_a_range_is_short_then_only_its_files_are_opened(tmp_path, monkeypatch):
    from stormline.pipeline import token_files

    folder = Folder(tmp_path)
    for index in range(20):
        folder.commit(make_chunk(index))
    source = TokenSource(TokenFiles(tmp_path), MemoryStore())
    asyncio.run(source.streams())
    opened = []
    real = token_files.ds.dataset
    monkeypatch.setattr(token_files.ds, "dataset", lambda paths, **how: opened.extend(paths) or real(paths, **how))

    assert read_all(source, 9.9, 13) == [4, 5, 6]
    assert len(opened) == 3


def test_source_when_the_store_holds_the_range_then_the_disk_is_not_touched(tmp_path):
    source = TokenSource(UnreadFiles(tmp_path), MemoryStore(*map(make_chunk, range(5))))

    assert read_all(source, 2.5, 9) == [1, 2, 3, 4]


def test_source_when_the_store_has_only_the_newest_then_parquet_gives_the_rest_and_nothing_comes_twice(tmp_path):
    chunks = [make_chunk(index) for index in range(8)]
    folder = Folder(tmp_path)
    folder.commit(*chunks[:3])
    folder.commit(*chunks[3:6])  # 6 and 7 are not committed yet
    restarted = MemoryStore(*chunks[4:])
    full = MemoryStore(*chunks, max_bytes=chunks[0].tokens.nbytes * 5)

    assert read_all(TokenSource(TokenFiles(tmp_path), restarted)) == list(range(8))
    assert read_all(TokenSource(TokenFiles(tmp_path), full)) == list(range(8))


def test_source_when_the_store_is_dead_then_parquet_answers(tmp_path):
    Folder(tmp_path).commit(*map(make_chunk, range(3)))

    assert read_all(TokenSource(TokenFiles(tmp_path), DeadStore())) == [0, 1, 2]


def test_source_when_the_store_does_not_answer_then_it_is_left_alone_for_a_while(tmp_path):
    now_s = 0.0
    chunks = [make_chunk(index) for index in range(3)]
    Folder(tmp_path).commit(*chunks[:2])
    store = DeadStore(*chunks)
    source = TokenSource(TokenFiles(tmp_path), store, clock_s=lambda: now_s)

    during = [read_all(source) for _ in range(3)]
    n_asked, store.dead, now_s = store.n_asked, False, STORE_PAUSE_S

    assert (during, n_asked) == ([[0, 1]] * 3, 1)
    assert read_all(source) == [0, 1, 2]


def test_source_when_chunks_leave_the_store_before_they_are_read_then_parquet_gives_them(tmp_path):
    chunks = [make_chunk(index) for index in range(4)]
    Folder(tmp_path).commit(*chunks)
    store = MemoryStore(*chunks)
    source = TokenSource(TokenFiles(tmp_path), store)

    async def read():
        found = await (await source.look_up("gate")).index(NOON_NS, NOON_NS + 100 * S_NS)
        store.memory = TokenMemory(10**9)
        return await source.read(found, np.arange(4))

    assert [int(c.tokens[0, 0]) for c in asyncio.run(read())] == [0, 1, 2, 3]


def test_streams_when_some_are_in_memory_and_some_on_disk_then_all_with_first_and_last_time(tmp_path):
    Folder(tmp_path).commit(make_chunk(0), make_chunk(0, "yard"))
    source = TokenSource(TokenFiles(tmp_path), MemoryStore(make_chunk(1), make_chunk(5, "attic")))

    spans = asyncio.run(source.streams())

    assert list(spans) == ["attic", "gate", "yard"]
    assert spans["gate"].start_ns // 1000 == make_chunk(0).start_ns // 1000
    assert spans["gate"].end_ns == make_chunk(1).end_ns


def test_memory_when_an_older_chunk_comes_late_then_it_is_not_taken_for_all_since(tmp_path):
    store = MemoryStore(make_chunk(10), make_chunk(11), make_chunk(2))

    held = store.memory.held("gate")

    assert held is not None
    assert held.complete_from_ns == make_chunk(10).start_ns


def make_index(n, n_tokens=4):
    starts = np.arange(n, dtype=np.int64)
    return ChunkIndex(starts, starts + 1, np.full(n, n_tokens, np.int32))


@pytest.mark.parametrize("policy", ["recent", "uniform", "global_local", "relevant", "changes"])
def test_choose_when_the_range_fits_then_all_else_a_bounded_number_with_the_newest(policy):
    assert choose_chunks(make_index(10), 40, policy).tolist() == list(range(10))

    hour, week = (choose_chunks(make_index(n), 400, policy) for n in (1800, 302_400))

    assert max(len(hour), len(week)) <= 100 + max(POOLED_CHUNKS, CANDIDATE_CHUNKS)
    assert len(week) >= len(hour) / 2
    assert week[-1] == 302_399
    assert len(set(week.tolist())) == len(week)


def test_choose_when_a_chunk_is_larger_than_the_budget_then_the_newest_alone():
    assert choose_chunks(make_index(5, n_tokens=100), 8, "recent").tolist() == [4]


def test_auto_when_the_range_fits_then_recent_else_what_changes_or_global_local():
    fits, longer, long = make_index(32, 16), make_index(33, 16), make_index(CANDIDATE_CHUNKS + 1, 16)

    assert choose_policy("auto", fits, 512) == "recent"
    assert choose_policy("auto", longer, 512) == "changes"
    assert choose_policy("auto", long, 512) == "global_local"
    assert choose_policy("uniform", long, 512) == "uniform"


def test_put_when_a_chunk_is_replaced_then_held_once():
    store = MemoryStore(make_chunk(0), replace(make_chunk(0), scene_score=0.1))

    held = store.memory.held("gate")

    assert held is not None
    assert len(held.index) == 1


def test_source_when_a_later_session_has_earlier_times_then_what_was_committed_before_is_not_hidden(tmp_path):
    folder = Folder(tmp_path)
    folder.commit(*(make_chunk(index) for index in range(10)))
    late = [replace(make_chunk(index), session="late", start_ns=make_chunk(index).start_ns + S_NS) for index in (4, 5)]
    source = TokenSource(TokenFiles(tmp_path), MemoryStore(*late))
    asyncio.run(source.streams())  # as the service does when it starts

    assert last_ns(source, "gate") == make_chunk(9).end_ns // 1000 * 1000
    assert read_all(source, 12.5, 18.5) == [6, 7, 8, 9]
    assert read_all(source) == [0, 1, 2, 3, 4, 4, 5, 5, 6, 7, 8, 9]


def test_source_when_the_store_has_what_the_files_have_then_each_chunk_comes_once(tmp_path):
    folder = Folder(tmp_path)
    folder.commit(*(make_chunk(index) for index in range(6)))
    source = TokenSource(TokenFiles(tmp_path), MemoryStore(*(make_chunk(index) for index in range(3, 9))))
    asyncio.run(source.streams())

    assert read_all(source) == list(range(9))
