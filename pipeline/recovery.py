"""Finds what is committed in an output folder, removes what is not, and says where each partition goes on.

The rules, in the order in which they are applied; nothing is deleted before all of them hold:

1. A lane has committed up to its newest whole manifest. One that is damaged does not count; the lane takes the
   epoch before, with a warning, and reads the rest again.
2. Unless others went on from the damaged one (`built_on`), or a partition's last state is in an older, damaged
   one: then no choice of ours loses nothing, and we say so instead of choosing.
3. A partition goes on from the manifest with its highest next offset, of whichever lane: so lanes may become more
   or fewer.
4. The settings that a folder was made with still hold.
5. Rows and drafts of later epochs than a lane's committed one never happened, and are deleted. Compacted files hold
   none of these: a compaction takes nothing that rule 1 could give up. One that does is refused, too.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..operators.errors import CheckpointError, CommitError
from .checkpoint import (
    MANIFEST_NAME,
    DamagedCheckpointError,
    LaneStart,
    Manifest,
    PartitionStart,
    TopicPartition,
    epoch_folder,
    list_committed,
    list_epochs,
    list_lanes,
    plain_json,
    prune_checkpoints,
    read_manifest,
    read_state,
    remove_epoch,
    write_owner,
)
from .compacted_files import find_rows
from .durable_files import write_failure
from .files_lock import files_stay
from .parquet_sink import FoundFile, find_data_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovery:
    """What an output folder holds, once recovered."""

    root: Path
    lanes: int
    next_epoch: int
    owner: str
    partitions: Mapping[TopicPartition, PartitionStart]
    warnings: tuple[str, ...] = ()  # also logged
    n_deleted_files: int = 0

    @property
    def next_offsets(self) -> dict[tuple[str, int], int]:
        """Return where each known partition goes on."""
        return {(p.topic, p.partition): p.next_offset for p in self.partitions.values()}

    def for_lane(self, lane: int, partitions: Iterable[tuple[str, int]]) -> LaneStart:
        """Return what a lane starts from that reads these partitions."""
        known = (self.partitions.get(TopicPartition(*p)) for p in partitions)
        return LaneStart(
            self.root, lane, self.lanes, self.next_epoch, self.owner, tuple(p for p in known if p is not None)
        )


def recover(root: Path | str, *, lanes: int, identity: Mapping[str, Any]) -> Recovery:
    """Bring an output folder to what is committed in it, before any lane starts.

    The supervisor calls it once at its start, holding the `OutputLock`. An empty or missing folder is a fresh start.

    Args:
        root: The output folder.
        lanes: How many lanes will start; it may differ from the last time.
        identity: Settings that must not change while the folder is in use, as JSON would have them.

    Raises:
        CheckpointError: If the settings differ, or damage leaves no safe way on. Nothing was deleted then.
        CommitError: If the folder cannot be written to.
    """
    root = Path(root).absolute()  # a lane may run in another folder
    try:
        owner = _take_over(root, {*range(lanes), *list_lanes(root)})
        record = _Record.read(root)
        with files_stay(root):
            everyone = sorted({*list_lanes(root), *(rows.lane for rows in find_rows(root))})
            partitions = record.settle(everyone, None, identity)
            n_deleted = record.clean(everyone)
        for lane in everyone:
            prune_checkpoints(root, lane)
    except OSError as error:
        raise CommitError(write_failure(error, root)) from error
    _log(root, partitions, record.next_epoch, n_deleted)
    warnings = tuple(record.warnings)
    return Recovery(root, lanes, record.next_epoch, owner, partitions, warnings, n_deleted)


def recover_lane(
    root: Path | str,
    lane: int,
    *,
    lanes: int,
    partitions: Iterable[tuple[str, int]],
    identity: Mapping[str, Any],
) -> LaneStart:
    """Bring one lane to what it has committed, while others go on.

    The supervisor calls it before it starts a failed lane again. Only this lane's files are touched. From here on
    the failed process, should it still live, cannot commit.

    Raises:
        CheckpointError: As `recover`.
        CommitError: As `recover`.
    """
    root = Path(root).absolute()  # a lane may run in another folder
    try:
        owner = _take_over(root, {lane})
        record = _Record.read(root)
        mine = list(partitions)
        with files_stay(root):
            known = record.settle([lane], mine, identity)
            n_deleted = record.clean([lane])
    except OSError as error:
        raise CommitError(write_failure(error, root)) from error
    _log(root, known, record.next_epoch, n_deleted)
    return Recovery(root, lanes, record.next_epoch, owner, known).for_lane(lane, mine)


@dataclass
class _Record:
    """The manifests of all lanes, as far as they are whole."""

    root: Path
    whole: dict[int, list[Manifest]] = field(default_factory=dict)  # by lane, newest first
    damaged: dict[int, dict[int, str]] = field(default_factory=dict)  # by lane: epoch → what is wrong
    next_epoch: int = 1
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, root: Path) -> _Record:
        record = cls(root)
        for lane in list_lanes(root):
            record.whole[lane] = []
            record.damaged[lane] = {}
            for epoch in list_committed(root, lane):
                record.next_epoch = max(record.next_epoch, epoch + 1)
                try:
                    record.whole[lane].append(read_manifest(root, lane, epoch))
                except FileNotFoundError:
                    continue  # a lane that goes on meanwhile pruned it
                except DamagedCheckpointError as error:
                    record.damaged[lane][epoch] = str(error)
        return record

    def settle(
        self, lanes: Sequence[int], mine: Iterable[tuple[str, int]] | None, identity: Mapping[str, Any]
    ) -> dict[TopicPartition, PartitionStart]:
        """Apply rules 1 to 4 for some lanes, and return where some partitions (None: all) go on."""
        wanted = None if mine is None else {TopicPartition(*p) for p in mine}
        while True:
            highest = self._highest()
            winners = {p: m for p, m in highest.items() if wanted is None or p in wanted}
            self._check_history(winners)
            if self._states_are_whole(winners):
                break
        self._check_identity(identity)
        self._check_orphans(lanes)
        self._check_compacted(lanes)
        for lane in lanes:
            for epoch, problem in self.damaged.get(lane, {}).items():
                if epoch > self.committed(lane):
                    self._warn(lane, epoch, problem)
        return {p: _start_of(p, manifest) for p, manifest in winners.items()}

    def committed(self, lane: int) -> int:
        """Return a lane's newest epoch that counts, 0 for none."""
        manifests = self.whole.get(lane)
        return manifests[0].epoch if manifests else 0

    def clean(self, lanes: Iterable[int]) -> int:
        """Apply rule 5 to some lanes; return how many files were deleted."""
        lanes = set(lanes)
        n_deleted = 0
        for file in find_data_files(self.root):
            if file.lane in lanes and self._never_happened(file):
                file.path.unlink(missing_ok=True)
                n_deleted += 1
        for lane in lanes:
            for epoch in list_epochs(self.root, lane):
                folder = epoch_folder(self.root, lane, epoch)
                if epoch > self.committed(lane) or not (folder / MANIFEST_NAME).exists():
                    remove_epoch(folder)
        return n_deleted

    def _never_happened(self, file: FoundFile) -> bool:
        return file.temporary or file.epoch > self.committed(file.lane)

    def _highest(self) -> dict[TopicPartition, Manifest]:
        """Rule 3: of equal offsets the newer epoch counts."""
        highest: dict[TopicPartition, tuple[int, int, Manifest]] = {}
        for manifest in (m for manifests in self.whole.values() for m in manifests):
            for partition, next_offset in manifest.next_offsets.items():
                rank = (next_offset, manifest.epoch)
                if partition not in highest or rank > highest[partition][:2]:
                    highest[partition] = (*rank, manifest)
        return {partition: manifest for partition, (_, _, manifest) in highest.items()}

    def _states_are_whole(self, winners: Mapping[TopicPartition, Manifest]) -> bool:
        """Check the state files that will be needed; take back a lane's newest manifest if its own are damaged."""
        for partition, manifest in winners.items():
            try:
                for state in _states_of(partition, manifest):
                    read_state(self.root, state)
            except DamagedCheckpointError as error:
                self.damaged[manifest.lane][manifest.epoch] = str(error)
                if manifest.epoch != self.committed(manifest.lane):
                    why = f"and {partition.topic}[{partition.partition}] has its last state there"
                    raise self._stuck(manifest.lane, manifest.epoch, why) from error
                self.whole[manifest.lane].remove(manifest)
                return False
        return True

    def _check_history(self, winners: Mapping[TopicPartition, Manifest]) -> None:
        """Rule 2."""
        for lane, epochs in self.damaged.items():
            if not self.whole[lane] and epochs:
                raise self._stuck(lane, max(epochs), "and the lane has no whole one")
        for manifest in (m for manifests in self.whole.values() for m in manifests):
            for lane, epoch in manifest.built_on.items():
                if epoch > self.committed(lane):
                    raise self._stuck(lane, epoch, f"and lane {manifest.lane} went on from it")
        for partition, manifest in winners.items():
            for lane, epoch in self._hidden_after(manifest):
                where = f"and {partition.topic}[{partition.partition}] may have its last state there"
                raise self._stuck(lane, epoch, where)

    def _hidden_after(self, manifest: Manifest) -> Iterator[tuple[int, int]]:
        """Yield damaged epochs that count and came after `manifest`, and so may hold what came next."""
        for lane, epochs in self.damaged.items():
            if not epochs:
                continue
            newest = self.whole[lane][0]  # there is one, or we are stuck already
            if lane == manifest.lane or newest.built_on.get(manifest.lane, 0) >= manifest.epoch:
                yield from ((lane, epoch) for epoch in epochs if manifest.epoch < epoch < newest.epoch)

    def _stuck(self, lane: int, epoch: int, why: str) -> CheckpointError:
        path = epoch_folder(self.root, lane, epoch) / MANIFEST_NAME
        problem = self.damaged.get(lane, {}).get(epoch, "is missing")
        return CheckpointError(
            f"{path} {problem}, {why}, so no earlier epoch can be taken without losing or repeating rows. Restore "
            f"{path.parent} from a backup, or choose a new `output.path`. Nothing was deleted."
        )

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        """Rule 4: against the newest manifest of each lane."""
        wanted = _flat(plain_json(identity))
        for lane, manifests in self.whole.items():
            if not manifests:
                continue
            had = _flat(manifests[0].identity)
            differing = [k for k in sorted(had.keys() | wanted.keys()) if had.get(k) != wanted.get(k)]
            if differing:
                lines = "; ".join(f"{k}: got {_shown(wanted, k)}, expected {_shown(had, k)}" for k in differing)
                path = epoch_folder(self.root, lane, manifests[0].epoch) / MANIFEST_NAME
                raise CheckpointError(
                    f"{self.root} was made with other settings ({path}): {lines}. State and rows made with both would "
                    f"not fit together. Restore what was expected, or choose a new `output.path`. Nothing was deleted."
                )

    def _check_orphans(self, lanes: Sequence[int]) -> None:
        """Refuse to delete the rows of several epochs: one may be a crash, several mean that checkpoints went lost."""
        orphans: dict[int, set[int]] = {}
        for file in find_data_files(self.root):
            if file.lane in lanes and not file.temporary and not self.whole.get(file.lane):
                orphans.setdefault(file.lane, set()).add(file.epoch)
        for lane, epochs in orphans.items():
            if len(epochs) > 1:
                raise CheckpointError(
                    f"{self.root} has rows of lane {lane} in {len(epochs)} epochs, and no checkpoint of that lane. "
                    f"Expected checkpoints/lane-{lane:03d}. Restore that folder, or choose a new `output.path`. "
                    f"Nothing was deleted."
                )

    def _check_compacted(self, lanes: Sequence[int]) -> None:
        """Refuse to go back behind what was compacted: those rows could not be deleted by themselves."""
        compacted = (rows for rows in find_rows(self.root) if rows.n_rows is not None and rows.lane in lanes)
        for rows in compacted:
            if rows.epoch > self.committed(rows.lane):
                raise CheckpointError(
                    f"{rows.path} has rows of lane {rows.lane}, epoch {rows.epoch}, and the newest checkpoint of that "
                    f"lane is of epoch {self.committed(rows.lane)}. Expected checkpoints/lane-{rows.lane:03d} to be as "
                    f"new as the tables: restore it, or choose a new `output.path`. Nothing was deleted."
                )

    def _warn(self, lane: int, epoch: int, problem: str) -> None:
        path = epoch_folder(self.root, lane, epoch) / MANIFEST_NAME
        message = f"{path} {problem}: lane {lane} goes on from epoch {self.committed(lane)} and reads the rest again"
        logger.warning("%s", message)
        self.warnings.append(message)


def _take_over(root: Path, lanes: Iterable[int]) -> str:
    owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    for lane in sorted(lanes):
        write_owner(root, lane, owner)
    return owner


def _start_of(partition: TopicPartition, manifest: Manifest) -> PartitionStart:
    return PartitionStart(
        *partition,
        next_offset=manifest.next_offsets[partition],
        lane=manifest.lane,
        epoch=manifest.epoch,
        states=tuple(_states_of(partition, manifest)),
        built_on={**manifest.built_on, manifest.lane: manifest.epoch},
    )


def _states_of(partition: TopicPartition, manifest: Manifest):
    return (s for s in manifest.states if (s.topic, s.partition) == partition)


def _log(root: Path, partitions: Mapping[TopicPartition, Any], next_epoch: int, n_deleted: int) -> None:
    logger.info(
        "recovered output=%s partitions=%d next_epoch=%d deleted_files=%d",
        root,
        len(partitions),
        next_epoch,
        n_deleted,
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "nothing"
