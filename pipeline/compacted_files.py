"""Data files that a compaction made: which rows of which lane and epoch they hold, in which order.

A file's footer says so (`PARTS_KEY`), so that whoever goes by lane and epoch finds each row where it would have been
without: recovery, a follower of results, a reader of committed rows. Such a file never changes, and its name is used
once: a reader that listed a folder before it was compacted finds its files gone, and never others in their place.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ..operators.errors import TableError
from .parquet_sink import DateFolder, data_files_in, list_date_folders
from .tables import TABLES

PARTS_KEY = b"stormline.parts"
MOVED_TRIES = 5  # of one reading, each from a new listing: several compactions within it are a coincidence
_NAME = re.compile(r"epochs-(\d{8,})-(\d{8,})-[0-9a-f]{8}\.parquet")
T = TypeVar("T")


class Part(NamedTuple):
    """Rows of one epoch of one lane that stand together in a compacted file."""

    lane: int
    epoch: int
    n_rows: int


class FileRows(NamedTuple):
    """Rows of one table, date, lane and epoch, and where they stand."""

    table: str
    date: str
    lane: int
    epoch: int
    path: Path
    first_row: int = 0
    n_rows: int | None = None  # None: all rows of the file


def compacted_name(parts: Sequence[Part]) -> str:
    """Return a new file's name: of which epochs it has rows, and something that makes it the only one."""
    epochs = [part.epoch for part in parts]
    return f"epochs-{min(epochs):08d}-{max(epochs):08d}-{secrets.token_hex(4)}.parquet"


def is_compacted(name: str) -> bool:
    """Tell whether a file name is one that `compacted_name` makes."""
    return _NAME.fullmatch(name) is not None


def pack_parts(parts: Sequence[Part]) -> bytes:
    """Return the parts as a footer holds them: JSON, compressed, because a day has 43,200 epochs and more."""
    return base64.b64encode(zlib.compress(json.dumps([list(part) for part in parts]).encode()))


@lru_cache(maxsize=256)
def read_parts(path: Path) -> tuple[Part, ...]:
    """Return what a compacted file holds, in its order.

    Raises:
        FileNotFoundError: If it was compacted again meanwhile, and its turn to be deleted has come.
        ValueError: If its footer does not say so.
    """
    metadata = pq.read_metadata(path)
    packed = (metadata.metadata or {}).get(PARTS_KEY)
    if packed is None:
        raise ValueError(f"{path} has no {PARTS_KEY.decode()} in its footer, though its name is a compacted file's")
    parts = tuple(Part(*numbers) for numbers in json.loads(zlib.decompress(base64.b64decode(packed))))
    if sum(part.n_rows for part in parts) != metadata.num_rows:
        raise ValueError(f"{path} has {metadata.num_rows} rows, expected {sum(part.n_rows for part in parts)}")
    return parts


def compacted_in(folder: DateFolder) -> Iterator[Path]:
    """Yield those of the names that are compacted files. All rows in them are committed."""
    for name in folder.names:
        if is_compacted(name):
            yield folder.path / name


def find_rows(root: Path, tables: Sequence[str] = tuple(TABLES)) -> Iterator[FileRows]:
    """Yield where the rows of each epoch are, committed or not, in no order; drafts are left out.

    Raises:
        FileNotFoundError: If files are compacted meanwhile; see `while_files_move`.
        TableError: If a compacted file is damaged.
    """
    for folder in list_date_folders(root, tables):
        yield from rows_in(folder)


def rows_in(folder: DateFolder) -> Iterator[FileRows]:
    """Yield where the rows of each epoch are in one table's date, as `find_rows`."""
    for file in data_files_in(folder):
        if not file.temporary:
            yield FileRows(file.table, file.date, file.lane, file.epoch, file.path)
    for path in compacted_in(folder):
        yield from rows_of_compacted(folder, path)


def rows_of_compacted(folder: DateFolder, path: Path) -> Iterator[FileRows]:
    """Yield where the rows of each epoch are in one compacted file, in its order.

    Raises:
        FileNotFoundError: If it was compacted again meanwhile.
        TableError: If it is damaged.
    """
    with damage_told(path):
        parts = read_parts(path)
    first_row = 0
    for part in parts:
        yield FileRows(folder.table, folder.date, part.lane, part.epoch, path, first_row, part.n_rows)
        first_row += part.n_rows


def read_table(
    rows: Sequence[FileRows],
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
    wanted: ds.Expression | None = None,
) -> pa.Table:
    """Read rows, in the order given; of a part of a compacted file no more row groups than it stands in.

    Args:
        rows: Where they are.
        schema: The table's.
        columns: Those that are wanted; None: all.
        wanted: Leaves rows out.

    Raises:
        FileNotFoundError: If one of the files was compacted meanwhile.
        TableError: If one is damaged.
    """
    names = list(columns or schema.names)
    tables = []
    for whole, run in groupby(rows, key=lambda each: each.n_rows is None):
        if whole:
            tables.append(_read_files([each.path for each in run], schema, names, wanted))
        else:
            parts = [_read_range(group, names) for group in _neighbours(run)]
            tables += parts if wanted is None else [part.filter(wanted) for part in parts]
    empty = pa.schema([schema.field(name) for name in names]).empty_table()
    return pa.concat_tables([empty, *tables])


def _read_files(paths: Sequence[Path], schema: pa.Schema, names: list[str], wanted: ds.Expression | None) -> pa.Table:
    """Read all rows of some files."""
    try:
        with damage_told(paths[0]):
            return ds.dataset([str(path) for path in paths], schema=schema, format="parquet").to_table(
                names, filter=wanted
            )
    except TableError:
        if len(paths) == 1:
            raise
        return pa.concat_tables([_read_files([path], schema, names, wanted) for path in paths])  # which of them it is


def _read_range(rows: Sequence[FileRows], names: list[str]) -> pa.Table:
    """Read what follows each other in one file, all with a number of rows."""
    first, stop = rows[0].first_row, rows[-1].first_row + (rows[-1].n_rows or 0)
    with damage_told(rows[0].path), pq.ParquetFile(rows[0].path) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)])
        groups = range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, stop, "left")) + 1)
        before = int(ends[groups.start - 1]) if groups.start else 0
        return file.read_row_groups(list(groups), names).slice(first - before, stop - first)


def _neighbours(rows: Iterable[FileRows]) -> Iterator[list[FileRows]]:
    group: list[FileRows] = []
    for each in rows:
        if group and (each.path, each.first_row) != (group[-1].path, group[-1].first_row + (group[-1].n_rows or 0)):
            yield group
            group = []
        group.append(each)
    if group:
        yield group


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Turn what is raised where a file does not hold what it should into an error that names it.

    Arrow says so in an `OSError` without a number, too; one with a number is the disk's, or a file that is gone.

    Raises:
        TableError: Instead.
    """
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except (pa.ArrowException, ValueError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise TableError(
            f"{path} is damaged ({' '.join(str(error).split())}); expected a Parquet file as stormline writes it. "
            "Bring it back from a copy, or move it out of the output folder: its rows are then missing, and no others."
        ) from error


def while_files_move(read: Callable[[], T]) -> T:
    """Return what a reading that lists files and then opens them gives; anew where a file was gone in between.

    Raises:
        FileNotFoundError: If it happens again and again.
    """
    for _ in range(MOVED_TRIES - 1):
        try:
            return read()
        except FileNotFoundError:
            continue
    return read()
