"""Writes rows of tables where other programs find them: JSON lines, and a folder for Hugging Face's `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from ...operators.errors import SettingsError
from ..archive.outcomes import outcomes, videos_table
from ..durable_files import temporary_path
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

    Args:
        root: The output folder.
        folder: Where to.
        wanted: Which rows of results, and of which streams.
        tokens: Whether those come along.
        overwrite: Whether an earlier export may be replaced.

    Raises:
        SettingsError: If there is something else, or something that is not to be replaced.
    """
    _clear(folder, overwrite)
    tables = ["results", *(["tokens"] if tokens else []), "dead_letters"]
    n_rows, written = 0, {}
    for table in tables:
        mine = wanted if table == "results" else RowFilter(None, wanted.stream, wanted.since, wanted.until)
        reader = TableReader(root, table, mine, TABLES[table].names)
        sink = _ParquetFiles(folder / table, reader.schema.remove_metadata())
        for batch in reader.batches():
            sink.add(batch)
        written[table] = sink.close()
        n_rows += sink.n_rows
    found = outcomes(root)
    if found:
        sink = _ParquetFiles(folder / "videos", videos_table([]).schema)
        sink.add(videos_table(found))
        written["videos"] = sink.close()
    (folder / CARD_NAME).write_text(card(root.resolve().name, [name for name, n_files in written.items() if n_files]))
    return Written(sum(written.values()), n_rows)


def card(name: str, tables: Iterable[str]) -> str:
    """Return the dataset's card; its head tells `datasets` which files belong together."""
    tables = list(tables)
    configs = "".join(f"- config_name: {table}\n  data_files: {table}/*.parquet\n" for table in tables)
    lines = "".join(f"- `{table}`: {CONTENTS[table]}\n" for table in tables)
    return CARD.format(
        quoted=json.dumps(f"stormline: {name}"),
        name=f"stormline: {name}",
        configs=configs,
        mark=CARD_MARK,
        tables=lines,
    )


def _clear(folder: Path, overwrite: bool) -> None:
    """Make the folder, without what an earlier export wrote."""
    inside = list(folder.iterdir()) if folder.is_dir() else []
    if inside:
        ours = (folder / CARD_NAME).is_file() and CARD_MARK in (folder / CARD_NAME).read_text(errors="replace")
        if not ours:
            raise SettingsError(f"{folder} has other files in it; give a new folder. Nothing was written.")
        if not overwrite:
            raise SettingsError(f"{folder} holds an earlier export; --overwrite replaces it. Nothing was written.")
        for table in CONTENTS:
            for path in (folder / table).glob("*.parquet"):
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


class _ParquetFiles:
    """Parquet files of a table, begun anew where one is large."""

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
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = temporary_path(self._path())
            self._writer = pq.ParquetWriter(draft, self._schema, **parquet_options(self._schema))
        self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=GROUP_ROWS)
        self._waiting = []
        if temporary_path(self._path()).stat().st_size >= FILE_BYTES:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            temporary_path(self._path()).replace(self._path())
            self._n_files += 1

    def close(self) -> int:
        """Finish the last file, and return how many there are."""
        self._flush()
        self._finish_file()
        return self._n_files
