"""Files that outlast a power cut: written in full under a temporary name, synced, then renamed.

A temporary file's name starts with a dot and ends in ``.tmp``: Parquet readers skip the one, and their globs
(``**/*.parquet``) the other. After a crash it may be left behind; recovery removes it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY_PREFIX = "."
TEMPORARY_SUFFIX = ".tmp"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>


def temporary_path(final: Path) -> Path:
    """Return the name that `final` is written under until it is whole."""
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}{TEMPORARY_SUFFIX}")


def is_temporary(name: str) -> bool:
    """Tell whether a file name is one that `temporary_path` makes."""
    return name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX)


def make_folder(path: Path) -> None:
    """Create a folder and those above it, so that each survives a power cut."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Put a file's content on the disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Put a folder's list of names on the disk: without it a rename may be forgotten."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_folders(paths: Iterable[Path]) -> None:
    """`sync_folder`, once for each different folder."""
    for path in sorted(set(paths)):
        sync_folder(path)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Give the name to write a file under: what is there after the block takes the file's place, or is removed."""
    draft = temporary_path(path)
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step: after a crash it has its old content or the new one, never half.

    Raises:
        OSError: If the disk refuses; then nothing is left of the new one.
    """
    with draft_of(path) as draft, draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def exchange_folders(one: Path, other: Path) -> None:
    """Put two folders in each other's place, in one step: whoever lists one of them sees all of one or of the other.

    Raises:
        OSError: If the file system cannot (NFS, for one), or the two are on different ones.
    """
    library = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(library, "renameat2", None)  # Linux, glibc 2.28 or later
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one))
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def write_failure(error: OSError, root: Path) -> str:
    """Say what failed, where, and what to do, for an error of the file system below `root`."""
    where = error.filename or root
    try:
        free_mb = f"{shutil.disk_usage(root).free / 1e6:,.0f} MB free"
    except OSError:
        free_mb = "free space unknown"
    return (
        f"cannot read or write {where}: {error.strerror or error} ({free_mb}). Expected a folder that this user may "
        f"write to, with room. Free space or correct the rights of {root}; what is committed stays, and the lane goes "
        f"on from there."
    )


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
