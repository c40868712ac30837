"""Crash anywhere, change the number of lanes, damage a file: each record's rows are there once, or we are told.

The lane here is small, but its state matters (a row depends on all records of its stream before) and its files
are real. Whatever happened, the tables are compared with those of a run that nobody disturbed.
"""

import itertools
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest

from stormline.operators.errors import CheckpointError
from stormline.operators.rows import Chunk, DeadLetter, Position, Result, SnapshotKey
from stormline.pipeline import recovery as recovery_module
from stormline.pipeline.checkpoint import (
    MANIFEST_NAME,
    epoch_folder,
    lane_folder,
    list_committed,
    list_lanes,
    read_manifest,
)
from stormline.pipeline.durable_files import temporary_path
from stormline.pipeline.parquet_sink import EpochWriter, find_data_files
from stormline.pipeline.recovery import recover, recover_lane
from stormline.pipeline.settings import load_settings
from stormline.pipeline.supervisor import run_identity
from stormline.pipeline.video_llm import ModelDescription

IDENTITY = {"model": "storm-1", "sampling": {"fps": "2", "max_hold_s": 5.0}, "frame_hw": (64, 64)}
PARTITIONS = [("video", p) for p in range(4)]
END_OFFSET = 18
RECORDS_PER_EPOCH = 4
FIVE_HOURS_NS = 5 * 3_600 * 10**9  # so that epochs cross midnight


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """A crash here is an exception, not a power cut; that files are synced is tested with the sink."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


class CrashError(Exception):
    pass


def crash_after(number, epoch):
    """Return a writer that stops dead after one numbered step of one epoch."""

    class Crashing(EpochWriter):
        def step_done(self, step):
            if (step, self.next_epoch) == (number, epoch):
                raise CrashError

    return Crashing


class CountingLane:
    """Sums up each stream's offsets; what a lane is, with nothing in it but state."""

    def __init__(self, start, partitions, cls=EpochWriter):
        self.records_per_epoch = RECORDS_PER_EPOCH
        self.writer = cls(start, model="storm-1", identity=IDENTITY)
        self.next_offsets = dict.fromkeys(partitions, 0)
        self.next_offsets |= {(p.topic, p.partition): p.next_offset for p in start.positions}
        self.sums = {(k.topic, k.partition): json.loads(v) for k, v in start.load_snapshots().items()}

    def run(self, end_offset=END_OFFSET, max_epochs=1_000):
        for _ in range(max_epochs):
            rows = [row for p in self.next_offsets for row in self._read(p, end_offset)]
            if not rows:
                return
            self._commit(rows)

    def _read(self, partition, end_offset):
        n_records = self.records_per_epoch // len(self.next_offsets) or 1
        for _ in range(n_records):
            offset = self.next_offsets[partition]
            if offset < end_offset:
                self.next_offsets[partition] += 1
                yield from self._handle(partition, offset)

    def _handle(self, partition, offset):
        stream = f"cam-{partition[1]}-{offset % 2}"
        count, total = self.sums.setdefault(partition, {}).get(stream, (0, 0))
        count, total = count + 1, total + offset
        self.sums[partition][stream] = (count, total)
        start_ns = offset * FIVE_HOURS_NS
        tokens = np.full((1, 2), total, np.float16)
        yield Chunk(stream, "s", count, start_ns, start_ns, 0, 4, 0.0, *partition, offset, 0, tokens)
        if offset % 3 == 0:
            text = f"{stream}: {total}"
            yield Result("q", "caption", stream, "s", start_ns, start_ns, "", text, False, 1, "recent", 1.0, "m", 0)
        if offset % 7 == 0:
            yield DeadLetter("gap", "missing", stream, "s", offset, *partition, offset, start_ns, 0)

    def _commit(self, rows):
        self.writer.commit(
            chunks=[r for r in rows if isinstance(r, Chunk)],
            results=[r for r in rows if isinstance(r, Result)],
            dead_letters=[r for r in rows if isinstance(r, DeadLetter)],
            positions=[Position(*p, o) for p, o in self.next_offsets.items()],
            snapshots={SnapshotKey("sum", *p): json.dumps(s).encode() for p, s in self.sums.items()},
        )


def start_lanes(root, n_lanes, cls=EpochWriter):
    recovery = recover(root, lanes=n_lanes, identity=IDENTITY)
    shares = [PARTITIONS[lane::n_lanes] for lane in range(n_lanes)]
    return [
        CountingLane(recovery.for_lane(lane, share), share, cls if lane == 0 else EpochWriter)
        for lane, share in enumerate(shares)
    ]


def run_lanes(root, n_lanes, end_offset=END_OFFSET, cls=EpochWriter):
    for lane in start_lanes(root, n_lanes, cls):
        lane.run(end_offset)


def rows_of(root):
    """Return all rows of all tables, in an order that says nothing of files."""
    return {table: _rows_of(root / table) for table in ("tokens", "results", "dead_letters")}


def _rows_of(folder):
    rows = ds.dataset(folder, format="parquet", partitioning="hive").to_table().to_pylist()
    return sorted(rows, key=lambda row: (row["stream_id"], row["start_time"]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    run_lanes(root, 1)
    rows = rows_of(root)
    assert len(rows["tokens"]) == END_OFFSET * len(PARTITIONS)
    assert len(rows["results"]) > 10 < len(rows["dead_letters"])
    return rows


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_lane_when_it_crashes_after_a_numbered_step_then_each_row_is_there_once(tmp_path, undisturbed, number, epoch):
    with pytest.raises(CrashError):
        run_lanes(tmp_path, 1, cls=crash_after(number, epoch))

    run_lanes(tmp_path, 1)

    assert rows_of(tmp_path) == undisturbed


def crash_at_call(patch, nth, owner, name):
    """Have a function crash at its n-th call, in place of what it does."""
    real, calls = getattr(owner, name), itertools.count(1)

    def crashing(*args, **kwargs):
        if next(calls) == nth:
            raise CrashError
        return real(*args, **kwargs)

    patch.setattr(owner, name, crashing)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_lane_when_it_crashes_and_recovery_does_too_then_each_row_is_there_once(tmp_path, undisturbed, number):
    """After steps 1 and 2 recovery has an epoch's tables to remove, after step 3 its folder too.

    The epochs that are undone are longer than those that replace them, which write none of the later days' files anew.
    """
    places = [(2, Path, "unlink"), *([(1, recovery_module, "remove_epoch")] if number == 3 else [])]
    n_removed = []  # files, before each crash
    for epoch in (1, 3, 5):
        (crashing,) = start_lanes(tmp_path, 1, crash_after(number, epoch))
        crashing.records_per_epoch = 7 * RECORDS_PER_EPOCH
        with pytest.raises(CrashError):
            crashing.run()
        for place in places:
            n_files = len(list(find_data_files(tmp_path)))
            with pytest.MonkeyPatch.context() as patch:
                crash_at_call(patch, *place)
                with pytest.raises(CrashError):
                    recover(tmp_path, lanes=1, identity=IDENTITY)
            n_removed.append(n_files - len(list(find_data_files(tmp_path))))
        (going_on,) = start_lanes(tmp_path, 1)
        going_on.run(max_epochs=2)
    torn = temporary_path(next(find_data_files(tmp_path)).path)
    torn.write_bytes(b"PAR1")

    run_lanes(tmp_path, 1)

    assert rows_of(tmp_path) == undisturbed
    assert not torn.exists()
    assert len(n_removed) == 3 * len(places)
    assert n_removed[:: len(places)] == [1] * 3, "recovery did not crash amid the files that it removes"


@pytest.mark.parametrize("n_published", [1, 2, 3])
def test_lane_when_it_crashes_between_two_renames_then_each_row_is_there_once(tmp_path, undisturbed, n_published):
    class Torn(EpochWriter):
        def publish_tables(self, draft):
            if self.next_epoch < 3:
                return super().publish_tables(draft)
            for file in draft.files[:n_published]:
                temporary_path(self.root / file.path).replace(self.root / file.path)
            raise CrashError

    with pytest.raises(CrashError):
        run_lanes(tmp_path, 1, cls=Torn)

    run_lanes(tmp_path, 1)

    assert rows_of(tmp_path) == undisturbed


@pytest.mark.parametrize(
    "steps",
    [
        ("write_manifest", "write_tables", "publish_tables", "write_states"),
        ("write_tables", "write_manifest", "publish_tables", "write_states"),
        ("write_tables", "publish_tables", "write_manifest", "write_states"),
    ],
)
def test_protocol_when_its_steps_are_in_another_order_then_a_crash_shows_it(tmp_path, undisturbed, steps):
    """The comparison above can fail: it finds each order that is wrong."""
    found = []
    for number in (1, 2, 3):
        root = tmp_path / str(number)
        crashing = crash_after(number, 3)
        crashing.STEPS = steps
        with pytest.raises(CrashError):
            run_lanes(root, 1, cls=crashing)
        run_lanes(root, 1)
        found.append(rows_of(root) != undisturbed)

    assert any(found)


def test_replay_when_the_same_epoch_is_written_again_then_its_files_are_the_same(tmp_path):
    run_lanes(tmp_path, 1)
    before = {f.path: f.path.read_bytes() for f in find_data_files(tmp_path)}
    last = list_committed(tmp_path, 0)[0]
    (epoch_folder(tmp_path, 0, last) / MANIFEST_NAME).unlink()  # as if it had crashed just before step 4

    run_lanes(tmp_path, 1)

    assert {f.path: f.path.read_bytes() for f in find_data_files(tmp_path)} == before


def test_lanes_when_four_become_one_become_three_then_each_row_is_there_once(tmp_path, undisturbed):
    epochs = []
    for n_lanes, end_offset in ((4, 8), (1, 16), (3, END_OFFSET)):
        before = recover(tmp_path, lanes=n_lanes, identity=IDENTITY).next_epoch
        run_lanes(tmp_path, n_lanes, end_offset)
        epochs.append((before, max(f.epoch for f in find_data_files(tmp_path))))

    assert rows_of(tmp_path) == undisturbed
    assert all(later[0] == earlier[1] + 1 for earlier, later in pairwise(epochs))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_lanes_when_they_crash_before_the_first_commit_after_a_change_then_each_row_is_there_once(
    tmp_path, undisturbed, number
):
    run_lanes(tmp_path, 4, end_offset=8)
    run_lanes(tmp_path, 1, end_offset=16)
    next_epoch = recover(tmp_path, lanes=3, identity=IDENTITY).next_epoch
    lanes = start_lanes(tmp_path, 3, crash_after(number, next_epoch))
    lanes[1].run()  # far enough for lane 0's old epochs to be pruned, were it not for partition 2
    with pytest.raises(CrashError):
        lanes[0].run()

    run_lanes(tmp_path, 2)

    assert rows_of(tmp_path) == undisturbed


def test_lane_when_restarted_alone_then_the_others_files_are_left_alone(tmp_path, undisturbed):
    next_epoch = recover(tmp_path, lanes=2, identity=IDENTITY).next_epoch
    failing, going_on = start_lanes(tmp_path, 2, crash_after(2, next_epoch + 1))
    going_on.run(max_epochs=1)
    with pytest.raises(CrashError):
        failing.run()
    draft = tmp_path / "tokens/date=1970-01-01/.lane-001-epoch-00000002.parquet.tmp"
    draft.write_bytes(b"being written")

    start = recover_lane(tmp_path, 0, lanes=2, partitions=PARTITIONS[0::2], identity=IDENTITY)

    assert draft.exists()
    draft.unlink()
    CountingLane(start, PARTITIONS[0::2]).run()
    going_on.run()
    assert rows_of(tmp_path) == undisturbed


def test_lane_when_restarted_alone_after_a_change_then_its_state_comes_from_the_lane_before(tmp_path, undisturbed):
    run_lanes(tmp_path, 1, end_offset=12)
    first, second = start_lanes(tmp_path, 2)
    first.run()

    start = recover_lane(tmp_path, 1, lanes=2, partitions=PARTITIONS[1::2], identity=IDENTITY)

    assert {p.lane for p in start.partitions} == {0}
    CountingLane(start, PARTITIONS[1::2]).run()
    assert rows_of(tmp_path) == undisturbed
    del second


def damage_manifest(folder):
    path = folder / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-40])


def damage_state(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def lose_state(folder):
    next(folder.glob("*.safetensors")).unlink()


@pytest.mark.parametrize("damage", [damage_manifest, damage_state, lose_state])
def test_recovery_when_the_newest_epoch_is_damaged_then_it_warns_and_takes_the_one_before(
    tmp_path, undisturbed, damage
):
    run_lanes(tmp_path, 2, end_offset=12)
    newest, before = list_committed(tmp_path, 1)[:2]
    damage(epoch_folder(tmp_path, 1, newest))

    recovery = recover(tmp_path, lanes=2, identity=IDENTITY)

    (warning,) = recovery.warnings
    assert f"lane-001/epoch-{newest:08d}" in warning
    assert f"goes on from epoch {before}" in warning
    assert recovery.next_epoch > newest
    run_lanes(tmp_path, 2)
    assert rows_of(tmp_path) == undisturbed


def test_recovery_when_all_epochs_of_a_lane_are_damaged_then_it_says_so_and_deletes_nothing(tmp_path):
    run_lanes(tmp_path, 1)
    for epoch in list_committed(tmp_path, 0):
        damage_manifest(epoch_folder(tmp_path, 0, epoch))
    before = files_below(tmp_path)

    with pytest.raises(CheckpointError, match=r"no whole one.*Restore .* from a backup, or choose a new"):
        recover(tmp_path, lanes=1, identity=IDENTITY)

    assert files_below(tmp_path) == before


@pytest.mark.parametrize("damage", [damage_manifest, damage_state])
def test_recovery_when_others_went_on_from_a_damaged_epoch_then_it_is_not_undone(tmp_path, damage):
    run_lanes(tmp_path, 1, end_offset=8)
    start_lanes(tmp_path, 2)[1].run()  # takes partitions 1 and 3 over from lane 0; lane 0 itself commits nothing
    damage_everything = list_committed(tmp_path, 0)[0]
    damage(epoch_folder(tmp_path, 0, damage_everything))
    before = files_below(tmp_path)

    with pytest.raises(CheckpointError, match=r"lane 1 went on from it.*Nothing was deleted"):
        recover(tmp_path, lanes=2, identity=IDENTITY)

    assert files_below(tmp_path) == before


@pytest.mark.parametrize("damage", [damage_manifest, damage_state])
def test_recovery_when_a_moved_partitions_last_state_is_damaged_then_it_is_not_guessed(tmp_path, damage):
    run_lanes(tmp_path, 4, end_offset=4)  # so that lane 1 has an earlier state of partition 1
    run_lanes(tmp_path, 1, end_offset=5)
    held = list_committed(tmp_path, 0)[0]
    start_lanes(tmp_path, 2)[0].run()  # lane 0 keeps 0 and 2; lane 1 has not committed 1 and 3 yet
    folder = epoch_folder(tmp_path, 0, held)
    damage(folder) if damage is damage_manifest else (folder / "sum.video-1.safetensors").write_bytes(b"?")
    before = files_below(tmp_path)

    with pytest.raises(CheckpointError, match=r"video\[1\]"):
        recover(tmp_path, lanes=2, identity=IDENTITY)

    assert files_below(tmp_path) == before


def test_recovery_when_the_only_state_of_a_moved_partition_is_damaged_then_it_does_not_begin_anew(tmp_path):
    run_lanes(tmp_path, 1, end_offset=1)
    start_lanes(tmp_path, 2)[0].run()
    (epoch_folder(tmp_path, 0, 1) / "sum.video-1.safetensors").write_bytes(b"?")

    with pytest.raises(CheckpointError, match=r"video\[1\] has its last state there"):
        recover(tmp_path, lanes=2, identity=IDENTITY)


def test_recovery_when_a_setting_differs_then_each_is_named_with_the_choices(tmp_path):
    run_lanes(tmp_path, 1, end_offset=4)
    other = {"model": "storm-1", "sampling": {"fps": "4", "max_hold_s": 5.0}, "grid": 2, "frame_hw": [64, 64]}

    with pytest.raises(CheckpointError) as caught:
        recover(tmp_path, lanes=1, identity=other)

    message = str(caught.value)
    assert 'sampling.fps: got "4", expected "2"' in message
    assert "grid: got 2, expected nothing" in message
    assert "max_hold_s" not in message
    assert "frame_hw" not in message  # a tuple and a list are the same setting
    assert "choose a new `output.path`" in message
    assert recover(tmp_path, lanes=1, identity=IDENTITY).partitions


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: run(fingerprint="other"), 'model: got "other", expected "shapes"'),
        (lambda run: run(chunk_frames=8), "chunk_frames: got 8, expected 4"),
        (lambda run: run("sampling.fps=4"), 'sampling.fps: got "4", expected "2"'),
        (lambda run: {**run(), "tables.schema_version": 99}, "tables.schema_version: got 99, expected 1"),
    ],
)
def test_run_when_the_checkpoint_is_of_another_model_grid_or_schema_then_refused_with_what_to_do(
    tmp_path, change, said
):
    def run(*overrides, fingerprint="shapes", chunk_frames=4):
        model = ModelDescription("shapes", fingerprint, True, (64, 64), chunk_frames)
        return run_identity(load_settings(None, overrides), model)

    start = recover(tmp_path, lanes=1, identity=run()).for_lane(0, [("video", 0)])
    writer = EpochWriter(start, model="shapes", identity=run())
    writer.commit(positions=[Position("video", 0, 1)], snapshots={})

    with pytest.raises(CheckpointError) as caught:
        recover(tmp_path, lanes=1, identity=change(run))

    assert said in str(caught.value)
    assert "Restore what was expected, or choose a new `output.path`. Nothing was deleted." in str(caught.value)
    assert recover(tmp_path, lanes=1, identity=run()).partitions


def test_recovery_when_checkpoints_went_lost_then_rows_are_not_deleted(tmp_path):
    run_lanes(tmp_path, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    n_files = len(list(find_data_files(tmp_path)))

    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint of that lane"):
            recover(tmp_path, lanes=1, identity=IDENTITY)

    assert len(list(find_data_files(tmp_path))) == n_files


def test_recovery_when_old_days_were_deleted_by_hand_then_it_goes_on(tmp_path, undisturbed):
    run_lanes(tmp_path, 1, end_offset=16)
    shutil.rmtree(tmp_path / "tokens" / "date=1970-01-01")

    run_lanes(tmp_path, 1)

    kept = [r for r in undisturbed["tokens"] if str(r["date"]) != "1970-01-01"]
    assert rows_of(tmp_path)["tokens"] == kept


def test_recovery_when_the_folder_is_new_then_it_is_a_fresh_start(tmp_path):
    recovery = recover(tmp_path / "out", lanes=2, identity=IDENTITY)

    start = recovery.for_lane(1, PARTITIONS)
    assert (recovery.next_epoch, recovery.partitions, start.positions) == (1, {}, ())
    assert start.load_snapshots() == {}


def test_checkpoints_when_a_lane_runs_long_then_three_epochs_are_kept(tmp_path):
    run_lanes(tmp_path, 4)

    for lane in range(4):
        assert len(list_committed(tmp_path, lane)) == 3
        assert len(list(lane_folder(tmp_path, lane).glob("epoch-*"))) == 3


def test_manifest_when_lanes_changed_then_it_names_what_it_was_built_on(tmp_path):
    run_lanes(tmp_path, 2, end_offset=4)
    last = [list_committed(tmp_path, lane)[0] for lane in list_lanes(tmp_path)]

    run_lanes(tmp_path, 1, end_offset=8)

    manifest = read_manifest(tmp_path, 0, list_committed(tmp_path, 0)[0])
    assert manifest.built_on == {0: last[0], 1: last[1]}


def files_below(root):
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
