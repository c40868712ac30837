"""Watches an output folder from outside: which epochs are committed, with what, and when."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from stormline.operators.errors import CheckpointError
from stormline.pipeline.checkpoint import MANIFEST_NAME, epoch_folder, list_committed, list_lanes, read_manifest

POLL_S = 0.05  # three epochs are kept, each at least a barrier interval old: none is missed


@dataclass(frozen=True)
class Commit:
    """One committed epoch."""

    lane: int
    epoch: int
    time_s: float
    n_rows: int
    next_offsets: dict[tuple[str, int], int]
    newest_answer_s: float  # when its newest result was given, 0 for none


class CommitWatch(threading.Thread):
    """Take note of each commit as it is made, until `stop`."""

    def __init__(self, root: Path):
        super().__init__(name="commits", daemon=True)
        self._root = root
        self._seen: set[tuple[int, int]] = set()
        self._done = threading.Event()
        self.commits: list[Commit] = []
        self.next_offsets: dict[tuple[str, int], int] = {}

    @property
    def n_records(self) -> int:
        """Return how many records are committed."""
        return sum(list(self.next_offsets.values()))

    def run(self) -> None:
        while not self._done.wait(POLL_S):
            self.look()

    def stop(self) -> None:
        """End the watch."""
        self._done.set()
        self.join(10)

    def look(self) -> None:
        """Take note of what is new."""
        for lane in list_lanes(self._root):
            for epoch in reversed(list_committed(self._root, lane)):
                if (lane, epoch) not in self._seen and (commit := self._read(lane, epoch)):
                    self._seen.add((lane, epoch))
                    self.commits.append(commit)
                    for partition, next_offset in commit.next_offsets.items():
                        self.next_offsets[partition] = max(next_offset, self.next_offsets.get(partition, 0))

    def _read(self, lane: int, epoch: int) -> Commit | None:
        path = epoch_folder(self._root, lane, epoch) / MANIFEST_NAME
        try:
            manifest, time_s = read_manifest(self._root, lane, epoch), path.stat().st_mtime
        except (OSError, CheckpointError):
            return None  # pruned, or not whole: seen again at the next look
        return Commit(
            lane=lane,
            epoch=epoch,
            time_s=time_s,
            n_rows=sum(f.n_rows for f in manifest.data_files),
            next_offsets={tuple(p): offset for p, offset in manifest.next_offsets.items()},
            newest_answer_s=max(
                (self._newest_answer_s(f.path) for f in manifest.data_files if f.table == "results"), default=0.0
            ),
        )

    def _newest_answer_s(self, path: str) -> float:
        times = pq.read_table(self._root / path, columns=["emitted_time"])["emitted_time"].to_pylist()
        return max(time.timestamp() for time in times)
