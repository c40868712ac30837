"""WebVTT and SubRip subtitles of a session's results.

Times are those of the video: from its first frame on. In WebVTT windows overlap as they are, for a player shows what is
there at a moment; SubRip's players do not agree on that, so that there each stretch has one cue with all that holds.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from ..result_index import IndexedResult


@dataclass(frozen=True)
class Cue:
    """What is shown from one moment to another, since the video's first frame."""

    start_ms: int
    end_ms: int  # later than `start_ms`
    lines: tuple[str, ...]  # at least one; none is empty or has a line break


def cues_of(results: Iterable[IndexedResult], first_frame_us: int) -> Iterator[Cue]:
    """Yield a cue for each window, in order; results of the same window share one, and one that says nothing has none.

    Args:
        results: By start, then end.
        first_frame_us: Of the video, since 1970.
    """
    for (start_us, end_us), group in groupby(results, key=lambda result: (result.start_us, result.end_us)):
        lines = tuple(line for result in group if (line := line_of(result)))
        start_ms = max(0, (start_us - first_frame_us) // 1_000)
        end_ms = (end_us - first_frame_us) // 1_000
        if lines and end_ms > start_ms:
            yield Cue(start_ms, end_ms, lines)


def line_of(result: IndexedResult) -> str:
    """Return what to show of a result on one line: its answer, after the question where it is one."""
    answer = plain_line(result.answer)
    prompt = plain_line(result.prompt)
    return f"{prompt} {answer}" if answer and prompt.endswith("?") else answer


def plain_line(text: str) -> str:
    """Return a text on one line, without control characters."""
    return "".join(c for c in " ".join(text.split()) if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp"))


def disjoint(cues: Iterable[Cue]) -> Iterator[Cue]:
    """Yield cues that never overlap and show the same at every moment.

    Args:
        cues: By start.
    """
    shown: list[Cue] = []  # begun, and not over
    position_ms = 0
    for cue in cues:
        yield from _pieces(shown, position_ms, cue.start_ms)
        shown = [each for each in shown if each.end_ms > cue.start_ms] + [cue]
        position_ms = cue.start_ms
    yield from _pieces(shown, position_ms, max((each.end_ms for each in shown), default=0))


def _pieces(shown: list[Cue], start_ms: int, stop_ms: int) -> Iterator[Cue]:
    """Yield what is shown in [start_ms, stop_ms), where nothing begins."""
    while start_ms < stop_ms and (shown := [each for each in shown if each.end_ms > start_ms]):
        end_ms = min(stop_ms, *(each.end_ms for each in shown))
        yield Cue(start_ms, end_ms, tuple(line for each in shown for line in each.lines))
        start_ms = end_ms


def vtt_lines(cues: Iterable[Cue], notes: Iterable[str] = ()) -> Iterator[str]:
    """Yield the blocks of a WebVTT file.

    Args:
        cues: By start.
        notes: For people who read the file; players leave them out.
    """
    yield "WEBVTT\n"
    for note in notes:
        yield f"\nNOTE {_escaped_vtt(plain_line(note))}\n"
    for cue in cues:
        text = "\n".join(_escaped_vtt(line) for line in cue.lines)
        yield f"\n{_time(cue.start_ms, '.')} --> {_time(cue.end_ms, '.')}\n{text}\n"


def srt_lines(cues: Iterable[Cue]) -> Iterator[str]:
    """Yield the blocks of a SubRip file.

    Args:
        cues: By start; where they overlap they are cut.
    """
    for number, cue in enumerate(disjoint(cues), start=1):
        text = "\n".join(_escaped_srt(line) for line in cue.lines)
        yield f"{number}\n{_time(cue.start_ms, ',')} --> {_time(cue.end_ms, ',')}\n{text}\n\n"


def _escaped_vtt(line: str) -> str:
    return html.escape(line, quote=False)


def _escaped_srt(line: str) -> str:
    """Take out what players read as marks: SubRip knows no way to write them as text."""
    return line.replace("<", "‹").replace(">", "›").replace("{\\", "{ \\")


def _time(time_ms: int, point: str) -> str:
    seconds, ms = divmod(time_ms, 1_000)
    return f"{seconds // 3_600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{point}{ms:03d}"
