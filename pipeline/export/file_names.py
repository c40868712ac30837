"""File names for streams: a stream may be called anything, a file may not."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import PurePosixPath
from typing import TypeVar

from ..publish.inputs import VIDEO_SUFFIXES

LONGEST_BYTES = 200  # of a part of a path; file systems take 255, and a suffix and a draft's marks come to it
Key = TypeVar("Key", bound=Hashable)


def file_names(names: Mapping[Key, str], suffix: str) -> dict[Key, PurePosixPath]:
    """Return a path of its own for each name, also on a file system that ignores case; none leads out of its folder.

    Folders stay, and a video's suffix goes, as players look for ``beach.srt`` beside ``beach.mp4``; where two videos
    differ in nothing else, it stays. What is the same all the same gets a hash.

    Args:
        names: Of streams: ``holiday/beach.mp4``, or anything else.
        suffix: Of the files, such as ``.srt``.
    """
    short = {key: _without_video_suffix(_parts(name)) for key, name in names.items()}
    counts = Counter(_folded(parts) for parts in short.values())
    files: set[str] = set()
    folders: set[str] = set()
    paths = {}
    for key, name in names.items():
        *above, last = short[key] if counts[_folded(short[key])] == 1 else _parts(name)
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
        for parts in (*above, last), (*above, f"{last}~{digest}"), (f"{last}~{digest}",):
            path = (*parts[:-1], parts[-1] + suffix)
            mine = {_folded(path[:n]) for n in range(1, len(path))}
            if _folded(path) not in files and _folded(path) not in folders and files.isdisjoint(mine):
                break
        files.add(_folded(path))
        folders |= mine
        paths[key] = PurePosixPath(*path)
    return paths


def safe_part(part: str) -> str:
    """Return one part of a path as a file system takes it.

    >>> safe_part(".."), safe_part("a\\n\\0"), safe_part("100 % <ü>.mp4")
    ('%2E%2E', 'a%0A%00', '100 % <ü>.mp4')
    """
    escaped = set(part) == {"."}
    text = "".join(f"%{ord(c):02X}" if escaped or unicodedata.category(c) == "Cc" else c for c in part)
    data = text.encode()
    if len(data) <= LONGEST_BYTES:
        return text
    digest = hashlib.sha256(data).hexdigest()[:12]
    return f"{data[: LONGEST_BYTES - 13].decode(errors='ignore')}~{digest}"


def _parts(name: str) -> tuple[str, ...]:
    return tuple(safe_part(part) for part in name.split("/") if part) or ("_",)


def _without_video_suffix(parts: tuple[str, ...]) -> tuple[str, ...]:
    last = PurePosixPath(parts[-1])
    return (*parts[:-1], last.stem if last.suffix.lower() in VIDEO_SUFFIXES else last.name)


def _folded(parts: tuple[str, ...]) -> str:
    return unicodedata.normalize("NFC", "/".join(parts)).casefold()
