"""Which records are suspected of ending the processes that work on them, and which are set aside for it.

    checkpoints/lane-000/in-hand/*.json     each worker's mark of the record in hand (`operators.in_hand`)
    checkpoints/lane-000/in-hand/*.jsonl    records that a decoder proved to end processes, and set aside
    checkpoints/suspects.json               what the supervisor made of them: this file's

A record whose process died is a suspect, until a commit goes past it. In the lane's next life a decoder's suspect is
decoded in a process apart: if it was innocent, no more comes of it. The encoder's state cannot be kept apart; its
suspect is tried again as it is. After three deaths a record is set aside: Decode makes a dead letter of it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from ..operators.errors import CommitError
from ..operators.in_hand import Mark, MarkFile, RecordKey, Suspect, read_mark, read_set_aside
from .checkpoint import lane_folder
from .durable_files import make_folder, replace_file, write_failure

logger = logging.getLogger(__name__)

VERSION = 1
FILE_NAME = "suspects.json"
SET_ASIDE_KEPT = 1000  # the newest ones; should a damaged checkpoint send a lane back, they are not met again
_STEP = re.compile(r"MapBatches\((\w+)\)")
_ACTOR = re.compile(r"class_name: (\w+)\n")


def marks_folder(root: Path, lane: int) -> Path:
    """Return where a lane's workers mark what they have in hand."""
    return lane_folder(root, lane) / "in-hand"


def step_of(error: BaseException) -> str | None:
    """Return the name of the one step or actor that a lane's error came from, in lower case; None where unclear."""
    text = str(error)
    found = set(_STEP.findall(text)) or set(_ACTOR.findall(text))
    return found.pop().lower() if len(found) == 1 else None


class SuspectList:
    """The suspects of one output folder, kept on disk. The supervisor's alone.

    Args:
        root: The output folder.
    """

    def __init__(self, root: Path | str):
        self._root = Path(root).absolute()
        self._path = self._root / "checkpoints" / FILE_NAME
        self._suspects: dict[tuple[str, RecordKey], Suspect] = {}  # by step and record, the oldest first
        self._counted: frozenset[str] = frozenset()  # mark files that are counted already
        self._read()

    def of(self, partitions: Iterable[tuple[str, int]]) -> tuple[Suspect, ...]:
        """Return the suspects of some partitions, those that are set aside among them."""
        mine = set(partitions)
        return tuple(s for s in self._suspects.values() if (s.topic, s.partition) in mine)

    def take_marks(
        self, lane: int, next_offsets: Mapping[tuple[str, int], int], blamed: str | None = None
    ) -> list[Suspect]:
        """Count what a lane's dead workers had in hand, once; forget what a commit has gone past.

        The supervisor calls it when a lane failed, and for every lane when it starts: its last run may have been
        killed as a whole.

        Args:
            lane: Whose workers they were.
            next_offsets: What is committed of its partitions.
            blamed: The step that the failure came from (`step_of`), or any other word where none is to blame; None
                where it is unclear, so that each may be it.

        Returns:
            The records that are set aside from now on.

        Raises:
            CommitError: If the disk refuses; then nothing is counted yet.
        """
        folder = marks_folder(self._root, lane)
        files = sorted(p for p in folder.iterdir() if p.name not in self._counted) if folder.is_dir() else []
        before, counted_before = dict(self._suspects), self._counted
        for path in files:
            if path.suffix == MarkFile.SET_ASIDE_SUFFIX:
                self._suspects |= {(s.step, s.key): s for s in read_set_aside(path)}
            elif (mark := read_mark(path)) is not None:
                self._take(mark, next_offsets, blamed)
        self._forget_past(next_offsets)
        if self._suspects != before:
            self._counted = frozenset(path.name for path in files)
            try:
                self._write()
            except OSError as error:
                self._suspects, self._counted = before, counted_before  # the marks stay, for when it is tried again
                raise CommitError(write_failure(error, self._root)) from error
        self.forget(lane)
        return [s for key, s in self._suspects.items() if s.is_poison and s != before.get(key)]

    def forget(self, lane: int) -> None:
        """Remove the marks of workers that were ended on purpose."""
        folder = marks_folder(self._root, lane)
        for path in folder.iterdir() if folder.is_dir() else ():
            path.unlink(missing_ok=True)

    def _take(self, mark: Mark, next_offsets: Mapping[tuple[str, int], int], blamed: str | None) -> None:
        if mark.step == "encode":  # one process, in order: what it got past did not end it
            for passed in (mark.passed, mark.in_hand and mark.in_hand.key):
                self._clear(mark, passed)
        if mark.in_hand is None or blamed not in (None, mark.step):
            return
        if mark.in_hand.offset < next_offsets.get(mark.in_hand.key[:2], 0):
            return
        key = mark.step, mark.in_hand.key
        known = self._suspects.get(key)
        deaths = 1 + max(mark.in_hand.deaths, known.deaths if known else 0)
        self._suspects[key] = replace(mark.in_hand, deaths=deaths)
        logger.warning("suspect partition=%s[%d] offset=%d step=%s deaths=%d", *mark.in_hand.key, mark.step, deaths)

    def _clear(self, mark: Mark, passed: RecordKey | None) -> None:
        """Forget an encoder's suspects that it got past, up to the record it had in hand, that one not included."""
        if passed is None:
            return
        end = passed.offset + (passed == mark.passed)
        self._suspects = {
            key: s
            for key, s in self._suspects.items()
            if s.is_poison or s.step != mark.step or s.key[:2] != passed[:2] or s.offset >= end
        }

    def _forget_past(self, next_offsets: Mapping[tuple[str, int], int]) -> None:
        set_aside = [key for key, s in self._suspects.items() if s.is_poison]
        kept = set(set_aside[-SET_ASIDE_KEPT:])
        self._suspects = {
            key: s
            for key, s in self._suspects.items()
            if (key in kept if s.is_poison else s.offset >= next_offsets.get((s.topic, s.partition), 0))
        }

    def _read(self) -> None:
        try:
            said = json.loads(self._path.read_bytes())
            if said["version"] != VERSION:
                raise ValueError(f"version {said['version']}, expected {VERSION}")
            suspects = [Suspect(**s) for s in said["suspects"]]
            self._counted = frozenset(said["counted"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            # Only what was learned of records is lost: one that ends processes is found out again.
            logger.warning("%s cannot be read (%s); it is made anew", self._path, error)
            return
        self._suspects = {(s.step, s.key): s for s in suspects}

    def _write(self) -> None:
        suspects = [asdict(s) for s in self._suspects.values()]
        said = {"version": VERSION, "counted": sorted(self._counted), "suspects": suspects}
        make_folder(self._path.parent)
        replace_file(self._path, json.dumps(said, indent=1).encode())
