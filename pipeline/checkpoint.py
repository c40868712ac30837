"""What a lane's checkpoint is on disk: a manifest and the state files that it names.

    checkpoints/lane-000/owner                                    who may commit as this lane
    checkpoints/lane-000/.owner.lock                              held while one commits, or becomes the owner
    checkpoints/lane-000/epoch-00000012/encode.video-3.safetensors    a step's state for one partition
    checkpoints/lane-000/epoch-00000012/manifest.json             written last: the epoch counts from then on

An epoch without a manifest never happened. State is kept per step and partition, so that a change of the number of
lanes moves files and never opens them. A manifest carries a checksum of itself and of its state files: a damaged
one is noticed, not believed. `parquet_sink` writes checkpoints, `recovery` reads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ..operators.errors import CheckpointError, CommitError
from ..operators.rows import Buffer, Position, SnapshotKey
from .durable_files import make_folder, replace_file, sync_file
from .files_lock import WAIT_S, held_alone

logger = logging.getLogger(__name__)

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"
OWNER_NAME = "owner"
OWNER_LOCK_NAME = ".owner.lock"
KEPT_EPOCHS = 3  # one to start from, one should that be damaged, one to spare
_TOPIC_NAME_BYTES = 180  # a Kafka topic may have 249 letters, a file name 255, and ours says more than the topic
_LANE = re.compile(r"lane-(\d{3,})")
_EPOCH = re.compile(r"epoch-(\d{8,})")


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int


@dataclass(frozen=True)
class StateFile:
    """One step's state for the streams of one partition, as a file."""

    step: str
    topic: str
    partition: int
    path: str  # below the output folder
    n_bytes: int
    sha256: str

    @property
    def key(self) -> SnapshotKey:
        """Return whose state it holds."""
        return SnapshotKey(self.step, self.topic, self.partition)


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of an epoch."""

    table: str
    path: str  # below the output folder
    n_rows: int
    n_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What one lane had committed when it ended one epoch: rows, positions and state that belong together."""

    lane: int
    lanes: int  # how many there were, for people; recovery goes by partitions
    epoch: int
    created: str  # ISO 8601, UTC
    model: str  # fingerprint, as in the tables
    identity: dict[str, Any]  # settings that must not change while this folder is in use
    positions: tuple[Position, ...]
    states: tuple[StateFile, ...]
    data_files: tuple[DataFile, ...]
    built_on: dict[int, int]  # lane → its epoch that this lane's run started from, directly or through others

    @property
    def next_offsets(self) -> dict[TopicPartition, int]:
        """Return where each partition's reading goes on."""
        return {TopicPartition(p.topic, p.partition): p.next_offset for p in self.positions}

    def to_json(self) -> bytes:
        """Return the file's content, with a checksum over all the rest."""
        body = asdict(self)
        for position in body["positions"]:
            del position["lag"], position["until_ns"]  # of the moment; mean nothing later
        body["built_on"] = {str(lane): epoch for lane, epoch in sorted(self.built_on.items())}
        body = {"version": MANIFEST_VERSION, **body}
        return json.dumps({**body, "sha256": _digest(body)}, indent=1, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read it back.

        Raises:
            DamagedCheckpointError: If it is cut short or altered.
            CheckpointError: If a newer stormline wrote it.
        """
        try:
            body = json.loads(data)
            checksum = body.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedCheckpointError("is no whole JSON document") from error
        if checksum != _digest(body):
            raise DamagedCheckpointError("does not match its own checksum")
        version = body.pop("version")
        if version != MANIFEST_VERSION:
            raise CheckpointError(
                f"checkpoint of format {version}, expected {MANIFEST_VERSION}: it was written by another version of "
                f"stormline. Use that version, or choose a new `output.path`."
            )
        body["positions"] = tuple(Position(**p) for p in body["positions"])
        body["states"] = tuple(StateFile(**s) for s in body["states"])
        body["data_files"] = tuple(DataFile(**f) for f in body["data_files"])
        body["built_on"] = {int(lane): epoch for lane, epoch in body["built_on"].items()}
        return cls(**body)


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is cut short, altered or gone. Recovery takes the epoch before, where it may."""


@dataclass(frozen=True)
class PartitionStart:
    """Where one partition goes on: its position, and the states that were committed with it."""

    topic: str
    partition: int
    next_offset: int
    lane: int  # whose manifest says so
    epoch: int
    states: tuple[StateFile, ...]
    built_on: dict[int, int]  # that manifest's, and itself


@dataclass(frozen=True)
class LaneStart:
    """What a lane starts from. Small, and can be sent to another process; the states stay in their files.

    Partitions that no checkpoint knows are not in it: those begin where the settings say.
    """

    root: Path
    lane: int
    lanes: int
    next_epoch: int
    owner: str  # who may commit as this lane
    partitions: tuple[PartitionStart, ...] = ()

    @property
    def positions(self) -> tuple[Position, ...]:
        """Return where each known partition goes on."""
        return tuple(Position(p.topic, p.partition, p.next_offset) for p in self.partitions)

    @property
    def states(self) -> tuple[StateFile, ...]:
        """Return the state files of all its partitions."""
        return tuple(state for p in self.partitions for state in p.states)

    @property
    def built_on(self) -> dict[int, int]:
        """Return for each lane the newest of its epochs that this start came from, directly or through others."""
        merged: dict[int, int] = {}
        for partition in self.partitions:
            for lane, epoch in partition.built_on.items():
                merged[lane] = max(epoch, merged.get(lane, epoch))
        return merged

    def load_snapshots(self) -> dict[SnapshotKey, bytes]:
        """Read the states, each as a step wrote it.

        Raises:
            CheckpointError: If a file changed since recovery looked at it.
        """
        return {state.key: read_state(self.root, state) for state in self.states}


def lane_folder(root: Path, lane: int) -> Path:
    """Return the folder of a lane's checkpoints."""
    return root / "checkpoints" / f"lane-{lane:03d}"


def epoch_folder(root: Path, lane: int, epoch: int) -> Path:
    """Return the folder of one epoch's manifest and state files."""
    return lane_folder(root, lane) / f"epoch-{epoch:08d}"


def list_lanes(root: Path) -> list[int]:
    """Return the lanes that ever started here, ascending."""
    return _numbers(root / "checkpoints", _LANE)


def list_epochs(root: Path, lane: int) -> list[int]:
    """Return the epochs that a lane has a folder for, newest first; one without a manifest was never committed."""
    return _numbers(lane_folder(root, lane), _EPOCH)[::-1]


def list_committed(root: Path, lane: int) -> list[int]:
    """Return the epochs that a lane has a manifest for, whole or not, newest first."""
    folders = ((epoch, epoch_folder(root, lane, epoch)) for epoch in list_epochs(root, lane))
    return [epoch for epoch, folder in folders if (folder / MANIFEST_NAME).exists()]


def newest_committed(root: Path) -> dict[int, int]:
    """Return each lane's newest epoch that has a manifest, whole or not; lanes without one are left out."""
    return {lane: epochs[0] for lane in list_lanes(root) if (epochs := list_committed(root, lane))}


def read_manifest(root: Path, lane: int, epoch: int) -> Manifest:
    """Read an epoch's manifest.

    Raises:
        FileNotFoundError: If the epoch was not committed, or was pruned meanwhile.
        DamagedCheckpointError: If the manifest is not whole.
    """
    manifest = Manifest.from_json((epoch_folder(root, lane, epoch) / MANIFEST_NAME).read_bytes())
    if (manifest.lane, manifest.epoch) != (lane, epoch):
        raise DamagedCheckpointError(f"is that of lane {manifest.lane}, epoch {manifest.epoch}")
    return manifest


def whole_manifests(root: Path, lane: int) -> Iterator[Manifest]:
    """Yield a lane's manifests, newest first, without damaged ones and those that were pruned meanwhile."""
    for epoch in list_committed(root, lane):
        try:
            manifest = read_manifest(root, lane, epoch)
        except (FileNotFoundError, DamagedCheckpointError):
            continue
        yield manifest


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write an epoch's manifest in one step; from then on the epoch is committed."""
    folder = epoch_folder(root, manifest.lane, manifest.epoch)
    make_folder(folder)
    replace_file(folder / MANIFEST_NAME, manifest.to_json())


def write_states(
    root: Path,
    lane: int,
    epoch: int,
    snapshots: Mapping[SnapshotKey, Buffer],
    before: Iterable[StateFile] = (),
) -> tuple[StateFile, ...]:
    """Write the state files of an epoch.

    A state equal to one of `before` becomes another name for that file: an idle stream costs neither space nor time.
    """
    folder = epoch_folder(root, lane, epoch)
    make_folder(folder)
    known = {state.key: state for state in before}
    written = []
    for key, data in snapshots.items():
        path = folder / _state_name(key)
        state = StateFile(
            *key,
            path=path.relative_to(root).as_posix(),
            n_bytes=memoryview(data).nbytes,
            sha256=hashlib.sha256(data).hexdigest(),
        )
        if not _link_unchanged(root, known.get(key), state):
            path.unlink(missing_ok=True)  # it may be another name for an older epoch's file: never write into that
            path.write_bytes(data)
            sync_file(path)
        written.append(state)
    return tuple(written)


def read_state(root: Path, state: StateFile) -> bytes:
    """Read a state file.

    Raises:
        DamagedCheckpointError: If it is missing, or not what was written.
    """
    try:
        data = (root / state.path).read_bytes()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"names {state.path}, which is missing") from error
    if len(data) != state.n_bytes:
        raise DamagedCheckpointError(f"names {state.path}: got {len(data)} bytes, expected {state.n_bytes}")
    if hashlib.sha256(data).hexdigest() != state.sha256:
        raise DamagedCheckpointError(f"names {state.path}, whose content is not what was written")
    return data


def states_equal(states: Iterable[StateFile], snapshots: Mapping[SnapshotKey, Buffer]) -> bool:
    """Tell whether snapshots are what the files hold, without reading those."""
    known = {state.key: state.sha256 for state in states}
    if known.keys() != snapshots.keys():
        return False
    return all(hashlib.sha256(data).hexdigest() == known[key] for key, data in snapshots.items())


def plain_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as a manifest gives them back: tuples are lists, fractions and paths are text."""
    return json.loads(json.dumps(settings, default=str))


@contextmanager
def owner_stays(root: Path, lane: int, wait_s: float = WAIT_S) -> Iterator[None]:
    """Have nobody else become this lane within the block, in which an epoch is committed from end to end.

    So a lane that is believed dead and lives has either committed before another takes over, which then finds that
    epoch, or finds that it is no longer the owner. There is no moment between its look at the owner and its rename.

    Raises:
        CommitError: If another process commits as this lane, or takes it over, for longer than `wait_s`.
    """
    make_folder(lane_folder(root, lane))
    with held_alone(lane_folder(root, lane) / OWNER_LOCK_NAME, wait_s):
        yield


def write_owner(root: Path, lane: int, token: str, wait_s: float = WAIT_S) -> None:
    """Make the holder of `token` the only one who may commit as this lane, once a commit under way is over.

    Raises:
        CommitError: If that is not over within `wait_s`.
    """
    with owner_stays(root, lane, wait_s):
        replace_file(lane_folder(root, lane) / OWNER_NAME, token.encode())


def check_owner(root: Path, lane: int, token: str) -> None:
    """Raise if another process has become this lane: one believed dead must not commit behind its back.

    It holds for as long as `owner_stays`.

    Raises:
        CommitError: If the lane is no longer ours.
    """
    path = lane_folder(root, lane) / OWNER_NAME
    owner = path.read_text() if path.exists() else "nobody"
    if owner != token:
        raise CommitError(
            f"lane {lane} of {root} belongs to {owner} now, expected {token}: it was restarted elsewhere. Nothing was "
            f"committed; end this process."
        )


def prune_checkpoints(root: Path, lane: int) -> list[int]:
    """Delete a lane's old epochs from `checkpoints/`, not their rows, and return them.

    An epoch goes when the lane has `KEPT_EPOCHS` newer ones, and each of its partitions is in as many newer ones of
    any lane. So a partition that moved to another lane, which has not committed yet, keeps its last state.
    """
    old = list_committed(root, lane)[KEPT_EPOCHS:]
    if not old:
        return []
    holders = _holders(root)
    pruned = []
    for epoch in old:
        mine = [partition for partition, epochs in holders.items() if (lane, epoch) in epochs]
        # A damaged manifest is nobody's here, and stays: recovery must see that something was there.
        if mine and all(sum(e > epoch for _, e in holders[partition]) >= KEPT_EPOCHS for partition in mine):
            remove_epoch(epoch_folder(root, lane, epoch))
            pruned.append(epoch)
    return pruned


def remove_epoch(folder: Path) -> None:
    """Delete an epoch's folder, the manifest first: what is left after a crash counts as never committed."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _holders(root: Path) -> dict[TopicPartition, set[tuple[int, int]]]:
    """Return for each partition the (lane, epoch) of all manifests that hold it."""
    holders: dict[TopicPartition, set[tuple[int, int]]] = {}
    for lane in list_lanes(root):
        for manifest in whole_manifests(root, lane):
            for partition in manifest.next_offsets:
                holders.setdefault(partition, set()).add((lane, manifest.epoch))
    return holders


def _state_name(key: SnapshotKey) -> str:
    topic = quote(key.topic, safe="")
    if len(topic) > _TOPIC_NAME_BYTES:
        topic = f"{topic[:_TOPIC_NAME_BYTES]}~{hashlib.sha256(key.topic.encode()).hexdigest()[:16]}"
    return f"{quote(key.step, safe='')}.{topic}-{key.partition}.safetensors"


def _link_unchanged(root: Path, before: StateFile | None, now: StateFile) -> bool:
    if before is None or (before.n_bytes, before.sha256) != (now.n_bytes, now.sha256):
        return False
    try:
        os.link(root / before.path, root / now.path)
    except OSError as error:  # pruned meanwhile, or a file system without links
        logger.debug("state not linked: path=%s error=%s", now.path, error)
        return False
    return True


def _numbers(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (pattern.fullmatch(entry.name) for entry in os.scandir(folder) if entry.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
