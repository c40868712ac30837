"""Compaction: what a DuckDB query over many small files costs, before and after.

    python benchmarks/compact.py [--files 2000] [--rounds 5]

Commits so many epochs of a few results and chunks each, as a lane would in an hour and more, and asks DuckDB two
things about the results: how many there are, and those of one stream in which a word occurs. Then the same after
`stormline compact`, from the same process; each number is the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from measuring import write_result

from stormline.operators.rows import Chunk, Position, Result
from stormline.pipeline.compaction import Compaction, CompactionSpec, total
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.recovery import recover
from stormline.pipeline.token_files import TokenFiles

BEGIN_NS = 1_790_000_000 * 10**9
COMMIT_NS = 2 * 10**9
STREAMS = 4  # a result and a chunk of each in every epoch
TOKENS_SHAPE = (16, 192)  # of a chunk of the built-in model
QUERIES = {
    "count": "select count(*) from '{}'",
    "filter": "select count(*) from '{}' where stream_id = 'cam-2' and answer like '%circle%'",
}


def write_epochs(out: Path, n_epochs: int) -> None:
    """Commit what lanes would."""
    start = recover(out, lanes=1, identity={}).for_lane(0, (("video", 0),))
    writer = EpochWriter(start, model="shapes-tiny", identity={})
    rng = np.random.default_rng(0)
    for n in range(n_epochs):
        at_ns = BEGIN_NS + n * COMMIT_NS
        chunks, results = [], []
        for k in range(STREAMS):
            tokens = rng.normal(size=TOKENS_SHAPE).astype(np.float16)
            place = (f"cam-{k}", "s", n, at_ns, at_ns + COMMIT_NS)
            chunks.append(Chunk(*place, BEGIN_NS, 4, 0.5, "video", 0, n * STREAMS + k, 0, tokens))
            answer = f"A red {'circle' if n % 3 else 'square'} moves to the left, number {n}."
            results.append(
                Result("caption", "caption", f"cam-{k}", "s", at_ns, at_ns + COMMIT_NS, "Describe what happens.",
                       answer, False, 16, "recent", 80.0, "shapes-tiny", at_ns + 3 * COMMIT_NS)
            )  # fmt: skip
        positions = [Position("video", 0, (n + 1) * STREAMS)]
        writer.commit(chunks=chunks, results=results, positions=positions, snapshots={})


def query_ms(out: Path, rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Return the median time of each query, and its answer."""
    times: dict[str, list[float]] = {name: [] for name in QUERIES}
    answers = {}
    for _ in range(rounds):
        for name, query in QUERIES.items():
            connection = duckdb.connect()  # a new one: nothing of the files is remembered
            began_s = time.perf_counter()
            found = connection.sql(query.format(f"{out}/results/**/*.parquet")).fetchall()
            times[name].append((time.perf_counter() - began_s) * 1e3)
            answers[name] = found[0][0]
            connection.close()
    return {name: round(statistics.median(each), 1) for name, each in times.items()}, answers


def first_look_ms(out: Path, rounds: int) -> float:
    """Return the median time that the service takes to know what the tokens table holds, as after its start."""
    times = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        TokenFiles(out).refresh()
        times.append((time.perf_counter() - began_s) * 1e3)
    return round(statistics.median(times), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2_000, help="of each table")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_epochs(out, args.files)
        before, answers_before = query_ms(out, args.rounds)
        look_before = first_look_ms(out, args.rounds)
        began_s = time.perf_counter()
        report = Compaction(out, CompactionSpec(min_age_s=-1, grace_s=0)).run()
        compact_s = time.perf_counter() - began_s
        after, answers_after = query_ms(out, args.rounds)
        look_after = first_look_ms(out, args.rounds)
    assert answers_before == answers_after
    done = total(report.dates)
    result: dict[str, Any] = {
        "files_before": done.files_before,
        "files_after": done.files_after,
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "compact_s": round(compact_s, 1),
        "query_ms_before": before,
        "query_ms_after": after,
        "before_over_after": {name: round(before[name] / after[name], 1) for name in QUERIES},
        "tokens_first_look_ms": {"before": look_before, "after": look_after},
        "tokens_first_look_before_over_after": round(look_before / look_after, 1),
    }
    write_result("compact", result, ["duckdb"])


if __name__ == "__main__":
    main()
