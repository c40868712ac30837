"""A worker's mark of the record that it has in hand, in a small file that outlives the worker.

A record that ends its process (a decoder that crashes, memory that runs out) leaves no exception that names it: what
tells of it is the mark that nobody cleared. `pipeline.poison` reads the marks of the dead. A mark is one `write` of
the kernel, without a sync: it has to outlast the process, not the machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .rows import SegmentMeta

DEATHS_ALLOWED = 2  # of processes that had the same record in hand; with one more it is set aside


class RecordKey(NamedTuple):
    """Which Kafka record."""

    topic: str
    partition: int
    offset: int

    @classmethod
    def of(cls, meta: SegmentMeta) -> RecordKey:
        """Return that of a segment."""
        return cls(meta.topic, meta.partition, meta.offset)


@dataclass(frozen=True)
class Suspect:
    """A record that a process had in hand when it died."""

    topic: str
    partition: int
    offset: int
    stream_id: str
    step: str  # that had it in hand: decode or encode
    deaths: int  # of its processes, so far
    cause: str = ""  # of the last death, where it is known

    @property
    def key(self) -> RecordKey:
        """Return which record it is."""
        return RecordKey(self.topic, self.partition, self.offset)

    @property
    def is_poison(self) -> bool:
        """Whether it is set aside: no step touches it again."""
        return self.deaths > DEATHS_ALLOWED

    @property
    def detail(self) -> str:
        """Return what its dead letter says, the same at every replay."""
        last = f", at last by {self.cause}" if self.cause else ""
        return f"the process that was to {self.step} it died {self.deaths} times{last}; the stream goes on after a gap"


@dataclass(frozen=True)
class Mark:
    """What a worker's file says."""

    step: str
    in_hand: Suspect | None  # with the deaths that the worker knew of; None between two records
    passed: RecordKey | None  # the newest record that it was done with


class MarkFile:
    """Where one worker marks its records. Without a folder it marks none.

    Args:
        folder: Of the lane's marks; made if need be.
        step: The worker's step.
    """

    MARK_SUFFIX = ".json"
    SET_ASIDE_SUFFIX = ".jsonl"

    def __init__(self, folder: Path | None, step: str):
        self.step = step
        self._passed: RecordKey | None = None
        self._path: Path | None = None
        self._descriptor = -1
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / f"{step}-{os.uname().nodename}-{os.getpid()}-{os.urandom(4).hex()}{self.MARK_SUFFIX}"
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    @contextmanager
    def holding(self, meta: SegmentMeta, deaths: int = 0) -> Iterator[None]:
        """Mark a record for the time of the block; the mark stays where the block raises or the process dies.

        An end by silence is not marked: it has no record of its own, and the offset is of one that follows it.

        Args:
            meta: Which record.
            deaths: That it has had before.
        """
        if meta.by_silence:
            yield
            return
        self.mark(self.suspect(meta, deaths))
        yield
        self._passed = RecordKey.of(meta)
        self.mark(None)

    def suspect(self, meta: SegmentMeta, deaths: int, cause: str = "") -> Suspect:
        """Return a record of this step's as a suspect."""
        return Suspect(*RecordKey.of(meta), stream_id=meta.stream_id, step=self.step, deaths=deaths, cause=cause)

    def mark(self, suspect: Suspect | None) -> None:
        """Write what is in hand."""
        if self._path is not None:
            mark = {"step": self.step, "in_hand": suspect and vars(suspect), "passed": self._passed}
            os.pwrite(self._descriptor, json.dumps(mark).encode() + b"\n", 0)  # what a longer mark leaves is behind it

    def set_aside(self, suspect: Suspect) -> None:
        """Note a record that was set aside here, so that it stays so in the next lives of the lane."""
        if self._path is not None:
            with self._path.with_suffix(self.SET_ASIDE_SUFFIX).open("a") as file:
                file.write(json.dumps(vars(suspect)) + "\n")


def read_mark(path: Path) -> Mark | None:
    """Return what a mark file says, or None for an empty one, or one that a power cut damaged."""
    try:
        said: Mapping[str, Any] = json.loads(path.read_bytes().partition(b"\n")[0])
        in_hand = Suspect(**said["in_hand"]) if said["in_hand"] else None
        return Mark(said["step"], in_hand, RecordKey(*said["passed"]) if said["passed"] else None)
    except (ValueError, KeyError, TypeError):
        return None


def read_set_aside(path: Path) -> list[Suspect]:
    """Return the records that a worker set aside; lines that a power cut damaged are left out."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(Suspect(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found
