"""Is an archive's output what its folder's clips must give? Counted from the clips, not from what decoded them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from stormline.pipeline.archive.outcomes import count_states, outcomes
from stormline.pipeline.archive.work_list import committed_offsets, is_done

from .folder import Clip

FPS, CHUNK_FRAMES = 2, 4
WINDOW_S = 30.0
WHOLE = "what-is-it"  # the query's id, from its words


def rows_by_stream(root: Path, table: str, columns: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return a table's rows by stream, in the order of their times."""
    rows = defaultdict(list)
    if (root / table).is_dir():
        for row in ds.dataset(root / table, format="parquet").to_table([*columns, "stream_id"]).to_pylist():
            rows[row["stream_id"]].append(row)
    return {name: sorted(found, key=lambda r: r["start_time"]) for name, found in rows.items()}


@dataclass(frozen=True)
class Asked:
    """What the archive was asked about: captions of windows, and one question about each whole video."""

    window_s: float = WINDOW_S
    whole: str = WHOLE


def problems(root: Path, clips: Sequence[Clip], asked: Asked | None = None) -> list[str]:
    """Return what of an archive is not as its clips want it, a line each; none if all is well."""
    asked = asked or Asked()
    found = {o.item.stream_id: o for o in outcomes(root)}
    tokens = rows_by_stream(root, "tokens", ("chunk_index", "start_time", "end_time", "token_count"))
    results = rows_by_stream(root, "results", ("query_id", "start_time", "end_time", "answer"))
    told = [f"{name} is in the list, and not in the folder" for name in found.keys() - {clip.name for clip in clips}]
    for clip in clips:
        outcome = found.get(clip.name)
        if outcome is None:
            told.append(f"{clip.name} is not in the list")
        elif clip.reason:
            if outcome.reason != clip.reason or not outcome.detail:
                told.append(f"{clip.name} is {outcome.state} ({outcome.reason}), expected {clip.reason}")
            n_sampled = clip.at_least and _n_sampled(tokens.get(clip.name, []))
            if n_sampled < clip.at_least:
                told.append(f"{clip.name} has {n_sampled} frames, expected {clip.at_least} before it breaks off")
        elif outcome.state != "done":
            told.append(f"{clip.name} is {outcome.state} ({outcome.reason}: {outcome.detail}), expected done")
        else:
            told += _of_good(clip, tokens.get(clip.name, []), results.get(clip.name, []), asked)
    return told


def _of_good(
    clip: Clip, chunks: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], asked: Asked
) -> list[str]:
    n_chunks = math.ceil(clip.n_sampled / CHUNK_FRAMES)
    wanted = {
        "chunks": (list(range(n_chunks)), [c["chunk_index"] for c in chunks]),
        "seconds": (clip.n_sampled / FPS, _seconds(chunks[-1]["end_time"]) if chunks else 0.0),
        "tokens a chunk": ([chunks[0]["token_count"]] if chunks else [1], sorted({c["token_count"] for c in chunks})),
        "captions from": (
            [i * asked.window_s for i in range(math.ceil(clip.n_sampled / FPS / asked.window_s))],
            [_seconds(r["start_time"]) for r in results if r["query_id"] == "caption"],
        ),
        "answers for the whole, until": (
            [clip.n_sampled / FPS],
            [_seconds(r["end_time"]) for r in results if r["query_id"] == asked.whole],
        ),
    }
    return [f"{clip.name}: {what} {got}, expected {want}" for what, (want, got) in wanted.items() if got != want]


def _n_sampled(chunks: Sequence[dict[str, Any]]) -> int:
    return round(_seconds(chunks[-1]["end_time"]) * FPS) if chunks else 0


def _seconds(time: datetime) -> float:
    return time.timestamp()


def finished(root: Path) -> set[tuple[int, int]]:
    """Return the places in the list of the videos that are finished."""
    offsets = committed_offsets(root)
    return {(o.item.partition, o.item.number) for o in outcomes(root) if is_done(o.item, offsets)}


def states(root: Path) -> dict[str, int]:
    """Return how many videos are in each state."""
    return dict(count_states(outcomes(root)))


def written_after(root: Path, videos: set[tuple[int, int]], time_s: float, ranges_per_video: int) -> list[str]:
    """Return where rows of videos stand in files that were written after a moment."""
    told = []
    for path in sorted((root / "tokens").rglob("*.parquet")):
        if path.stat().st_mtime > time_s:
            rows = ds.dataset(path).to_table(["partition", "offset", "stream_id"]).to_pylist()
            again = {r["stream_id"] for r in rows if (r["partition"], r["offset"] // ranges_per_video) in videos}
            told += [f"{name} was done again, in {path.name}" for name in sorted(again)]
    return told
