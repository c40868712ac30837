"""The tables: exact columns, and the same values in every reader."""

import math

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from stormline.operators.rows import Chunk, DeadLetter, Result
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.recovery import recover
from stormline.pipeline.tables import (
    DEAD_LETTERS,
    RESULTS,
    TOKENS,
    dead_letters_table,
    results_table,
    split_by_date,
    tokens_table,
)

DAY_NS = 86_400 * 10**9
NOON_NS = 1_769_860_800 * 10**9  # 2026-01-31T12:00:00Z


def make_chunk(index=0, start_ns=NOON_NS, tokens=None, scene_score=0.5):
    if tokens is None:
        tokens = (np.arange(8, dtype=np.float32).reshape(4, 2) / 3 + index).astype(np.float16)
    return Chunk(
        stream_id="gate",
        session="s",
        chunk_index=index,
        start_ns=start_ns,
        end_ns=start_ns + 2 * 10**9,
        session_start_ns=NOON_NS,
        n_frames=4,
        scene_score=scene_score,
        topic="video",
        partition=3,
        offset=40 + index,
        append_ns=0,
        tokens=tokens,
    )


def make_result(start_ns=NOON_NS):
    return Result(
        "caption",
        "caption",
        "gate",
        "s",
        start_ns,
        start_ns + 10**9,
        "What?",
        "Ä car",
        False,
        16,
        "recent",
        1.5,
        "m",
        7,
    )


def make_letter(data=b"\x00\xff"):
    return DeadLetter("corrupt", "no keyframe", "gate", "s", 4, "video", 3, 99, NOON_NS, 5_000, data)


def test_tokens_table_when_built_then_columns_are_those_of_the_schema():
    table = tokens_table([make_chunk(0, scene_score=math.nan), make_chunk(1)], "storm-1")

    row = table.slice(0, 1).to_pylist()[0]
    assert table.schema.equals(TOKENS, check_metadata=True)
    assert (row["token_count"], row["token_dim"]) == (4, 2)
    assert row["start_time"].isoformat() == "2026-01-31T12:00:00+00:00"
    assert table["scene_score"].to_pylist() == [None, 0.5]
    assert np.array_equal(np.array(table["tokens"][1].as_py(), np.float16).reshape(4, 2), make_chunk(1).tokens)


def test_tables_when_there_are_no_rows_then_schemas_stay():
    assert tokens_table([], "m").schema == TOKENS
    assert results_table([]).schema == RESULTS
    assert dead_letters_table([]).schema == DEAD_LETTERS
    assert split_by_date(results_table([])) == {}


def test_tokens_table_when_tokens_are_a_strided_view_then_values_are_row_major():
    transposed = np.arange(6, dtype=np.float16).reshape(2, 3).T  # (3, 2), not contiguous

    table = tokens_table([make_chunk(tokens=transposed)], "m")

    assert table["tokens"][0].as_py() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("tokens", [np.zeros((4, 2), np.float32), np.zeros(8, np.float16)])
def test_tokens_table_when_tokens_have_another_form_then_it_raises(tokens):
    with pytest.raises(ValueError, match=r"stream=gate chunk=0: got float"):
        tokens_table([make_chunk(tokens=tokens)], "m")


def test_dead_letters_when_data_is_a_view_then_bytes_are_kept():
    assert dead_letters_table([make_letter(memoryview(b"abc")[1:])])["data"].to_pylist() == [b"bc"]


def test_split_by_date_when_rows_cross_midnight_then_each_is_in_its_day():
    midnight_ns = NOON_NS + DAY_NS // 2
    starts_ns = [midnight_ns, midnight_ns - 1, midnight_ns + 1, midnight_ns - 2_000, 0]
    table = results_table([make_result(ns) for ns in starts_ns])

    days = split_by_date(table)

    assert {day: rows.num_rows for day, rows in days.items()} == {
        "1970-01-01": 1,
        "2026-01-31": 2,
        "2026-02-01": 2,
    }
    assert days["2026-01-31"]["start_time"].cast(pa.int64()).to_pylist() == [
        (midnight_ns - 1) // 1000,
        (midnight_ns - 2_000) // 1000,
    ]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An output folder of two epochs over two days, and the draft of a third."""
    root = tmp_path_factory.mktemp("out")
    writer = EpochWriter(recover(root, lanes=1, identity={}).for_lane(0, []), model="storm-1", identity={})
    for i in range(2):
        chunks = [make_chunk(2 * i, NOON_NS + i * DAY_NS), make_chunk(2 * i + 1, NOON_NS + i * DAY_NS)]
        writer.commit(
            chunks=chunks,
            results=[make_result(NOON_NS + i * DAY_NS)],
            dead_letters=[make_letter()],
            positions=[],
            snapshots={},
        )
    whole = next((root / "tokens").rglob("*.parquet"))
    whole.with_name(".lane-000-epoch-00000003.parquet.tmp").write_bytes(b"PAR1 torn")
    return root


def test_duckdb_when_reading_the_folder_then_tokens_dates_and_rows_are_right(out):
    rows = duckdb.sql(
        f"select chunk_index, token_count, token_dim, tokens, cast(date as varchar) as day "
        f"from '{out}/tokens/**/*.parquet' order by chunk_index"
    ).fetchall()

    assert [r[0] for r in rows] == [0, 1, 2, 3]
    assert [r[4] for r in rows] == ["2026-01-31", "2026-01-31", "2026-02-01", "2026-02-01"]
    for index, count, dim, tokens, _ in rows:
        assert np.array_equal(np.array(tokens, np.float16).reshape(count, dim), make_chunk(index).tokens)
    answers = duckdb.sql(f"select answer from '{out}/results/**/*.parquet' where date = '2026-02-01'").fetchall()
    assert answers == [("Ä car",)]


def test_pandas_when_reading_the_folder_then_tokens_and_types_are_right(out):
    frame = pd.read_parquet(out / "tokens").sort_values("chunk_index")

    assert list(frame["chunk_index"]) == [0, 1, 2, 3]
    assert str(frame["start_time"].dtype) == "datetime64[us, UTC]"
    assert frame["tokens"].iloc[1].dtype == np.float16
    assert np.array_equal(frame["tokens"].iloc[1].reshape(4, 2), make_chunk(1).tokens)
    assert pd.read_parquet(out / "dead_letters")["data"].tolist() == [b"\x00\xff"] * 2


def test_arrow_dataset_when_reading_the_folder_then_the_date_prunes(out):
    dataset = ds.dataset(out / "tokens", format="parquet", partitioning="hive")

    assert dataset.count_rows() == 4
    assert dataset.count_rows(filter=ds.field("date") == "2026-02-01") == 2


def test_polars_when_reading_by_pattern_then_tokens_are_right(out):
    # A plain folder will not do while a file is being written: Polars refuses one with other files in it.
    frame = polars.read_parquet(out / "tokens/**/*.parquet").sort("chunk_index")

    assert np.array_equal(np.array(frame["tokens"][1].to_list(), np.float16).reshape(4, 2), make_chunk(1).tokens)


def test_files_when_written_then_each_names_table_and_schema_version(out):
    for table in ("tokens", "results", "dead_letters"):
        path = next((out / table).rglob("*.parquet"))
        metadata = pq.read_metadata(path).metadata
        assert metadata[b"stormline.table"] == table.encode()
        assert metadata[b"stormline.schema_version"] == b"1"
