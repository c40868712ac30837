"""Writes rows of tables where other programs find them: JSON lines, and a folder for Hugging Face's `datasets`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from ...operators.errors import SettingsError
from ..archive.outcomes import outcomes, videos_table
from ..durable_files import is_temporary, replace_file, temporary_path
from ..parquet_sink import parquet_options
from ..result_tail import plain_row
from ..table_reader import RowFilter, TableReader
from ..tables import TABLES
from .subtitle_files import Written

FILE_BYTES = 256 << 20  # of a Parquet file, about
GROUP_BYTES = 8 << 20  # of a row group, in memory
GROUP_ROWS = 16_384
ROWS_AT_ONCE = 1_000  # as Python objects, which are many times as large
CARD_NAME = "README.md"
CARD_MARK = "Written by `stormline export`."
CARD = """---
pretty_name: {quoted}
configs:
{configs}---

# {name}

{mark} Read it with `datasets.load_dataset(FOLDER, NAME)`, where NAME is one of:

{tables}
Times are UTC. Those of an archive's videos are places in the video, unless the run was told otherwise: its first
frame is at 1970-01-01T00:00:00Z.
"""
NO_ROWS = " There are none: `load_dataset` takes it with `streaming=True` only."
UNFINISHED_MARK = "It is not finished:"
UNFINISHED_CARD = f"""{CARD_MARK} {UNFINISHED_MARK} the export still runs, or was ended before its time. Then
`stormline export` with --overwrite begins it anew.
"""
CONTENTS = {
    "results": "a row for each caption, alert and answer: what was asked of which window, and the answer.",
    "tokens": "the video's tokens, chunk by chunk: `tokens` is row-major, reshape it to (token_count, token_dim).",
    "dead_letters": "what could not be used, and why.",
    "videos": "a row for each video of the archive: done, damaged, failed or waiting, and why.",
}


def write_jsonl(root: Path, file: IO[str], wanted: RowFilter) -> Written:
    """Write the results as JSON, one a line, by date, epoch and lane."""
    n_rows = 0
    for batch in TableReader(root, "results", wanted).batches():
        for part in batch.to_batches(max_chunksize=ROWS_AT_ONCE):
            lines = (json.dumps(plain_row(row), ensure_ascii=False) for row in part.to_pylist())
            file.writelines(f"{line}\n" for line in lines)
        n_rows += batch.num_rows
    return Written(1, n_rows)


def write_dataset(root: Path, folder: Path, wanted: RowFilter, *, tokens: bool, overwrite: bool) -> Written:
    """Write a folder that ``datasets.load_dataset`` reads: Parquet, and a card that says what is where.

    The card comes last: until then there is one that names no table, so that nobody reads half of them.

    Args:
        root: The output folder.
        folder: Where to.
        wanted: Which rows of results, and of which streams.
        tokens: Whether those come along.
        overwrite: Whether an earlier export may be replaced.

    Raises:
        SettingsError: If there is something else, or something that is not to be replaced.
    """
    tables = ["results", *(["tokens"] if tokens else []), "dead_letters"]
    of_any_kind = replace(wanted, kind=None)
    readers = [
        TableReader(root, table, wanted if table == "results" else of_any_kind, TABLES[table].names) for table in tables
    ]
    _clear(folder, overwrite)
    n_files, n_rows = 0, {}
    for table, reader in zip(tables, readers, strict=True):
        with _ParquetFiles(folder / table, reader.schema.remove_metadata()) as sink:
            for batch in reader.batches():
                sink.add(batch)
            if sink.n_rows or table != "dead_letters":  # what was asked for is there, also where there is none of it
                n_files, n_rows[table] = n_files + sink.close(), sink.n_rows
    n_found = sum(n_rows.values())
    found = outcomes(root)
    if found:
        with _ParquetFiles(folder / "videos", videos_table([]).schema) as sink:
            sink.add(videos_table(found))
            n_files, n_rows["videos"] = n_files + sink.close(), sink.n_rows
    replace_file(folder / CARD_NAME, card(root.resolve().name, n_rows).encode())
    return Written(n_files, n_found)


def card(name: str, n_rows: Mapping[str, int]) -> str:
    """Return the dataset's card; its head tells `datasets` which files belong together.

    Args:
        name: Of the output folder.
        n_rows: Of each table that was written.
    """
    configs = "".join(f"- config_name: {table}\n  data_files: {table}/*.parquet\n" for table in n_rows)
    lines = "".join(f"- `{table}`: {CONTENTS[table]}{'' if n else NO_ROWS}\n" for table, n in n_rows.items())
    return CARD.format(
        quoted=json.dumps(f"stormline: {name}"),
        name=f"stormline: {name}",
        configs=configs,
        mark=CARD_MARK,
        tables=lines,
    )


def _clear(folder: Path, overwrite: bool) -> None:
    """Make the folder, without what an earlier export wrote, and with the card of an unfinished one."""
    path = folder / CARD_NAME
    if folder.is_dir() and any(not is_temporary(inside.name) for inside in folder.iterdir()):
        found = path.read_text(errors="replace") if path.is_file() else ""
        if CARD_MARK not in found:
            raise SettingsError(f"{folder} has other files in it; give a new folder. Nothing was written.")
        if not overwrite:
            what = "an unfinished export" if UNFINISHED_MARK in found else "an earlier export"
            raise SettingsError(f"{folder} holds {what}; --overwrite replaces it. Nothing was written.")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, UNFINISHED_CARD.encode())
    for table in CONTENTS:
        for part in [*(folder / table).glob("*.parquet"), *(folder / table).glob(".*.parquet.tmp")]:
            part.unlink()


class _ParquetFiles:
    """Parquet files of a table, begun anew where one is large; the block's end removes what was not finished."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self._folder = folder
        self._schema = schema
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._n_files = 0
        self.n_rows = 0

    def add(self, rows: pa.Table) -> None:
        self._waiting.append(rows.cast(self._schema))
        self.n_rows += rows.num_rows
        n_waiting = sum(table.num_rows for table in self._waiting)
        if n_waiting >= GROUP_ROWS or sum(table.nbytes for table in self._waiting) >= GROUP_BYTES:
            self._flush()

    def _path(self) -> Path:
        return self._folder / f"part-{self._n_files:05d}.parquet"

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._opened().write_table(pa.concat_tables(self._waiting), row_group_size=GROUP_ROWS)
        self._waiting = []
        if temporary_path(self._path()).stat().st_size >= FILE_BYTES:
            self._finish_file()

    def _opened(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = temporary_path(self._path())
            self._writer = pq.ParquetWriter(draft, self._schema, **parquet_options(self._schema))
        return self._writer

    def _finish_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            temporary_path(self._path()).replace(self._path())
            self._writer = None
            self._n_files += 1

    def close(self) -> int:
        """Finish the last file, and return how many there are; one, also of no rows."""
        self._flush()
        if not self.n_rows:
            self._opened()  # without a row group: `datasets` stumbles over one of no rows
        self._finish_file()
        return self._n_files

    def __enter__(self) -> _ParquetFiles:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        temporary_path(self._path()).unlink(missing_ok=True)
