"""One writer for an output folder: two would delete each other's files when they recover."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType

from ..operators.errors import CommitError, OutputLockedError
from .durable_files import make_folder, write_failure

LOCK_NAME = ".stormline.lock"


class OutputLock:
    """Hold an output folder for this process; a context manager.

    The lock is the kernel's (`flock`): it goes when the process ends, however it ends, so there is no stale lock
    file to remove by hand. The file's content only tells people who holds it.

    Raises:
        OutputLockedError: On entering, if another process holds it.
        CommitError: On entering, if the folder cannot be made or written to.
    """

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self._descriptor: int | None = None

    def __enter__(self) -> OutputLock:
        path = self.root / LOCK_NAME
        try:
            make_folder(self.root)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CommitError(write_failure(error, self.root)) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputLockedError(_held_by(path)) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # the kernel lets go of the lock with it
            self._descriptor = None


def _held_by(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        who = f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process (it has not written its number yet)"
    return (
        f"{path.parent} is in use by {who}. One stormline at a time writes to an output folder: stop that one, "
        f"or choose another `output.path`."
    )
