"""How each video of an archive fared, from the work list, the manifests and the dead letters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ...operators.rows import table_text
from ..compacted_files import while_files_move
from ..durable_files import draft_of, make_folder
from ..tables import DEAD_LETTERS
from .work_list import RANGES_PER_VIDEO, TOPIC, WorkItem, WorkList, committed_offsets, is_done

NOTICES = ("damaged", "late")  # reasons of dead letters with which a video still counts as done
VIDEOS_NAME = "videos.parquet"
SCHEMA = pa.schema(
    [
        pa.field("stream_id", pa.string(), nullable=False),
        pa.field("session", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),  # done, damaged, failed, waiting
        pa.field("reason", pa.string()),  # of the first dead letter
        pa.field("detail", pa.string()),
        pa.field("n_bytes", pa.int64()),
        pa.field("start_time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class Outcome:
    """How one video fared."""

    item: WorkItem
    state: str  # done, damaged, failed, waiting
    reason: str = ""
    detail: str = ""


def outcomes(root: Path) -> list[Outcome]:
    """Return how every video of an output folder fared so far, in the order of the list."""
    items = WorkList(root).read()
    offsets = committed_offsets(root)
    letters = _letters(root)
    return [_outcome(item, is_done(item, offsets), letters.get((item.partition, item.number), ())) for item in items]


def failed_items(root: Path, items: Sequence[WorkItem]) -> set[WorkItem]:
    """Return those of the items that failed, altogether or in their midst."""
    letters = _letters(root)
    return {item for item in items if _worst(letters.get((item.partition, item.number), ())) is not None}


def count_states(found: Iterable[Outcome]) -> Mapping[str, int]:
    """Return how many videos are in each state."""
    return Counter(outcome.state for outcome in found)


def write_videos(root: Path, found: Sequence[Outcome]) -> Path:
    """Write the overview, a Parquet file with a row for each video, in one step; return its path."""
    path = root / "archive" / VIDEOS_NAME
    make_folder(path.parent)
    with draft_of(path) as draft:
        pq.write_table(videos_table(found), draft)
    return path


def videos_table(found: Sequence[Outcome]) -> pa.Table:
    """Return a row for each video, as `SCHEMA` has it."""
    rows = [
        {
            "stream_id": outcome.item.stream_id,
            "session": outcome.item.session,
            "path": table_text(outcome.item.uri),
            "state": outcome.state,
            "reason": outcome.reason or None,
            "detail": outcome.detail or None,
            "n_bytes": outcome.item.n_bytes if outcome.item.n_bytes >= 0 else None,
            "start_time": outcome.item.start_ns // 1000,
            "sha256": outcome.item.sha256 or None,
        }
        for outcome in found
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


_Letter = tuple[str, str]  # reason, detail
_OF_ARCHIVE = pc.field("topic") == TOPIC


def _outcome(item: WorkItem, done: bool, letters: Sequence[_Letter]) -> Outcome:
    worst = _worst(letters)
    if worst is not None:
        return Outcome(item, "failed" if done else "waiting", *worst)
    if letters:
        return Outcome(item, "damaged" if done else "waiting", *letters[0])
    return Outcome(item, "done" if done else "waiting")


def _worst(letters: Sequence[_Letter]) -> _Letter | None:
    return next((letter for letter in letters if letter[0] not in NOTICES), None)


def _letters(root: Path) -> dict[tuple[int, int], list[_Letter]]:
    """Return the dead letters by the place of the video that they are of, in order."""
    folder = root / "dead_letters"
    if not folder.is_dir():
        return {}
    columns = ["partition", "offset", "reason", "detail"]
    # With the schema: a lane that writes its first file has made the folder before.
    table = while_files_move(
        lambda: ds.dataset(folder, schema=DEAD_LETTERS, format="parquet").to_table(columns, filter=_OF_ARCHIVE)
    )
    letters: dict[tuple[int, int], list[_Letter]] = {}
    for row in sorted(table.to_pylist(), key=lambda row: (row["partition"], row["offset"])):
        place = row["partition"], row["offset"] // RANGES_PER_VIDEO
        letters.setdefault(place, []).append((row["reason"], row["detail"]))
    return letters
