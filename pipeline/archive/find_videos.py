"""What an archive's sources name: files, folders with all that is in them, globs, lists, addresses of object stores."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ...operators.errors import SettingsError
from ...operators.media import is_address, stat_file
from ..publish.inputs import VIDEO_SUFFIXES, glob_once

LIST_SUFFIXES = (".csv", ".parquet")
PATH_COLUMN = "path"
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FoundVideo:
    """One file, and what tells its present content from another."""

    uri: str  # absolute path, or address
    name: str  # below the folder that was named, for people
    n_bytes: int  # -1 where a list names what is not there
    mtime_ns: int


def find_videos(sources: Sequence[str]) -> list[FoundVideo]:
    """Return the videos of all sources, each once, sorted by name within each source.

    Args:
        sources: Files; folders and addresses (``s3://bucket/prefix``), searched to the bottom for the names of videos;
            globs; CSV or Parquet files with a column ``path``, whose relative paths are below the list's folder.

    Raises:
        SettingsError: If a source names nothing.
    """
    found: dict[str, FoundVideo] = {}
    for source in sources:
        for video in _expand(source):
            found.setdefault(video.uri, video)
    return list(found.values())


def content_hash(uri: str) -> str:
    """Return the SHA-256 of a file.

    Raises:
        OSError: If it cannot be read.
    """
    from pyarrow.fs import FileSystem

    system, path = FileSystem.from_uri(uri) if is_address(uri) else (None, uri)
    digest = hashlib.sha256()
    with open(path, "rb") if system is None else system.open_input_stream(path) as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _expand(source: str) -> Iterator[FoundVideo]:
    if is_address(source):
        yield from _of_address(source)
    elif Path(source).is_dir():
        yield from _of_folder(Path(source))
    elif Path(source).suffix.lower() in LIST_SUFFIXES and Path(source).is_file():
        yield from _of_list(Path(source))
    elif Path(source).is_file():
        yield _local(Path(source), Path(source).name)
    else:
        files = [p for p in glob_once(source) if os.path.isfile(p)]
        if not files:
            raise SettingsError(
                f"{source} is no file, folder, glob that matches a file, or address such as s3://bucket/videos."
            )
        # What comes before the first wildcard is the folder that names are told from.
        base = Path(source[: min(source.index(c) for c in "*?[" if c in source)] + "x").parent
        yield from (_local(Path(file), os.path.relpath(file, base)) for file in files)


def _of_folder(folder: Path) -> Iterator[FoundVideo]:
    def unreadable(error: OSError) -> None:
        raise SettingsError(f"cannot list {error.filename}: {error.strerror}; give it rights, or name other sources.")

    paths = []
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(parent, name) for name in names if _is_video(name)]
    for path in sorted(paths):
        if os.path.isfile(path):
            yield _local(Path(path), os.path.relpath(path, folder))


def _is_video(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _local(path: Path, name: str) -> FoundVideo:
    uri = os.path.abspath(path)
    try:
        return FoundVideo(uri, name, *stat_file(uri))
    except OSError:
        return FoundVideo(uri, name, -1, 0)


def _of_address(address: str) -> Iterator[FoundVideo]:
    from pyarrow.fs import FileSelector, FileSystem, FileType

    try:
        system, path = FileSystem.from_uri(address)
        info = system.get_file_info(path)
        inside = system.get_file_info(FileSelector(path, recursive=True)) if info.type == FileType.Directory else [info]
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot list {address}: {error}") from error
    if info.type == FileType.NotFound:
        raise SettingsError(f"there is nothing at {address}; name a file or a folder of its file system.")
    scheme, _, rest = address.partition("://")
    options = rest.partition("?")[2]
    for file in sorted(inside, key=lambda file: file.path):
        if file.type == FileType.File and (file is info or _is_video(file.base_name)):
            name = file.base_name if file is info else file.path.removeprefix(path).lstrip("/")
            uri = f"{scheme}://{quote(file.path)}" + (f"?{options}" if options else "")
            yield FoundVideo(uri, name, file.size or 0, file.mtime_ns or 0)


def _of_list(path: Path) -> Iterator[FoundVideo]:
    reader: Callable[[Path], Iterable[str | None]]
    reader = _read_csv if path.suffix.lower() == ".csv" else _read_parquet
    for text in reader(path):
        if not text:
            continue
        if is_address(text):
            try:
                yield FoundVideo(text, text.partition("://")[2], *stat_file(text))
            except OSError:
                yield FoundVideo(text, text.partition("://")[2], -1, 0)
        else:
            yield _local(path.parent / text, text if not os.path.isabs(text) else text.lstrip("/"))


def _read_csv(path: Path) -> list[str | None]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if PATH_COLUMN not in (rows.fieldnames or ()):
                raise _no_column(path, rows.fieldnames or ())
            return [row[PATH_COLUMN] for row in rows]
    except (OSError, UnicodeError, csv.Error) as error:
        raise SettingsError(f"cannot read the list {path}: {error}") from error


def _read_parquet(path: Path) -> list[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        if PATH_COLUMN not in names:
            raise _no_column(path, names)
        return pq.read_table(path, columns=[PATH_COLUMN])[PATH_COLUMN].cast(pa.string()).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise SettingsError(f"cannot read the list {path}: {error}") from error


def _no_column(path: Path, names: Sequence[str]) -> SettingsError:
    return SettingsError(f"{path} has no column `{PATH_COLUMN}`; its columns: {', '.join(names) or 'none'}.")
