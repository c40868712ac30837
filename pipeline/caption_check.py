"""Compares captions of the generated feed with what the feed really showed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from ..models.training.questions import caption_recall, exact
from ..models.training.shapes import ShapesSpec, ShapesWorld

_SECOND = 1_000_000  # in microseconds, the tables' unit


@dataclass(frozen=True)
class CaptionCheck:
    """How many captions are right."""

    checked: int
    right: int  # every word of them
    clauses: float  # mean share of right clauses, those made up counted against it; 0 where nothing was checked
    left_out: int  # windows near whose ends something happens, so that frames may or may not show it

    def __str__(self) -> str:
        text = f"{self.right} of {self.checked} word for word, {self.clauses:.0%} of what they say"
        return f"{text} ({self.left_out} more cut through an event)" if self.left_out else text


def check_captions(root: Path, stream_id: str, spec: ShapesSpec) -> CaptionCheck:
    """Compare the captions of a stream of the generated feed with the truth.

    Args:
        root: Output folder of a run that has ended.
        stream_id: The stream, published from the beginning of the world.
        spec: The world.
    """
    mine = ds.field("stream_id") == stream_id
    tokens: list[dict[str, Any]] = _read(root / "tokens", ["session", "start_time"], mine)
    began_us: dict[str, int] = {}
    for row in tokens:
        began_us[row["session"]] = min(row["start_time"], began_us.get(row["session"], row["start_time"]))
    world = ShapesWorld(spec)
    checked = right = left_out = 0
    clauses = 0.0
    captions = _read(
        root / "results", ["session", "start_time", "end_time", "answer"], mine & (ds.field("kind") == "caption")
    )
    for row in captions:
        start_s, stop_s = ((row[name] - began_us[row["session"]]) / _SECOND for name in ("start_time", "end_time"))
        truth = world.truth(start_s, stop_s)
        if not truth.clear:
            left_out += 1
            continue
        checked += 1
        right += exact(row["answer"], truth.caption)
        clauses += caption_recall(row["answer"], truth.caption)
    return CaptionCheck(checked, right, clauses / checked if checked else 0.0, left_out)


def _read(folder: Path, columns: list[str], wanted: ds.Expression) -> list[dict[str, Any]]:
    if not folder.is_dir():
        return []
    table = ds.dataset(folder, format="parquet").to_table(columns=columns, filter=wanted)
    for name in ("start_time", "end_time"):
        if name in columns:
            table = table.set_column(table.schema.get_field_index(name), name, table[name].cast("int64"))
    return table.to_pylist()
