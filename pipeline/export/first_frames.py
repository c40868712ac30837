"""When each session's video begins: what times within it are told from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow.compute as pc

from ..archive.work_list import WorkList
from ..durations import moment_ns
from ..result_index import Session
from ..table_reader import RowFilter, TableReader


def first_frames_us(root: Path, stream: str | None = None) -> Mapping[Session, int]:
    """Return the time of each session's first frame, in µs since 1970, as far as it is known.

    An archive's list of videos says it, else the first chunk of tokens; where tokens were not kept, nothing does.

    Args:
        root: The output folder.
        stream: Only of streams of this name, or pattern.
    """
    items = WorkList(root).read()
    if items:
        return {Session(item.stream_id, item.session): item.start_ns // 1_000 for item in items}
    columns = ["stream_id", "session", "chunk_index", "start_time"]
    found: dict[Session, int] = {}
    for batch in TableReader(root, "tokens", RowFilter(stream=stream), columns).batches():
        for row in batch.filter(pc.field("chunk_index") == 0).to_pylist():
            found[Session(row["stream_id"], row["session"])] = moment_ns(row["start_time"]) // 1_000
    return found
