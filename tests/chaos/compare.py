"""Are two output folders the same, row for row? Tokens bit for bit."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds

from stormline.pipeline.tables import TABLES

NOT_COMPARED = {"latency_ms", "emitted_time"}  # of a run, not of its results
SHOWN_ROWS = 3
Row = tuple[tuple[str, Any], ...]


def table_rows(root: Path, table: str) -> Counter[Row]:
    """Return how often each row stands in a table, without what belongs to the run."""
    if not (root / table).is_dir():
        return Counter()
    columns = [name for name in TABLES[table].names if name not in NOT_COMPARED]
    read = ds.dataset(root / table, format="parquet", schema=TABLES[table]).to_table(columns=columns)
    values = [_bits(read.column(name)) if name == "tokens" else read.column(name).to_pylist() for name in columns]
    return Counter(tuple(zip(columns, row, strict=True)) for row in zip(*values, strict=True))


def differences(root: Path, expected_root: Path) -> list[str]:
    """Return what is lost, doubled or other in the tables of `root`, a line each; none if they are the same."""
    told = []
    for table in TABLES:
        rows, expected = table_rows(root, table), table_rows(expected_root, table)
        twice = Counter({row: n - 1 for row, n in rows.items() if n > 1 and n > expected[row]})
        for what, found in (("doubled", twice), ("lost or other", expected - rows), ("too many", rows - expected)):
            if found:
                shown = "; ".join(_label(row) for row in sorted(found, key=str)[:SHOWN_ROWS])
                told.append(f"{table}: {found.total()} rows {what}: {shown}")
    return told


def row_counts(root: Path) -> dict[str, int]:
    """Return the rows of each table."""
    return {table: table_rows(root, table).total() for table in TABLES}


def _bits(column: Any) -> list[bytes]:
    lists = column.combine_chunks()
    values, offsets = lists.values.to_numpy(zero_copy_only=False).astype(np.float16), lists.offsets.to_numpy()
    return [values[a:b].tobytes() for a, b in pairwise(offsets)]


def _label(row: Row) -> str:
    shown = ("stream_id", "session", "chunk_index", "query_id", "start_time", "reason", "seq", "offset", "answer")
    return ", ".join(f"{name}={value}" for name, value in row if name in shown)
