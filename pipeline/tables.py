"""The three tables that a lane writes, as explicit schemas. Nothing here is inferred from the data.

A table is a folder of Parquet files, ``tokens/date=2026-01-31/lane-000-epoch-00000012.parquet``. The date is the
UTC day of a row's `start_time`, so that a replay puts each row into the same folder. It stands in the path alone:
DuckDB, pandas, Polars and Spark add it as a column when they read the folder, and a second copy inside the files
makes pyarrow refuse the folder, because the two types differ.

Tokens are float16, as the model made them. DuckDB (1.3 or later) and Polars (1.10 or later) read them as float32
lists, pandas as float16 arrays. Spark has no such type: give it a schema without the column `tokens`, or read the
tables of results and dead letters, which it reads as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..operators.rows import Chunk, DeadLetter, Result

SCHEMA_VERSION = 1  # raise it with every change of a column; readers find it in each file's metadata

VERSION_KEY = b"stormline.schema_version"

_NS_PER_US = 1_000
_TIME = pa.timestamp("us", tz="UTC")
_FLOATS16 = pa.list_(pa.field("element", pa.float16(), nullable=False))


def _schema(name: str, *fields: tuple[str, pa.DataType], nullable: Sequence[str] = ()) -> pa.Schema:
    return pa.schema(
        [pa.field(column, type_, nullable=column in nullable) for column, type_ in fields],
        metadata={b"stormline.table": name.encode(), VERSION_KEY: str(SCHEMA_VERSION).encode()},
    )


TOKENS = _schema(
    "tokens",
    ("stream_id", pa.string()),
    ("session", pa.string()),
    ("chunk_index", pa.int64()),
    ("start_time", _TIME),
    ("end_time", _TIME),
    ("token_count", pa.int32()),
    ("token_dim", pa.int32()),
    ("tokens", _FLOATS16),  # row-major: reshape to (token_count, token_dim)
    ("scene_score", pa.float32()),  # null for a session's first chunk, which has nothing before it
    ("model", pa.string()),
    ("topic", pa.string()),
    ("partition", pa.int32()),
    ("offset", pa.int64()),
    nullable=["scene_score"],
)

RESULTS = _schema(
    "results",
    ("query_id", pa.string()),
    ("kind", pa.string()),
    ("stream_id", pa.string()),
    ("session", pa.string()),
    ("start_time", _TIME),
    ("end_time", _TIME),
    ("prompt", pa.string()),
    ("answer", pa.string()),
    ("alert", pa.bool_()),
    ("tokens_used", pa.int64()),
    ("token_policy", pa.string()),
    ("latency_ms", pa.float64()),
    ("model", pa.string()),
    ("emitted_time", _TIME),
)

DEAD_LETTERS = _schema(
    "dead_letters",
    ("reason", pa.string()),
    ("detail", pa.string()),
    ("stream_id", pa.string()),
    ("session", pa.string()),
    ("seq", pa.int64()),
    ("topic", pa.string()),
    ("partition", pa.int32()),
    ("offset", pa.int64()),
    ("start_time", _TIME),
    ("n_bytes", pa.int64()),  # of the whole record; `data` may be cut shorter
    ("data", pa.binary()),
)

TABLES: Mapping[str, pa.Schema] = {"tokens": TOKENS, "results": RESULTS, "dead_letters": DEAD_LETTERS}


def tokens_table(chunks: Sequence[Chunk], model: str) -> pa.Table:
    """Build rows of the tokens table.

    Args:
        chunks: Their tokens are (token_count, token_dim) float16.
        model: Fingerprint of the model that made them.

    Raises:
        ValueError: If a chunk's tokens have another shape or dtype.
    """
    for chunk in chunks:
        if chunk.tokens.ndim != 2 or chunk.tokens.dtype != np.float16:
            raise ValueError(
                f"tokens of stream={chunk.stream_id} chunk={chunk.chunk_index}: got {chunk.tokens.dtype} "
                f"{chunk.tokens.shape}, expected float16 (token_count, token_dim)"
            )
    return pa.table(
        [
            [c.stream_id for c in chunks],
            [c.session for c in chunks],
            [c.chunk_index for c in chunks],
            _times(c.start_ns for c in chunks),
            _times(c.end_ns for c in chunks),
            pa.array([c.tokens.shape[0] for c in chunks], pa.int32()),
            pa.array([c.tokens.shape[1] for c in chunks], pa.int32()),
            _token_lists(chunks),
            pa.array([None if math.isnan(c.scene_score) else c.scene_score for c in chunks], pa.float32()),
            [model] * len(chunks),
            [c.topic for c in chunks],
            pa.array([c.partition for c in chunks], pa.int32()),
            [c.offset for c in chunks],
        ],
        schema=TOKENS,
    )


def results_table(results: Sequence[Result]) -> pa.Table:
    """Build rows of the results table."""
    return pa.table(
        [
            [r.query_id for r in results],
            [r.kind for r in results],
            [r.stream_id for r in results],
            [r.session for r in results],
            _times(r.start_ns for r in results),
            _times(r.end_ns for r in results),
            [r.prompt for r in results],
            [r.answer for r in results],
            [r.alert for r in results],
            [r.tokens_used for r in results],
            [r.token_policy for r in results],
            [r.latency_ms for r in results],
            [r.model for r in results],
            _times(r.emitted_ns for r in results),
        ],
        schema=RESULTS,
    )


def dead_letters_table(letters: Sequence[DeadLetter]) -> pa.Table:
    """Build rows of the dead letters table."""
    return pa.table(
        [
            [d.reason for d in letters],
            [d.detail for d in letters],
            [d.stream_id for d in letters],
            [d.session for d in letters],
            [d.seq for d in letters],
            [d.topic for d in letters],
            pa.array([d.partition for d in letters], pa.int32()),
            [d.offset for d in letters],
            _times(d.start_ns for d in letters),
            [d.n_bytes for d in letters],
            pa.array([d.data for d in letters], pa.binary()),
        ],
        schema=DEAD_LETTERS,
    )


def split_by_date(table: pa.Table) -> dict[str, pa.Table]:
    """Split a table by the UTC day of `start_time`, as ``YYYY-MM-DD``; the order of rows stays within each."""
    if table.num_rows == 0:
        return {}
    days = pc.call_function("strftime", [table["start_time"]], pc.StrftimeOptions("%Y-%m-%d"))
    names = sorted(set(days.to_pylist()))
    if len(names) == 1:
        return {names[0]: table}
    return {name: table.filter(pc.call_function("equal", [days, pa.scalar(name)])) for name in names}


def _times(times_ns) -> pa.Array:
    return pa.array([ns // _NS_PER_US for ns in times_ns], pa.int64()).cast(_TIME)


def _token_lists(chunks: Sequence[Chunk]) -> pa.Array:
    """Join the tokens of all chunks into one list<float16> array, without a Python object per value."""
    ends = np.cumsum([0, *(c.tokens.size for c in chunks)])
    flat = [np.ascontiguousarray(c.tokens).reshape(-1) for c in chunks]
    values = np.concatenate(flat) if flat else np.zeros(0, np.float16)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values), type=_FLOATS16)
