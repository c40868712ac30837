"""Few large files instead of many small ones: the same rows for every reader, whenever it is stopped."""

import json
import os
from dataclasses import replace
from itertools import islice

import duckdb
import numpy as np
import polars as pl
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from stormline.operators.errors import CheckpointError, CommitError, OutputLockedError
from stormline.operators.rows import Chunk, DeadLetter, Position, Result
from stormline.pipeline import compaction
from stormline.pipeline.checkpoint import KEPT_EPOCHS, MANIFEST_NAME, epoch_folder, list_committed
from stormline.pipeline.cli import app
from stormline.pipeline.compacted_files import is_compacted, read_parts
from stormline.pipeline.compaction import FOLDER, Compaction, CompactionSpec, DateReport
from stormline.pipeline.files_lock import files_stay
from stormline.pipeline.output_lock import OutputLock
from stormline.pipeline.parquet_sink import EpochWriter, find_data_files
from stormline.pipeline.recovery import recover, recover_lane
from stormline.pipeline.result_tail import ResultTail
from stormline.pipeline.table_reader import RowFilter, TableReader
from stormline.pipeline.tables import RESULTS, TABLES
from stormline.pipeline.token_files import TokenFiles

NOON_NS = 1_769_860_800 * 10**9  # 2026-01-31T12:00:00Z
DAY_NS = 86_400 * 10**9
ALL = CompactionSpec(min_age_s=-1, min_files=2, grace_s=0)


class KilledError(BaseException):
    """Not an `Exception`: nothing is tidied up on the way out, as when the process is killed."""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Lanes:
    """Commits one row of each table at a time; the number in it says which."""

    def __init__(self, root, count=2):
        self.root, self.n = root, 0
        self.start(count)

    def start(self, count):
        recovery = recover(self.root, lanes=count, identity={})
        self.offsets = [
            next((p.next_offset for p in recovery.for_lane(i, [("video", i)]).positions), 0) for i in range(count)
        ]
        self.writers = [EpochWriter(recovery.for_lane(i, [("video", i)]), model="m", identity={}) for i in range(count)]

    def commit(self, n_epochs=1, day=0):
        for _ in range(n_epochs):
            lane = self.n % len(self.writers)
            at_ns = NOON_NS + day * DAY_NS + self.n * 10**9
            text, stream = str(self.n), f"cam-{lane}"
            tokens = np.full((2, 3), self.n % 1000, np.float16)
            self.offsets[lane] += 1
            self.writers[lane].commit(
                chunks=[Chunk(stream, "s", self.n, at_ns, at_ns, 0, 4, 0.5, "video", lane, self.n, 0, tokens)],
                results=[Result("q", "caption", stream, "s", at_ns, at_ns, "?", text, False, 1, "", 1.0, "m", at_ns)],
                dead_letters=[DeadLetter("gap", text, stream, "s", self.n, "video", lane, self.n, at_ns, 0)],
                positions=[Position("video", lane, self.offsets[lane])],
                snapshots={},
            )
            self.n += 1


def compact(root, spec=ALL, cls=Compaction):
    return cls(root, spec, sleep=lambda seconds: None).run()


def files(root, table="results"):
    return sorted(p.name for p in (root / table).glob("date=*/*.parquet"))


def rows(root, table):
    return sorted(
        ds.dataset(root / table, format="parquet", partitioning="hive").to_table().to_pylist(),
        key=lambda row: (row["stream_id"], row["start_time"]),
    )


def all_rows(root):
    return {table: rows(root, table) for table in TABLES}


def test_compaction_when_done_then_every_reader_finds_the_same_rows_in_few_files(tmp_path):
    lanes = Lanes(tmp_path)
    lanes.commit(40)
    before = all_rows(tmp_path)

    report = compact(tmp_path)

    assert all_rows(tmp_path) == before
    # Of each lane the newest two epochs may still have to be taken back.
    assert report.dates == [
        DateReport(f"{table}/date=2026-01-31", 36, each.bytes_before, 1, each.bytes_after, 36)
        for table, each in zip(sorted(TABLES), report.dates, strict=True)
    ]
    assert all(each.bytes_after < each.bytes_before / 3 for each in report.dates)
    assert [is_compacted(name) for name in files(tmp_path)] == [True, False, False, False, False]
    assert list((tmp_path / FOLDER).glob("*/")) == []
    pattern = f"{tmp_path}/results/**/*.parquet"
    assert duckdb.sql(f"select count(*), count(distinct answer) from '{pattern}'").fetchall() == [(40, 40)]
    assert pl.scan_parquet(pattern).select(pl.len()).collect().item() == 40


def test_file_when_compacted_then_as_a_lanes_own_but_for_its_parts(tmp_path):
    Lanes(tmp_path).commit(20)

    compact(tmp_path)

    (path,) = (p for p in (tmp_path / "results").rglob("*.parquet") if is_compacted(p.name))
    file = pq.ParquetFile(path)
    assert file.schema_arrow.equals(RESULTS, check_metadata=False)
    assert file.schema_arrow.metadata[b"stormline.schema_version"] == b"1"
    assert file.metadata.row_group(0).column(4).statistics.min.isoformat() == "2026-01-31T12:00:00+00:00"
    assert file.read()["answer"].to_pylist() == [str(n) for n in range(16)], "not in the order of epochs"
    parts = read_parts(path)
    assert [part.n_rows for part in parts] == [1] * 16
    assert [(part.epoch, part.lane) for part in parts] == sorted((part.epoch, part.lane) for part in parts)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_compaction_when_killed_after_a_step_then_nothing_is_lost_or_doubled_and_the_next_one_tidies_up(
    tmp_path, number
):
    class Killed(Compaction):
        def step_done(self, step):
            if step == number:
                raise KilledError

    lanes = Lanes(tmp_path)
    lanes.commit(30)
    lanes.commit(30, day=1)
    before = all_rows(tmp_path)

    with pytest.raises(KilledError):
        compact(tmp_path, cls=Killed)

    assert all_rows(tmp_path) == before
    recover(tmp_path, lanes=2, identity={})
    assert all_rows(tmp_path) == before
    compact(tmp_path)
    assert all_rows(tmp_path) == before
    assert len(files(tmp_path)) == 2 + 4
    assert list((tmp_path / FOLDER).glob("*/")) == []


def test_compaction_when_done_again_and_again_then_each_row_stays_where_it_was_made(tmp_path):
    lanes = Lanes(tmp_path)
    for _ in range(4):
        lanes.commit(10)
        compact(tmp_path)

    assert sum(is_compacted(name) for name in files(tmp_path)) == 1
    events = list(ResultTail(tmp_path).poll())
    assert [event.values["answer"] for event in events] == [str(n) for n in range(40)]
    assert [event.row_id for event in islice(events, 3)] == ["0-1-0", "1-1-0", "0-2-0"]


def test_compaction_when_a_file_is_full_then_the_next_begins_and_large_ones_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "ROW_GROUP_ROWS", 4)  # a file's size counts once they are written
    monkeypatch.setattr(compaction, "SMALL_SHARE", 4.0)  # so that these files count as small beside a tiny target
    Lanes(tmp_path).commit(40)
    one = next(find_data_files(tmp_path, ["results"])).path.stat().st_size
    spec = CompactionSpec(("results",), target_bytes=one // 2, min_age_s=-1, min_files=2, grace_s=0)

    compact(tmp_path, spec)

    sizes = [p.stat().st_size for p in (tmp_path / "results").rglob("*.parquet") if is_compacted(p.name)]
    assert len(sizes) > 1
    assert len(rows(tmp_path, "results")) == 40
    monkeypatch.setattr(compaction, "SMALL_SHARE", 0.5)
    assert Compaction(tmp_path, replace(spec, target_bytes=2 * min(sizes))).plan() == []


def test_compaction_when_files_are_young_or_few_then_they_are_left(tmp_path):
    Lanes(tmp_path).commit(20)

    assert Compaction(tmp_path, CompactionSpec(min_age_s=60)).plan() == []
    assert Compaction(tmp_path, CompactionSpec(min_age_s=-1, min_files=17)).plan() == []
    assert [len(p.files) for p in Compaction(tmp_path, CompactionSpec(min_age_s=-1, min_files=16)).plan()] == [16] * 3


def test_recovery_when_the_newest_checkpoints_are_damaged_after_a_compaction_then_no_row_is_lost_or_doubled(tmp_path):
    lanes = Lanes(tmp_path, count=1)
    lanes.commit(10)
    compact(tmp_path)
    for epoch in list_committed(tmp_path, 0)[:2]:
        (epoch_folder(tmp_path, 0, epoch) / MANIFEST_NAME).write_bytes(b"{")

    recovery = recover(tmp_path, lanes=1, identity={})

    assert recovery.partitions["video", 0].next_offset == 8
    assert [row["detail"] for row in rows(tmp_path, "dead_letters")] == [str(n) for n in range(8)]


@pytest.mark.parametrize("how", ["older", "gone"])
def test_recovery_when_checkpoints_are_older_than_what_was_compacted_then_refused(tmp_path, how):
    lanes = Lanes(tmp_path, count=1)
    lanes.commit(10)
    compact(tmp_path)
    for epoch in list_committed(tmp_path, 0)[: None if how == "gone" else -1]:
        manifest = epoch_folder(tmp_path, 0, epoch) / MANIFEST_NAME
        manifest.unlink()
    if how == "older":
        oldest = list_committed(tmp_path, 0)[0]
        epoch_folder(tmp_path, 0, oldest).rename(epoch_folder(tmp_path, 0, 3))
        manifest = epoch_folder(tmp_path, 0, 3) / MANIFEST_NAME
        manifest.write_bytes(as_epoch(manifest.read_bytes(), 3))
    before = files(tmp_path)

    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"restore it, or choose|no checkpoint of that lane"):
            recover(tmp_path, lanes=1, identity={})

    assert files(tmp_path) == before


def as_epoch(manifest, epoch):
    from stormline.pipeline.checkpoint import _digest

    body = {**json.loads(manifest), "epoch": epoch}
    del body["sha256"]
    return json.dumps({**body, "sha256": _digest(body)}).encode()


def test_lane_when_a_compaction_comes_between_then_it_goes_on_and_restarts(tmp_path):
    lanes = Lanes(tmp_path)
    lanes.commit(9)
    compact(tmp_path)
    lanes.commit(9)
    recover_lane(tmp_path, 1, lanes=2, partitions=[("video", 1)], identity={})
    lanes.start(3)
    lanes.commit(9)
    compact(tmp_path)

    assert [int(row["detail"]) for row in sorted(rows(tmp_path, "dead_letters"), key=lambda r: r["seq"])] == list(
        range(27)
    )


def test_tail_when_its_files_were_compacted_then_it_goes_on_after_any_event_with_the_same_ids(tmp_path):
    lanes = Lanes(tmp_path)
    lanes.commit(12)
    lanes.commit(12, day=1)
    before = list(ResultTail(tmp_path).poll())

    compact(tmp_path)

    for i, event in enumerate(before):
        after = list(ResultTail(tmp_path, event.cursor).poll())
        assert [(e.row_id, e.values) for e in after] == [(e.row_id, e.values) for e in before[i + 1 :]]


def test_tail_when_a_compaction_comes_in_the_middle_of_a_poll_then_nothing_is_missed_or_repeated(tmp_path):
    lanes = Lanes(tmp_path, count=1)
    lanes.commit(80)  # more than a page
    following = ResultTail(tmp_path).poll()
    first = list(islice(following, 66))

    compact(tmp_path)

    rest = list(following)
    assert [event.values["answer"] for event in [*first, *rest]] == [str(n) for n in range(80)]


def test_rows_when_read_by_us_then_as_before(tmp_path):
    lanes = Lanes(tmp_path)
    lanes.commit(20)
    asked = [("results", None), ("results", "cam-1"), ("results", "x*"), ("dead_letters", None)]
    readers = [TableReader(tmp_path, table, RowFilter(stream=stream)) for table, stream in asked]
    before = [(reader.newest(7), reader.newest(100)) for reader in readers]

    compact(tmp_path)

    assert [(reader.newest(7), reader.newest(100)) for reader in readers] == before
    lanes.commit(20)
    compact(tmp_path)  # what was not shown yet
    shown = [reader.fresh() for reader in readers]
    assert [len(each) for each in shown] == [20, 10, 0, 20]
    assert [row["answer"] for row in shown[0]] == [str(n) for n in range(20, 40)]


def test_tokens_when_compacted_after_they_were_looked_up_then_read_from_where_they_are(tmp_path):
    lanes = Lanes(tmp_path, count=1)
    lanes.commit(12)
    tokens = TokenFiles(tmp_path)
    tokens.refresh()
    index = tokens.index("cam-0", 0, 2 * NOON_NS)

    compact(tmp_path)

    assert [int(chunk.tokens[0, 0]) for chunk in tokens.read("cam-0", index.start_ns)] == list(range(12))
    lanes.commit(6)
    compact(tmp_path)
    tokens.refresh()
    assert tokens.streams() == {"cam-0": (NOON_NS, NOON_NS + 17 * 10**9, 18)}
    fresh = TokenFiles(tmp_path)
    fresh.refresh()
    assert fresh.streams() == tokens.streams()


def test_tokens_when_a_compacted_file_is_damaged_then_the_others_are_there(tmp_path):
    lanes = Lanes(tmp_path, count=1)
    lanes.commit(8)
    lanes.commit(8, day=1)
    compact(tmp_path)
    damaged = next(path for path in (tmp_path / "tokens/date=2026-01-31").iterdir() if is_compacted(path.name))
    damaged.write_bytes(b"")
    tokens = TokenFiles(tmp_path)

    tokens.refresh()

    assert tokens.streams()["cam-0"][2] == 8


def test_tokens_when_compacted_files_are_being_read_then_what_they_took_in_is_not_missing(tmp_path):
    class LookedAtWhileReading(TokenFiles):
        def _take_in(self, files):
            seen.append(self.streams())
            super()._take_in(files)

    seen = []
    Lanes(tmp_path, count=1).commit(12)
    tokens = LookedAtWhileReading(tmp_path)
    tokens.refresh()
    before = tokens.streams()
    compact(tmp_path)

    tokens.refresh()

    assert seen == [{}, before]
    assert tokens.streams() == before


def test_date_when_something_else_lies_in_it_then_files_stay_and_folders_keep_it_as_it_is(tmp_path):
    lanes = Lanes(tmp_path)
    lanes.commit(10)
    lanes.commit(10, day=1)
    first, second = sorted((tmp_path / "results").glob("date=*"))
    (first / "note.txt").write_text("mine")
    (first / ".lane-000-epoch-00000099.parquet.tmp").write_bytes(b"left by a lane that died")
    (second / "more").mkdir()
    names = sorted(p.name for p in second.iterdir())

    report = compact(tmp_path, CompactionSpec(("results",), min_age_s=-1, min_files=2, grace_s=0))

    assert [d.name for d in report.dates] == ["results/date=2026-01-31"]
    assert (first / "note.txt").read_text() == "mine"
    assert not list(first.glob(".*"))
    (failure,) = report.failures
    assert "results/date=2026-02-01" in failure
    assert "is no file" in failure
    assert sorted(p.name for p in second.iterdir()) == names
    assert list((tmp_path / FOLDER).glob("*/")) == []


def test_date_when_a_file_cannot_be_read_then_it_is_left_and_the_others_go_on(tmp_path):
    lanes = Lanes(tmp_path)
    lanes.commit(10)
    lanes.commit(10, day=1)
    bad = sorted((tmp_path / "results").rglob("*.parquet"))[3]
    bad.write_bytes(b"PAR1 no longer")

    report = compact(tmp_path, CompactionSpec(("results",), min_age_s=-1, min_files=2, grace_s=0))

    assert [d.name for d in report.dates] == ["results/date=2026-02-01"]
    assert "results/date=2026-01-31" in report.failures[0]
    assert bad.exists()
    assert list((tmp_path / FOLDER).glob("*/")) == []


def test_date_when_recovery_removed_a_file_meanwhile_then_it_is_left_as_it_is(tmp_path):
    class Removed(Compaction):
        def step_done(self, number):
            if number == 1:
                next(find_data_files(tmp_path, ["results"])).path.unlink()

    Lanes(tmp_path).commit(10)

    report = compact(tmp_path, CompactionSpec(("results",), min_age_s=-1, min_files=2, grace_s=0), cls=Removed)

    assert report.dates == []
    assert "deleted meanwhile" in report.failures[0]
    assert len(rows(tmp_path, "results")) == 9


def test_compaction_when_a_reader_holds_the_lock_then_it_waits_and_says_so(tmp_path):
    Lanes(tmp_path).commit(10)
    before = files(tmp_path)

    with files_stay(tmp_path):
        report = compact(tmp_path, CompactionSpec(min_age_s=-1, min_files=2, grace_s=0, lock_wait_s=0))

    assert report.dates == []
    assert all("was held by another process" in failure for failure in report.failures)
    assert files(tmp_path) == before


def test_compaction_when_another_one_runs_then_refused(tmp_path):
    Lanes(tmp_path).commit(10)
    (tmp_path / FOLDER).mkdir()

    with OutputLock(tmp_path / FOLDER), pytest.raises(OutputLockedError):
        compact(tmp_path)


def test_file_system_when_it_cannot_exchange_folders_then_nothing_is_done(tmp_path, monkeypatch):
    def refuse(one, other):
        raise OSError(22, "Invalid argument")

    Lanes(tmp_path).commit(10)
    before = files(tmp_path)
    monkeypatch.setattr(compaction, "exchange_folders", refuse)

    with pytest.raises(CommitError, match=r"cannot exchange two folders.*Expected a local one"):
        compact(tmp_path)

    assert files(tmp_path) == before
    assert list((tmp_path / FOLDER).glob("*/")) == []


def run_command(*args):
    return CliRunner().invoke(app, ["compact", *map(str, args)])


def test_command_when_run_then_it_says_what_it_did_and_a_dry_run_does_nothing(tmp_path):
    Lanes(tmp_path).commit(20)
    before = files(tmp_path)
    options = ["--min-age", "0s", "--grace", "0s", "--table", "results"]

    dry = run_command(tmp_path, "--dry-run", *options)
    after_dry = files(tmp_path)
    done = run_command(tmp_path, *options)
    again = run_command(tmp_path, *options)

    assert "results/date=2026-01-31: 16 files of" in dry.output
    assert "would become 1 at most" in dry.output
    assert after_dry == before
    assert "all: 16 rows, 16 files of" in done.output
    assert "are now 1 of" in done.output
    assert len(files(tmp_path)) == 5
    assert "Nothing to merge" in again.output
    assert (dry.exit_code, done.exit_code, again.exit_code) == (0, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", "captions"], "no table captions"),
        (["--min-age", "soon"], "'soon' is no length of time"),
        (["--target-mb", "inf"], "--target-mb inf is no size"),
    ],
)
def test_command_when_an_option_is_wrong_then_it_says_what_was_expected(tmp_path, options, message):
    Lanes(tmp_path).commit(1)

    assert message in str(run_command(tmp_path, *options).exception)


def test_command_when_a_table_is_named_twice_then_it_is_merged_once(tmp_path):
    Lanes(tmp_path).commit(20)

    done = run_command(tmp_path, "--min-age", "0s", "--grace", "0s", "--table", "results", "--table", "results")

    assert done.exit_code == 0, done.output
    assert done.output.count("results/date=") == 1


def test_command_when_its_folder_cannot_be_made_then_it_says_why(tmp_path):
    Lanes(tmp_path).commit(20)
    (tmp_path / FOLDER).write_text("in the way")

    done = run_command(tmp_path, "--min-age", "0s")

    assert isinstance(done.exception, CommitError)
    assert f"cannot read or write {tmp_path / FOLDER}" in str(done.exception)


def test_command_when_the_folder_is_none_of_ours_then_it_says_so(tmp_path):
    assert "is no output folder of stormline" in str(run_command(tmp_path).exception)


def test_compaction_when_a_partition_is_not_read_any_more_then_what_is_written_without_it_is_merged(tmp_path):
    def write(partitions, n, start):
        lane = recover(tmp_path, lanes=1, identity={}).for_lane(0, [("video", p) for p in partitions])
        writer = EpochWriter(lane, model="m", identity={})
        for i in range(start, start + n):
            made = Result("q", "caption", "c", "s", NOON_NS, NOON_NS, "?", str(i), False, 1, "", 1.0, "m", NOON_NS)
            writer.commit(results=[made], positions=[Position("video", p, i) for p in partitions], snapshots={})

    write([0, 1], 4, 1)
    write([0], 12, 5)

    compact(tmp_path)

    assert len(files(tmp_path)) <= 1 + KEPT_EPOCHS
    assert len(rows(tmp_path, "results")) == 16
