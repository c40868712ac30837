"""Merges the many small Parquet files of an output folder into few large ones, while lanes write and others read.

    1 write     the merged files and links to all that stays, in a folder of their own     nobody looks there
    2 exchange  that folder and the date's folder change places, in one step                readers see the new files
    3 wait      for readers that were just listing the old folder
    4 delete    the old folder

A crash between any two leaves a folder in ``compactions/`` that nobody needs, before step 2 a draft and after it the
old files; the next compaction deletes it. So nothing is to be undone or finished.

What a reader sees of a date is therefore its small files or its large ones, never both and never neither. One that
listed the small files just before step 2 and opens them after it fails, as their names are gone, and does not read
less. Step 2 is done alone (`files_lock`): a reader that holds that lock is not even made to fail.

Only rows that recovery would never delete are merged: those of epochs up to a lane's oldest whole manifest.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..operators.errors import CommitError, SettingsError
from .checkpoint import KEPT_EPOCHS, list_lanes, whole_manifests
from .compacted_files import PARTS_KEY, Part, compacted_in, compacted_name, pack_parts, read_parts
from .durable_files import exchange_folders, is_temporary, sync_file, sync_folder, write_failure
from .files_lock import files_change
from .output_lock import OutputLock
from .parquet_sink import DateFolder, data_files_in, list_date_folders, parquet_options
from .tables import TABLES, VERSION_KEY

logger = logging.getLogger(__name__)

FOLDER = "compactions"
ROW_GROUP_BYTES = 8 << 20  # in memory; what a reader of one row has to decode
ROW_GROUP_ROWS = 16_384
SMALL_SHARE = 0.5  # of the target: a file from that size on is left as it is


@dataclass(frozen=True)
class CompactionSpec:
    """What to merge."""

    tables: tuple[str, ...] = tuple(TABLES)
    target_bytes: int = 128 << 20  # of a merged file, about
    min_age_s: float = 600.0  # since a file was written
    min_files: int = 8  # of one date, below which it is not worth it
    grace_s: float = 5.0  # that old files stay for readers that were just listing them
    lock_wait_s: float = 60.0  # for readers that hold the lock


@dataclass(frozen=True)
class SmallFile:
    """A file to be merged."""

    path: Path
    n_bytes: int
    written_ns: int
    parts: tuple[Part, ...]  # none: a lane's own, of `lane` and `epoch`
    lane: int = 0
    epoch: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """Return what the order of rows goes by: epoch, then lane."""
        return (self.parts[0].epoch, self.parts[0].lane) if self.parts else (self.epoch, self.lane)


@dataclass(frozen=True)
class DatePlan:
    """The small files of one table and date, in the order in which their rows are to stand."""

    folder: DateFolder
    files: tuple[SmallFile, ...]

    @property
    def n_bytes(self) -> int:
        """Return their size."""
        return sum(file.n_bytes for file in self.files)

    @property
    def name(self) -> str:
        """Return table and date, for people."""
        return f"{self.folder.table}/date={self.folder.date}"


@dataclass(frozen=True)
class DateReport:
    """What became of one table and date."""

    name: str
    files_before: int
    bytes_before: int
    files_after: int
    bytes_after: int
    n_rows: int


@dataclass
class CompactionReport:
    """What a compaction did."""

    dates: list[DateReport] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # dates that were left as they are, and why


class Compaction:
    """One compaction of an output folder; a second one at the same time is refused.

    Args:
        root: The output folder; lanes may be writing to it.
        spec: What to merge.
        clock_ns: The clock on the wall, which files are dated by.
        sleep: Waits for readers before the old files go.
    """

    def __init__(
        self,
        root: Path,
        spec: CompactionSpec = CompactionSpec(),
        *,
        clock_ns: Callable[[], int] = time.time_ns,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.root = root
        self._spec = spec
        self._clock_ns = clock_ns
        self._sleep = sleep
        self._old: list[tuple[float, Path]] = []  # folders of old files, and when they came out of use

    def plan(self) -> list[DatePlan]:
        """Return what would be merged, without changing anything."""
        safe = safe_epochs(self.root)
        plans = (self._plan_date(folder, safe) for folder in list_date_folders(self.root, self._spec.tables))
        return sorted((p for p in plans if len(p.files) >= self._spec.min_files), key=lambda p: p.name)

    def run(self, on_date: Callable[[DateReport], None] = lambda report: None) -> CompactionReport:
        """Merge what `plan` says.

        A date that cannot be merged is left as it is, and the others go on.

        Args:
            on_date: Told of each date when it is done.

        Raises:
            OutputLockedError: If another compaction of this folder runs.
            CommitError: If the disk refuses, or the file system cannot exchange two folders.
        """
        report = CompactionReport()
        with OutputLock(self.root / FOLDER):
            try:
                self._check_exchange()
                for plan in self.plan():
                    try:
                        done = self._compact(plan)
                    except (_ChangedError, pa.ArrowException, ValueError, CommitError) as error:
                        report.failures.append(f"{plan.name}: {error}")
                        continue
                    report.dates.append(done)
                    on_date(done)
                    self._delete_old(all_of_them=False)
                self._delete_old(all_of_them=True)
            except OSError as error:
                raise CommitError(write_failure(error, self.root)) from error
        return report

    def step_done(self, number: int) -> None:
        """Do nothing. Called after each numbered step; tests override it to stop the process just there."""

    def _plan_date(self, folder: DateFolder, safe: dict[int, int]) -> DatePlan:
        latest_ns = self._clock_ns() - int(self._spec.min_age_s * 1e9)
        found: list[tuple[Path, tuple[Part, ...], int, int]] = [
            (file.path, (), file.lane, file.epoch)
            for file in data_files_in(folder)
            if not file.temporary and file.epoch <= safe.get(file.lane, 0)
        ]
        try:
            found += [(path, read_parts(path), 0, 0) for path in compacted_in(folder)]
        except (ValueError, pa.ArrowException) as error:
            logger.warning("compacted_file_not_read error=%s", error)
        files = []
        for path, parts, lane, epoch in found:
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # recovery, or somebody's broom
            if stat.st_size < SMALL_SHARE * self._spec.target_bytes and stat.st_mtime_ns <= latest_ns:
                files.append(SmallFile(path, stat.st_size, stat.st_mtime_ns, parts, lane, epoch))
        return DatePlan(folder, tuple(sorted(files, key=lambda file: file.place)))

    def _check_exchange(self) -> None:
        """Find out before any work whether this file system can do step 2."""
        pair = [self.root / FOLDER / f"try-{secrets.token_hex(4)}" for _ in range(2)]
        for folder in pair:
            folder.mkdir()
        try:
            exchange_folders(*pair)
        except OSError as error:
            raise CommitError(
                f"the file system of {self.root} cannot exchange two folders in one step ({error.strerror}): readers "
                f"would see rows twice, or not at all. Expected a local one of Linux (ext4, XFS, Btrfs). Copy the "
                f"folder there, or leave the files as they are; nothing was changed."
            ) from error
        finally:
            for folder in pair:
                folder.rmdir()

    def _compact(self, plan: DatePlan) -> DateReport:
        staging = self.root / FOLDER / f"{plan.folder.table}.{plan.folder.date}.{secrets.token_hex(4)}"
        staging.mkdir()
        try:
            written = _write_merged(plan, staging, self._spec.target_bytes)
            self.step_done(1)
            with files_change(self.root, self._spec.lock_wait_s):
                _link_others(plan, staging)
                sync_folder(staging)
                exchange_folders(staging, plan.folder.path)
                sync_folder(plan.folder.path.parent)
                sync_folder(staging.parent)
        except Exception:
            shutil.rmtree(staging, ignore_errors=True)  # at once: it may be the disk that is full
            raise
        self._old.append((time.monotonic(), staging))
        self.step_done(2)
        logger.info("compacted table_date=%s files=%d into=%d", plan.name, len(plan.files), len(written))
        finals = [plan.folder.path / path.name for path in written]
        return DateReport(
            name=plan.name,
            files_before=len(plan.files),
            bytes_before=plan.n_bytes,
            files_after=len(written),
            bytes_after=sum(path.stat().st_size for path in finals),
            n_rows=sum(part.n_rows for path in finals for part in read_parts(path)),
        )

    def _delete_old(self, *, all_of_them: bool) -> None:
        """Steps 3 and 4, for the dates whose readers had their time, or for all; and for what a dead one has left."""
        if all_of_them:
            mine = {folder for _, folder in self._old}
            left = [Path(entry.path) for entry in os.scandir(self.root / FOLDER) if entry.is_dir()]
            self._old += [(time.monotonic(), folder) for folder in left if folder not in mine]
        while self._old:
            left_s = self._spec.grace_s - (time.monotonic() - self._old[0][0])
            if left_s > 0 and not all_of_them:
                return
            if left_s > 0:
                self._sleep(left_s)
            self.step_done(3)
            shutil.rmtree(self._old.pop(0)[1])
            self.step_done(4)


class _ChangedError(Exception):
    """The date's folder is not as it was planned with."""


def safe_epochs(root: Path) -> dict[int, int]:
    """Return for each lane up to which epoch no recovery would delete rows: the oldest of its newest whole manifests.

    Yet older ones are kept for partitions that nobody reads any more; no recovery goes back that far.
    """
    whole = {lane: [manifest.epoch for manifest in whole_manifests(root, lane)] for lane in list_lanes(root)}
    return {lane: epochs[:KEPT_EPOCHS][-1] for lane, epochs in whole.items() if epochs}


def check_tables(names: Sequence[str]) -> tuple[str, ...]:
    """Return the tables' names, each once; all where none is given.

    Raises:
        SettingsError: If one is none.
    """
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise SettingsError(f"no table {', '.join(unknown)}; expected {', '.join(TABLES)}")
    return tuple(dict.fromkeys(names)) or tuple(TABLES)


def _write_merged(plan: DatePlan, staging: Path, target_bytes: int) -> list[Path]:
    """Step 1: write the merged files; each begins with another one's rows, and is full at `target_bytes`."""
    written: list[Path] = []
    merged: _MergedFile | None = None
    for file in plan.files:
        merged = merged or _MergedFile(staging, TABLES[plan.folder.table])
        merged.add(file)
        if merged.n_bytes >= target_bytes:
            written.append(merged.close())
            merged = None
    if merged is not None:
        written.append(merged.close())
    return written


class _MergedFile:
    """A large file that is being written."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self._schema = schema
        self._draft = folder / "merged.draft"
        self._writer = pq.ParquetWriter(self._draft, schema, **parquet_options(schema))
        self._waiting: list[pa.Table] = []
        self._rows_waiting = self._bytes_waiting = 0  # of what waits
        self._parts: list[Part] = []
        self._written_ns = 0

    @property
    def n_bytes(self) -> int:
        return self._draft.stat().st_size

    def add(self, file: SmallFile) -> None:
        """Append a file's rows.

        Raises:
            _ChangedError: If it has other columns.
        """
        with pq.ParquetFile(file.path) as source:
            if not self._fits(source.schema_arrow):
                raise _ChangedError(f"{file.path} has other columns than this version writes; left as it is")
            for i in range(source.num_row_groups):
                rows = source.read_row_group(i).cast(self._schema)
                self._waiting.append(rows)
                self._rows_waiting += rows.num_rows
                self._bytes_waiting += rows.nbytes
                if self._rows_waiting >= ROW_GROUP_ROWS or self._bytes_waiting >= ROW_GROUP_BYTES:
                    self._flush()
            n_rows = source.metadata.num_rows
        self._parts += file.parts or (Part(file.lane, file.epoch, n_rows),)
        self._written_ns = max(self._written_ns, file.written_ns)

    def _fits(self, schema: pa.Schema) -> bool:
        versions = {(each.metadata or {}).get(VERSION_KEY) for each in (schema, self._schema)}
        return len(versions) == 1 and schema.equals(self._schema, check_metadata=False)

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=ROW_GROUP_ROWS)
            self._waiting, self._rows_waiting, self._bytes_waiting = [], 0, 0

    def close(self) -> Path:
        """Finish it, on the disk, as old as the newest of its rows; return its final name."""
        self._flush()
        self._writer.add_key_value_metadata({PARTS_KEY.decode(): pack_parts(self._parts).decode()})
        self._writer.close()
        final = self._draft.with_name(compacted_name(self._parts))
        self._draft.rename(final)
        os.utime(final, ns=(self._written_ns, self._written_ns))
        sync_file(final)
        if read_parts(final) != tuple(self._parts):  # which also compares the number of rows
            raise ValueError(f"{final} does not hold what was written; left as it was")
        return final


def _link_others(plan: DatePlan, staging: Path) -> None:
    """Give every file of the date that was not merged a name in the new folder, too.

    Raises:
        _ChangedError: If a merged file is gone meanwhile, or there is what cannot be linked.
    """
    merged = {file.path.name for file in plan.files}
    here = list(os.scandir(plan.folder.path))
    gone = merged - {entry.name for entry in here}
    if gone:
        raise _ChangedError(f"{len(gone)} of its files were deleted meanwhile, {min(gone)} for one; left as it is")
    for entry in here:
        if entry.name in merged or is_temporary(entry.name):  # nobody writes a draft while we hold the lock
            continue
        if not entry.is_file(follow_symlinks=False):
            raise _ChangedError(f"{entry.path} is no file, and stormline did not put it there; left as it is")
        os.link(entry.path, staging / entry.name)


def total(reports: Sequence[DateReport]) -> DateReport:
    """Return the sum over dates."""
    sums: Iterator[int] = (
        sum(getattr(report, name) for report in reports)
        for name in ("files_before", "bytes_before", "files_after", "bytes_after", "n_rows")
    )
    return DateReport("all", *sums)
