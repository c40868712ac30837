"""The list of what an archive has to do, and in which order: a file that only grows.

    OUT/archive/work.jsonl      one line a video and version, in the order in which they were found

Each line names the place that it has for ever: the `number`-th of its `partition`. The partitions are those of a
make-believe topic, so that a lane commits its place in the list as it commits its place in Kafka. The offset of the
k-th range of video number n is ``n * RANGES_PER_VIDEO + k``, and the one after a video's last range is that of the
next video. So an offset means the same after a restart, however many ranges a video turns out to have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...operators.errors import CheckpointError
from ..checkpoint import list_lanes, whole_manifests
from ..durable_files import make_folder, sync_file, sync_folder

TOPIC = "archive"
RANGES_PER_VIDEO = 1_000_000  # of ten seconds each: four months of video


@dataclass(frozen=True)
class WorkItem:
    """One version of one video."""

    partition: int
    number: int  # of its partition
    uri: str
    stream_id: str
    session: str
    version: int  # 1, 2… of the same address: the content changed, or it failed and was asked for again
    n_bytes: int  # -1 where it was not there
    mtime_ns: int
    start_ns: int  # of its first frame
    sha256: str = ""

    @property
    def video_name(self) -> str:
        """Return the stream of its first version: the name of the video, whatever became of it since."""
        return self.stream_id.removesuffix(f"@{self.version}") if self.version > 1 else self.stream_id

    @property
    def first_offset(self) -> int:
        """Return the offset of its first range."""
        return self.number * RANGES_PER_VIDEO

    @property
    def next_offset(self) -> int:
        """Return the offset after its last range, whichever that is."""
        return self.first_offset + RANGES_PER_VIDEO


class WorkList:
    """The list of one output folder.

    One process appends, holding the `OutputLock`; lanes read meanwhile. A line that a crash cut short never was.

    Args:
        root: The output folder.
    """

    def __init__(self, root: Path):
        self.path = root / "archive" / "work.jsonl"
        self._followed_bytes = 0  # of whole lines

    def read(self) -> list[WorkItem]:
        """Return all of it, in order.

        Raises:
            CheckpointError: If it is damaged: then offsets have lost their meaning.
        """
        return self._parse(self._whole_lines(0))

    def follow(self) -> list[WorkItem]:
        """Return what was added since the last call, or all of it at the first; reads no more than that.

        Raises:
            CheckpointError: As `read`.
        """
        data = self._whole_lines(self._followed_bytes)
        items = self._parse(data)
        self._followed_bytes += len(data)
        return items

    def _whole_lines(self, start_bytes: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(start_bytes)
                data = file.read()
        except FileNotFoundError:
            return b""
        return data[: data.rfind(b"\n") + 1]

    def _parse(self, data: bytes) -> list[WorkItem]:
        try:
            return [WorkItem(**json.loads(line)) for line in data.splitlines()]
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.path} is damaged ({error}), so that what was committed cannot be told from what is to do. "
                "Restore it from a backup, or choose a new output folder. Nothing was changed."
            ) from error

    def append(self, items: Iterable[WorkItem]) -> None:
        """Add items; they are on the disk when it returns."""
        lines = [json.dumps(asdict(item)).encode() + b"\n" for item in items]
        if not lines:
            return
        make_folder(self.path.parent)
        with self.path.open("ab") as file:
            file.truncate(len(self._whole_lines(0)))
            file.write(b"".join(lines))
        sync_file(self.path)
        sync_folder(self.path.parent)


def by_partition(items: Iterable[WorkItem]) -> dict[int, list[WorkItem]]:
    """Return each partition's items, in order."""
    parts: dict[int, list[WorkItem]] = {}
    for item in items:
        parts.setdefault(item.partition, []).append(item)
    return parts


def newest_versions(items: Iterable[WorkItem]) -> dict[str, WorkItem]:
    """Return the newest item of each address."""
    return {item.uri: item for item in items}


def committed_offsets(root: Path) -> dict[int, int]:
    """Return each partition's next offset, as the manifests have it; without repairing anything."""
    offsets: dict[int, int] = {}
    for lane in list_lanes(root):
        for manifest in whole_manifests(root, lane):
            for (topic, partition), next_offset in manifest.next_offsets.items():
                if topic == TOPIC:
                    offsets[partition] = max(offsets.get(partition, 0), next_offset)
    return offsets


def is_done(item: WorkItem, offsets: Mapping[int, int]) -> bool:
    """Tell whether a video is finished, well or not, where lanes have committed this far."""
    return offsets.get(item.partition, 0) >= item.next_offset


def spread(weights: Sequence[int], loads: Sequence[int]) -> Iterator[int]:
    """Yield a partition for each weight, always the one with the least to do."""
    todo = list(loads)
    for weight in weights:
        partition = todo.index(min(todo))
        todo[partition] += max(1, weight)
        yield partition


def readable(name: str) -> str:
    """Return a file name as text that can be written anywhere; bytes that are none stand as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").replace(os.sep, "/")
