"""Ends a lane's epochs: rows, states and positions become one commit, in numbered steps.

    1 write_tables    each table's rows, under temporary names, synced          nothing is seen by a reader
    2 publish_tables  rename them; the names carry lane and epoch               rows are seen, not yet counted
    3 write_states    one file for each step and partition
    4 write_manifest  temporary name, sync, rename                              from here on the epoch counts
    5 the lane tells the consumer group, for lag tools; that is never read back

A crash before the end of step 4 is undone by `recovery`: it deletes the rows of later epochs than the last
manifest, and the lane reads the same records again, into the same rows. So each row counts once, whatever happens.
Steps 1 to 4 are one turn as the lane's owner (`owner_stays`): nobody else becomes this lane between two of them.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..operators.errors import CheckpointError, CommitError
from ..operators.rows import Buffer, Chunk, DeadLetter, Position, Result, SnapshotKey
from .checkpoint import (
    DataFile,
    LaneStart,
    Manifest,
    StateFile,
    TopicPartition,
    check_owner,
    owner_stays,
    plain_json,
    prune_checkpoints,
    states_equal,
    write_manifest,
    write_states,
)
from .durable_files import is_temporary, make_folder, sync_file, sync_folders, temporary_path, write_failure
from .files_lock import files_stay
from .tables import TABLES, dead_letters_table, results_table, split_by_date, tokens_table

logger = logging.getLogger(__name__)

_DATA_FILE = re.compile(r"\.?lane-(\d{3,})-epoch-(\d{8,})\.parquet(?:\.tmp)?")
_NOT_REPEATED = ("tokens", "data")  # columns with nothing to gain from a dictionary or from minimum and maximum


class FoundFile(NamedTuple):
    """A data file, or the draft of one, that lies in the output folder."""

    table: str
    date: str
    lane: int
    epoch: int
    path: Path
    temporary: bool


@dataclass(frozen=True)
class CommitReport:
    """What a commit did."""

    epoch: int
    rows: dict[str, int]  # by table
    files: tuple[DataFile, ...]
    state_bytes: int
    positions: tuple[Position, ...]
    duration_s: float
    skipped: bool = False  # nothing had changed since the epoch before, which still stands

    @property
    def data_bytes(self) -> int:
        """Return the size of its Parquet files."""
        return sum(f.n_bytes for f in self.files)


@dataclass
class EpochDraft:
    """An epoch on its way to being committed; each step adds what it wrote."""

    epoch: int
    tables: dict[str, pa.Table]
    positions: tuple[Position, ...]
    snapshots: Mapping[SnapshotKey, Buffer]
    files: list[DataFile] = field(default_factory=list)
    states: tuple[StateFile, ...] = ()


class EpochWriter:
    """Commits one lane's epochs, one after the other.

    The lane makes one at each start, from what recovery gave it, and calls `commit` at each barrier. One `commit`
    at a time. A writer whose commit failed does not go on: what lies on disk is for recovery to judge, so the lane
    starts anew from its checkpoint.
    """

    STEPS: ClassVar[tuple[str, ...]] = ("write_tables", "publish_tables", "write_states", "write_manifest")

    def __init__(
        self,
        start: LaneStart,
        *,
        model: str,
        identity: Mapping[str, Any],
        clock_ns: Callable[[], int] = time.time_ns,
    ):
        """Prepare to write after `start`.

        Args:
            start: From `recover` or `recover_lane`, for this lane.
            model: Fingerprint of the model, for the tables and the manifest.
            identity: Settings that must not change while the folder is in use, as recovery was given them.
            clock_ns: For the manifest's `created` alone.
        """
        self.root = start.root
        self.lane = start.lane
        self.next_epoch = start.next_epoch
        self._start = start
        self._model = model
        self._identity = plain_json(identity)
        self._clock_ns = clock_ns
        self._offsets = {TopicPartition(p.topic, p.partition): p.next_offset for p in start.positions}
        self._states = start.states
        self._last: CommitReport | None = None
        self._failed = False

    def commit(
        self,
        *,
        chunks: Sequence[Chunk] = (),
        results: Sequence[Result] = (),
        dead_letters: Sequence[DeadLetter] = (),
        positions: Sequence[Position],
        snapshots: Mapping[SnapshotKey, Buffer],
    ) -> CommitReport:
        """Make an epoch of everything since the last one.

        A table without rows gets no file. If there is nothing at all, and neither a position nor a state changed,
        nothing is written and the report says `skipped`.

        Args:
            chunks: Rows of the tokens table.
            results: Rows of the results table.
            dead_letters: Rows of the dead letters table.
            positions: Of all the lane's partitions, from the barrier.
            snapshots: Each step's states, from the barrier; a partition without streams has none.

        Raises:
            CommitError: If the disk refuses, or another process has become this lane. Nothing is committed then; the
                lane restarts from its checkpoint.
            CheckpointError: If a position fell behind what is committed.
        """
        if self._failed:
            raise CommitError(f"lane {self.lane}: a commit failed before; restart the lane from its checkpoint")
        began_s = time.monotonic()
        tables = {
            "tokens": tokens_table(chunks, self._model),
            "results": results_table(results),
            "dead_letters": dead_letters_table(dead_letters),
        }
        draft = EpochDraft(self.next_epoch, tables, tuple(positions), snapshots)
        self._check(draft)
        if self._last is not None and self._nothing_new(draft):
            return CommitReport(self._last.epoch, {}, (), 0, draft.positions, 0.0, skipped=True)
        self._failed = True  # until the last step is through
        try:
            with owner_stays(self.root, self.lane), ExitStack() as tables_stay:
                check_owner(self.root, self.lane, self._start.owner)
                tables_stay.enter_context(files_stay(self.root))
                for number, step in enumerate(self.STEPS, start=1):
                    getattr(self, step)(draft)
                    if step == "publish_tables":
                        tables_stay.close()  # a compaction may have its moment
                    self.step_done(number)
        except OSError as error:
            raise CommitError(write_failure(error, self.root)) from error
        return self._committed(draft, began_s)

    def step_done(self, number: int) -> None:
        """Do nothing. Called after each numbered step; tests override it to stop the lane just there."""

    def write_tables(self, draft: EpochDraft) -> None:
        """Step 1: write each table's rows, a file for each date, under temporary names."""
        for name, table in draft.tables.items():
            for date, rows in split_by_date(table).items():
                final = data_file_path(self.root, name, date, self.lane, draft.epoch)
                make_folder(final.parent)
                path = temporary_path(final)
                _write_parquet(rows, path)
                sync_file(path)
                relative = final.relative_to(self.root).as_posix()
                draft.files.append(DataFile(name, relative, rows.num_rows, path.stat().st_size))

    def publish_tables(self, draft: EpochDraft) -> None:
        """Step 2: give them their final names."""
        finals = [self.root / file.path for file in draft.files]
        for final in finals:
            temporary_path(final).replace(final)
        sync_folders(final.parent for final in finals)

    def write_states(self, draft: EpochDraft) -> None:
        """Step 3: write the state files."""
        draft.states = write_states(self.root, self.lane, draft.epoch, draft.snapshots, self._states)

    def write_manifest(self, draft: EpochDraft) -> None:
        """Step 4: write the manifest."""
        created = datetime.fromtimestamp(self._clock_ns() / 1e9, timezone.utc)
        manifest = Manifest(
            lane=self.lane,
            lanes=self._start.lanes,
            epoch=draft.epoch,
            created=created.isoformat(timespec="milliseconds"),
            model=self._model,
            identity=self._identity,
            positions=draft.positions,
            states=draft.states,
            data_files=tuple(draft.files),
            built_on=self._start.built_on,
        )
        write_manifest(self.root, manifest)

    def _check(self, draft: EpochDraft) -> None:
        offsets = _offsets_of(draft.positions)
        for partition, next_offset in offsets.items():
            if next_offset < self._offsets.get(partition, 0):
                raise CheckpointError(
                    f"{partition.topic}[{partition.partition}]@{next_offset} is before {self._offsets[partition]}, "
                    f"which lane {self.lane} of {self.root} has committed. If the topic was made anew, its records "
                    f"are others: choose a new `output.path`."
                )
        strangers = [k for k in draft.snapshots if TopicPartition(k.topic, k.partition) not in offsets]
        if strangers:
            raise ValueError(f"snapshots of partitions that the barrier has no position for: {strangers}")

    def _nothing_new(self, draft: EpochDraft) -> bool:
        if any(table.num_rows for table in draft.tables.values()) or _offsets_of(draft.positions) != self._offsets:
            return False
        return states_equal(self._states, draft.snapshots)

    def _committed(self, draft: EpochDraft, began_s: float) -> CommitReport:
        self._failed = False
        self._offsets |= _offsets_of(draft.positions)
        self._states = draft.states
        self.next_epoch += 1
        self._last = CommitReport(
            epoch=draft.epoch,
            rows={name: table.num_rows for name, table in draft.tables.items() if table.num_rows},
            files=tuple(draft.files),
            state_bytes=sum(state.n_bytes for state in draft.states),
            positions=draft.positions,
            duration_s=time.monotonic() - began_s,
        )
        logger.info(
            "committed lane=%d epoch=%d rows=%s data_bytes=%d state_bytes=%d duration_ms=%.0f",
            self.lane,
            draft.epoch,
            self._last.rows,
            self._last.data_bytes,
            self._last.state_bytes,
            self._last.duration_s * 1e3,
        )
        try:
            prune_checkpoints(self.root, self.lane)
        except OSError as error:  # only space is lost, and the next commit tries again
            logger.warning("old checkpoints not removed: lane=%d error=%s", self.lane, error)
        return self._last


def data_file_path(root: Path, table: str, date: str, lane: int, epoch: int) -> Path:
    """Return where the rows of one date go; the same for a replay."""
    return root / table / f"date={date}" / f"lane-{lane:03d}-epoch-{epoch:08d}.parquet"


def date_of(path: Path) -> str:
    """Return the date of a data file."""
    return path.parent.name.removeprefix("date=")


class DateFolder(NamedTuple):
    """One date of one table, and the names in its folder: all of one moment, however many files come and go."""

    table: str
    date: str
    path: Path
    names: tuple[str, ...]


def list_date_folders(
    root: Path, tables: Sequence[str] = tuple(TABLES), *, date: str | None = None
) -> Iterator[DateFolder]:
    """Yield the folders of all dates, or of one, in no order.

    Between two of them files may be compacted; within one the names are those before or after it, never a mixture.
    """
    for table in tables:
        folder = root / table
        dates = [d for d in os.scandir(folder) if d.is_dir()] if folder.is_dir() else []
        for day in dates:
            if date is None or day.name == f"date={date}":
                names = tuple(os.listdir(day.path))  # one open folder, so one moment, also if another takes its place
                yield DateFolder(table, day.name.removeprefix("date="), Path(day.path), names)


def find_data_files(
    root: Path, tables: Sequence[str] = tuple(TABLES), *, date: str | None = None
) -> Iterator[FoundFile]:
    """Yield every data file that a lane wrote, committed or not, and the drafts, in no order; or one date's alone.

    What was compacted is in none of them: see `compacted_files`.
    """
    for folder in list_date_folders(root, tables, date=date):
        yield from data_files_in(folder)


def data_files_in(folder: DateFolder) -> Iterator[FoundFile]:
    """Yield those of the names that are data files which a lane wrote, and the drafts of such."""
    for name in folder.names:
        match = _DATA_FILE.fullmatch(name)
        if match:
            lane, epoch = int(match.group(1)), int(match.group(2))
            yield FoundFile(folder.table, folder.date, lane, epoch, folder.path / name, is_temporary(name))


def _offsets_of(positions: Sequence[Position]) -> dict[TopicPartition, int]:
    return {TopicPartition(p.topic, p.partition): p.next_offset for p in positions}


def _write_parquet(rows: pa.Table, path: Path) -> None:
    pq.write_table(rows, path, **parquet_options(rows.schema))


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Return how the tables are written."""
    # Plain tokens, no byte-stream split: Polars cannot read float16 that is stored so (pola-rs/polars issue 21803).
    plain = [name for name in schema.names if name not in _NOT_REPEATED]
    return {"compression": "zstd", "use_dictionary": plain, "write_statistics": plain}
