"""Who may change which files the tables' folders list, and who relies on that they do not.

A lane publishes an epoch's files in several renames, and recovery removes several; each holds the lock shared. A
compaction puts one folder in another's place, and holds it alone for that moment. So does every reader that wants
nothing to change under it: ``flock --shared OUT/.files.lock COMMAND`` is enough.

The lock is the kernel's (`flock`): it goes with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..operators.errors import CommitError

LOCK_NAME = ".files.lock"
GATE_NAME = ".files.gate"  # held for moments, on the way to the lock: so that readers do not shut a compaction out
WAIT_S = 60.0  # for others: a lane needs well below a second, a reader's question perhaps some
TURN_S = 0.5  # that lanes may be kept waiting by a compaction which waits for a reader
_POLL_S = 0.005


@contextmanager
def files_stay(root: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Have no compaction change what is listed below `root` within the block.

    Raises:
        CommitError: If somebody holds the lock alone for longer than `wait_s`.
    """
    deadline_s = time.monotonic() + wait_s
    with _opened(root / GATE_NAME) as gate:
        _lock(gate, root / GATE_NAME, fcntl.LOCK_SH, deadline_s)  # not past a compaction that is waiting its turn
    with _opened(root / LOCK_NAME) as lock:
        _lock(lock, root / LOCK_NAME, fcntl.LOCK_SH, deadline_s)
        yield


@contextmanager
def held_alone(path: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold a lock file for the block, as nobody else does; a process that ends lets go of it.

    Raises:
        CommitError: If somebody else holds it for longer than `wait_s`.
    """
    with _opened(path) as lock:
        _lock(lock, path, fcntl.LOCK_EX, time.monotonic() + wait_s)
        yield


@contextmanager
def files_change(root: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Be the only one who changes what is listed below `root` within the block, with no reader that holds the lock.

    Who comes meanwhile waits `TURN_S` at most, also where a reader keeps us waiting for long.

    Raises:
        CommitError: If somebody holds the lock for longer than `wait_s`.
    """
    deadline_s = time.monotonic() + wait_s
    with _opened(root / LOCK_NAME) as lock:
        while not _lock_in_turn(root, lock, deadline_s):
            if time.monotonic() >= deadline_s:
                raise _held(root / LOCK_NAME, wait_s)
            time.sleep(TURN_S)
        yield


def _lock_in_turn(root: Path, lock: int, deadline_s: float) -> bool:
    """Keep others from coming for a while, and see whether those that were there leave."""
    with _opened(root / GATE_NAME) as gate:
        _lock(gate, root / GATE_NAME, fcntl.LOCK_EX, max(deadline_s, time.monotonic() + TURN_S))
        until_s = min(deadline_s, time.monotonic() + TURN_S)
        while not _try_lock(lock, fcntl.LOCK_EX):
            if time.monotonic() >= until_s:
                return False
            time.sleep(_POLL_S)
    return True


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)  # the kernel lets go of the lock with it


def _lock(descriptor: int, path: Path, kind: int, deadline_s: float) -> None:
    began_s = time.monotonic()
    while not _try_lock(descriptor, kind):
        if time.monotonic() >= deadline_s:
            raise _held(path, time.monotonic() - began_s)
        time.sleep(_POLL_S)


def _held(path: Path, waited_s: float) -> CommitError:
    return CommitError(
        f"{path} was held by another process for {waited_s:.0f} s, expected a moment: a reader under `flock`, or a "
        f"process that was suspended. End it (`fuser -v {path}` names it) and try again."
    )


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
