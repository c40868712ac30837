"""`stormline search`: the windows of all streams whose text fits best."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .http_client import printable

if TYPE_CHECKING:
    from ..result_index import Hit, Session


def search(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that `stormline run` or `archive` writes to.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for, in words.")],
    stream: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this stream; * ? [ ] match several: 'holiday/*'.")
    ] = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="Only caption or alert.")] = None,
    query: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Only this query's results. May be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, metavar="N", help="At most so many, the best.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Find windows by what was said of them: captions, alerts and answers of all streams, the best first.

    Full text, ranked by BM25: words in common, rare ones most, in any form ("turns" finds "turning" and "turned").
    "Words in quotes" stand beside each other; car* is how a word begins, without its ending: words are kept as "turn",
    so that turn* and tur* find "turning", and turni* does not. It sees what the model wrote, not the video: what no
    caption says is not found. Tokens are not searched, because they share no space with text before the
    language model reads them; to ask about a video itself there is [bold]stormline ask[/].

    The index is in OUT/search; each search takes in what was committed since the last one. Times of an archive's video
    are places in it, others UTC.

    [bold]Examples[/]

      stormline search night "a red car turns"

      stormline search out '"red car" gate*' --stream 'yard-*' --limit 5 --json
    """
    from ..result_index import Wanted, open_result_index

    wanted = Wanted(stream, kind, query or [])
    with open_result_index(out) as index:
        hits = index.search(text, wanted, limit)
        empty = not index.sessions()
    if not hits:
        nothing = "has no results yet" if empty else f"says nothing like {text!r}; other words may"
        typer.echo(f"{out} {nothing}.", err=True)
        return
    first_frames = _places(out)
    if as_json:
        for hit in hits:
            typer.echo(json.dumps(hit_json(hit, first_frames), ensure_ascii=False))
        return
    for hit in hits:
        typer.echo(_line(hit, first_frames))


def _places(out: Path) -> Mapping[Session, int]:
    """Return when each of an archive's videos begins; elsewhere nothing: there times are those of the clock."""
    from ..archive.work_list import WorkList
    from ..export.first_frames import first_frames_us

    return first_frames_us(out) if WorkList(out).path.exists() else {}


def hit_json(hit: Hit, first_frames: Mapping[Session, int]) -> dict[str, Any]:
    """Return a hit as plain values.

    Args:
        hit: What was found.
        first_frames: Of an archive's videos, in µs: adds the place in the video, in seconds.
    """
    from ..durations import format_moment
    from ..result_index import Session

    found = hit.result
    first_us = first_frames.get(Session(found.stream_id, found.session))
    place = {} if first_us is None else {
        "start_s": (found.start_us - first_us) / 1e6, "end_s": (found.end_us - first_us) / 1e6
    }  # fmt: skip
    return {
        "score": round(hit.score, 4),
        "stream_id": found.stream_id,
        "session": found.session,
        "start_time": format_moment(found.start_us * 1_000),
        "end_time": format_moment(found.end_us * 1_000),
        **place,
        "query_id": found.query_id,
        "kind": found.kind,
        "prompt": found.prompt,
        "answer": found.answer,
    }


def _line(hit: Hit, first_frames: Mapping[Session, int]) -> str:
    from ..export.subtitles import line_of

    fields = hit_json(hit, first_frames)
    if "start_s" in fields:
        times = f"{clock(fields['start_s'])}–{clock(fields['end_s'])}"
    else:
        times = f"{fields['start_time'][:19].replace('T', ' ')}–{fields['end_time'][11:19]}"
    stream = typer.style(printable(hit.result.stream_id), fg="cyan", bold=True)
    score = typer.style(f"{hit.score:5.2f}", dim=True)
    return f"{score}  {stream}  {times}  {printable(line_of(hit.result))}"


def clock(seconds: float) -> str:
    """Return a place in a video: ``0:01:30``."""
    whole = int(seconds)
    return f"{whole // 3_600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
