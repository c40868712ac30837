"""Writes one file of subtitles for each stream, in the stream's own folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

from ...operators.errors import SettingsError
from ..archive.work_list import WorkList, newest_versions
from ..durable_files import draft_of
from ..durations import format_moment
from ..result_index import IndexedResult, ResultIndex, Session, Wanted
from .file_names import file_names
from .first_frames import first_frames_us
from .subtitles import Cue, cues_of, line_of, srt_lines, vtt_lines

FORMATS = ("vtt", "srt")
MAX_NOTES = 100  # of a file, for people who open it


@dataclass(frozen=True)
class Written:
    """What an export wrote."""

    n_files: int
    n_rows: int  # cues, or rows


def write_subtitles(
    index: ResultIndex, root: Path, folder: Path, file_format: str, wanted: Wanted, *, overwrite: bool
) -> Written:
    """Write the subtitles of all streams that have something to say.

    Args:
        index: Of the results, up to date.
        root: The output folder that it is of.
        folder: Where to; other files in it stay.
        file_format: One of `FORMATS`.
        wanted: Which results; without names of queries, what is about a whole video is no subtitle of it.
        overwrite: Whether a file that is there already is replaced.

    Raises:
        SettingsError: If one is there, and it is not to be replaced; then nothing was written.
    """
    videos = _videos(root)
    of_all = file_names(videos or _names(index), f".{file_format}")  # so that a choice of streams changes no name
    paths = {
        session: folder / of_all[session]
        for session in index.sessions()
        if session in of_all and _is_called(wanted.stream, session.stream_id, videos.get(session, session.stream_id))
    }
    there = [path for path in paths.values() if path.exists()]
    if there and not overwrite:
        raise SettingsError(
            f"{there[0]} is there already{f', and {len(there) - 1:,} more' if there[1:] else ''}; --overwrite replaces "
            "such files, and another folder leaves them. Nothing was written."
        )
    first_frames = first_frames_us(root, wanted.stream)
    n_files = n_cues = 0
    for session, path in paths.items():
        subtitles = _Subtitles(index, session, wanted, first_frames.get(session))
        n = _write(path, subtitles, file_format)
        n_files, n_cues = n_files + (n > 0), n_cues + n
    return Written(n_files, n_cues)


def _videos(root: Path) -> dict[Session, str]:
    """Return the names of an archive's videos as they are now; none where it is no archive.

    Of a video that changed, or was tried again, there are sessions of several versions, and the newest is about the
    file that is there, whose players look for its name.
    """
    newest = newest_versions(WorkList(root).read()).values()
    return {Session(item.stream_id, item.session): item.video_name for item in newest}


def _is_called(pattern: str | None, *names: str) -> bool:
    return pattern is None or any(fnmatchcase(name, pattern) for name in names)


def _names(index: ResultIndex) -> dict[Session, str]:
    """Return what the files of all sessions are to be called, whichever are wanted."""
    sessions = index.sessions()
    counts = Counter(session.stream_id for session in sessions)
    return {s: s.stream_id if counts[s.stream_id] == 1 else f"{s.stream_id}.{s.session}" for s in sessions}


class _Subtitles:
    """What one session's file says."""

    def __init__(self, index: ResultIndex, session: Session, wanted: Wanted, first_frame_us: int | None):
        self.session = session
        self._index = index
        self._wanted = wanted
        self._extent_us = index.extent_us(session)
        self.first_frame_us = self._extent_us[0] if first_frame_us is None else first_frame_us
        self._named = bool(wanted.query_ids)  # then what is about the whole video is wanted, too

    def cues(self) -> Iterator[Cue]:
        """Yield them in order."""
        parts = (result for result in self._results() if self._named or not self._is_whole(result))
        first = next(parts, None)
        results = self._results() if first is None else chain([first], parts)
        return cues_of(results, self.first_frame_us)

    def notes(self) -> Iterator[str]:
        """Yield what is said of the whole video, and which video it is."""
        yield f"{self.session.stream_id}, session {self.session.session}"
        yield f"its first frame is at {format_moment(self.first_frame_us * 1_000)}"
        whole = (result for result in self._results() if not self._named and self._is_whole(result))
        for result, _ in zip(whole, range(MAX_NOTES), strict=False):
            if line := line_of(result):
                yield line

    def _results(self) -> Iterator[IndexedResult]:
        return self._index.results(self.session, self._wanted)

    def _is_whole(self, result: IndexedResult) -> bool:
        return (result.start_us, result.end_us) == self._extent_us


def _write(path: Path, subtitles: _Subtitles, file_format: str) -> int:
    """Write a file in one step, if there is anything to write; return the number of cues."""
    n = 0

    def counted() -> Iterator[Cue]:
        nonlocal n
        for cue in subtitles.cues():
            n += 1
            yield cue

    cues = counted()
    first = next(cues, None)
    if first is None:
        return 0
    cues = chain([first], cues)
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(path) as draft, draft.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(vtt_lines(cues, subtitles.notes()) if file_format == "vtt" else srt_lines(cues))
    return n
