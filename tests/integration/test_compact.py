"""Compactions beside a writing lane and reading programs, killed again and again: every reader sees each row once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext

import duckdb
import numpy as np
import pyarrow.dataset as ds
import pytest

from stormline.operators.rows import Chunk, Position, Result
from stormline.pipeline.compacted_files import is_compacted
from stormline.pipeline.compaction import Compaction, CompactionSpec
from stormline.pipeline.files_lock import files_stay
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.recovery import recover
from stormline.pipeline.result_tail import ResultTail
from stormline.pipeline.token_files import TokenFiles

pytestmark = pytest.mark.timeout(120)

NOON_NS = 1_769_860_800 * 10**9  # 2026-01-31T12:00:00Z
ROUNDS = 6  # of compaction beside the readers
EPOCHS_BEFORE = 60
SPEC = CompactionSpec(("results", "tokens"), min_age_s=-1, min_files=4, grace_s=0.3)
# Compacts for ever, one time after the other; the parent kills it.
COMPACT_FOR_EVER = """
import sys
from pathlib import Path
from stormline.pipeline.compaction import Compaction, CompactionSpec
spec = CompactionSpec(("results", "tokens"), min_age_s=-1, min_files=4, grace_s=0.05)
compaction = Compaction(Path(sys.argv[1]), spec)
print("ready", flush=True)
while True:
    compaction.run()
"""


class Repeated:
    """Does something over and over in a thread, until the block ends; what it died of is then raised."""

    PAUSE_S = 0.0

    def __init__(self):
        self._stop = threading.Event()
        self._died_of = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def alive(self):
        return self._thread.is_alive()

    def once(self):
        raise NotImplementedError

    def _run(self):
        try:
            while not self._stop.wait(self.PAUSE_S):
                self.once()
        except Exception as error:  # noqa: BLE001 (the edge of the thread)
            self._died_of = error

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        if self._died_of is not None:
            raise self._died_of


class Writer(Repeated):
    """A lane that commits one numbered row at a time."""

    PAUSE_S = 0.01

    def __init__(self, root):
        super().__init__()
        recovery = recover(root, lanes=1, identity={})
        self._writer = EpochWriter(recovery.for_lane(0, [("video", 0)]), model="m", identity={})
        self.n = next((p.next_offset for p in recovery.for_lane(0, [("video", 0)]).positions), 0)

    def once(self):
        at_ns = NOON_NS + self.n * 10**9
        tokens = np.full((1, 4), self.n % 1000, np.float16)
        self._writer.commit(
            chunks=[Chunk("cam", "s", self.n, at_ns, at_ns, 0, 4, 0.5, "video", 0, self.n, 0, tokens)],
            results=[Result("q", "caption", "cam", "s", at_ns, at_ns, "?", str(self.n), False, 1, "", 1.0, "m", at_ns)],
            positions=[Position("video", 0, self.n + 1)],
            snapshots={},
        )
        self.n += 1


def with_duckdb(root):
    found = duckdb.connect().sql(f"select answer from '{root}/results/**/*.parquet'").fetchall()
    return [int(answer) for (answer,) in found]


def with_pyarrow(root):
    return [int(n) for n in ds.dataset(root / "results", format="parquet").to_table(["answer"])["answer"].to_pylist()]


class Reader(Repeated):
    """Reads the whole folder again and again; notes what it saw."""

    def __init__(self, read, root, writer, *, lock):
        super().__init__()
        self._read, self._root, self._writer, self._lock = read, root, writer, lock
        self.n_right = self.n_failed = 0
        self.wrong = []

    def once(self):
        at_least = self._writer.n  # committed before we look
        try:
            with files_stay(self._root) if self._lock else nullcontext():
                seen = self._read(self._root)
        except (FileNotFoundError, duckdb.IOException):
            self.n_failed += 1
            return
        if len(seen) == len(set(seen)) and set(range(at_least)) <= set(seen):
            self.n_right += 1
        else:
            self.wrong.append((at_least, len(seen), len(set(seen))))


@pytest.mark.parametrize("read", [with_duckdb, with_pyarrow])
def test_reader_when_it_reads_in_a_loop_while_files_are_compacted_then_it_sees_each_row_once(tmp_path, read):
    """Without the lock a read may fail, loudly, where the files that it listed have gone; under the lock none does."""
    filled = Writer(tmp_path)
    for _ in range(EPOCHS_BEFORE):
        filled.once()
    compaction = Compaction(tmp_path, SPEC)

    with (
        Writer(tmp_path) as writer,
        Reader(read, tmp_path, writer, lock=True) as locked,
        Reader(read, tmp_path, writer, lock=False) as unlocked,
    ):
        n_merged = 0
        while n_merged < ROUNDS or not (locked.n_right and unlocked.n_right):
            assert writer.alive
            assert locked.alive
            assert unlocked.alive
            n_merged += sum(done.name.startswith("results") for done in compaction.run().dates)

    assert locked.wrong == unlocked.wrong == []
    assert locked.n_failed == 0
    assert sorted(read(tmp_path)) == list(range(writer.n))


@contextmanager
def compacting(root):
    """Have a process compact over and over; it is killed at the end of the block, however that ends."""
    command = [sys.executable, "-c", COMPACT_FOR_EVER, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


def any_compacted(root):
    return any(is_compacted(path.name) for path in (root / "results").rglob("*.parquet"))


def test_compaction_when_killed_at_any_moment_then_followers_and_tables_have_each_row_once(tmp_path):
    filled = Writer(tmp_path)
    for _ in range(EPOCHS_BEFORE):
        filled.once()
    tail, tokens, followed = ResultTail(tmp_path), TokenFiles(tmp_path), []

    with Writer(tmp_path) as writer:
        for k in range(4):
            with compacting(tmp_path):
                until_s = time.monotonic() + 0.3 + 0.17 * k  # so that it is killed at different moments
                # The last one lives until something is compacted, however long that takes on a busy machine.
                while time.monotonic() < until_s or (k == 3 and not any_compacted(tmp_path)):
                    assert writer.alive
                    followed += [int(event.values["answer"]) for event in tail.poll()]
                    tokens.refresh()
                    index = tokens.index("cam", 0, 2 * NOON_NS)
                    assert np.all(np.diff(index.start_ns) == 10**9), "a chunk is missing or there twice"
                    chunks = tokens.read("cam", index.start_ns[-200:])
                    assert [int(c.tokens[0, 0]) for c in chunks] == [n % 1000 for n in range(len(index))][-200:]

    followed += [int(event.values["answer"]) for event in tail.poll()]
    assert followed == list(range(writer.n))
    recover(tmp_path, lanes=1, identity={})
    assert sorted(with_duckdb(tmp_path)) == list(range(writer.n))
    Compaction(tmp_path, SPEC).run()
    assert list((tmp_path / "compactions").glob("*/")) == []
    assert sorted(with_pyarrow(tmp_path)) == list(range(writer.n))
