"""`stormline archive`: files instead of Kafka, overnight and resumable."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ...operators.errors import SettingsError

if TYPE_CHECKING:
    from rich.console import Console

    from ..archive.outcomes import Outcome
    from ..archive.progress import ArchiveProgress
    from ..query_settings import Query
    from ..settings import Settings
    from ..supervisor import RunStatus

EXIT_FAILED_VIDEOS = 3
EXIT_UNFINISHED = 130  # stopped by a signal, as a shell has it
SCENES, VIDEO = "scenes", "video"
WHOLE_VIDEO_S = 86_400.0  # the longest window that there is
MAX_DECODERS = 8
STALL_S = 900.0  # a lane may scan a long file for its first place to cut
BARRIER_INTERVAL_S = 5.0  # what a crash costs at most; nobody waits for a row
DECODE_LIMIT_S = 600.0  # a file that cannot be cut is one record


def archive(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE", help="Files, folders, globs, lists or addresses, see above.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Where everything goes.")] = None,
    ask: Annotated[
        list[str] | None, typer.Option(metavar="QUESTION", help="Asked of every window. May be repeated.")
    ] = None,
    ask_video: Annotated[
        list[str] | None, typer.Option(metavar="QUESTION", help="Asked once of every whole video. May be repeated.")
    ] = None,
    every: Annotated[
        str, typer.Option(metavar="30s|scenes|video", help="Length of a window of captions and questions.")
    ] = "30s",
    captions: Annotated[bool, typer.Option(help="Describe every window.")] = True,
    tokens: Annotated[
        bool | None, typer.Option("--tokens/--no-tokens", help="Keep tokens: needed to ask later.", show_default="yes")
    ] = None,
    settings_path: Annotated[
        Path | None, typer.Option("--settings", "-s", metavar="FILE.yaml", help="Settings, as of `stormline run`.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, over the file: lanes.count=2. May be repeated."),
    ] = None,
    start: Annotated[
        str,
        typer.Option(metavar="0|mtime|ISO", help="Time of each video's first frame: 1970, its file's change, or one."),
    ] = "0",
    by_hash: Annotated[
        bool, typer.Option("--hash", help="Know files by their content (read once more), not by size and date.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed in earlier runs.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on for ever: take up new videos as they come.")] = False,
    watch_every: Annotated[str, typer.Option(metavar="TIME", help="With --watch: how often to look.")] = "30s",
) -> None:
    """Caption, question and tokenise files: a folder tonight, Parquet tomorrow, every video open to questions.

    A [bold]SOURCE[/] is a file, a folder (with all that is in it), a glob, a CSV or Parquet file with a column `path`,
    or an address such as s3://bucket/videos. Each video becomes one stream, named by its path below the source.

    Stopped, killed or without power, the [bold]same command goes on[/] where it was, also in the midst of a video;
    what is finished is skipped, what is new or has changed is done. A video that cannot be read is told of, with its
    reason, and stops nothing: the exit status is then 3.

    [bold]Examples[/]

      stormline archive videos/ --out night

      stormline archive videos/ --out night --ask "Is anybody at the door?" --every 10s

      stormline archive 'tapes/**/*.mpg' --out night --every scenes --ask-video "What is this film about?"

      stormline archive s3://bucket/cameras --out night --watch --set lanes.count=4

    [bold]Afterwards[/]

      stormline serve night          # then: stormline ask holiday/beach.mp4 "What happened?"

      stormline results night

      duckdb -c "from 'night/archive/videos.parquet' where state = 'failed'"

    Times in the tables are places in the video: its first frame is at 1970-01-01T00:00:00Z, so that a run elsewhere,
    or later, gives the same rows. With [bold]--start[/] it is another moment.
    """
    from rich.console import Console

    from ..archive.feed import ArchiveFeed, ArchiveOptions
    from ..archive.progress import ArchiveProgress
    from ..ray_watch import begin_again
    from ..stop_signals import on_stop_signal
    from ..supervisor import Supervisor

    window_s, start_ns, watch_s = archive_times(every, start, watch_every if watch else None)
    settings = _settings(settings_path, overrides or [], out, tokens)
    questions = [(text, window_s) for text in ask or []] + [(text, WHOLE_VIDEO_S) for text in ask_video or []]
    settings = settings.model_copy(update={"queries": archive_queries(settings, questions, window_s, captions)})
    console = Console(highlight=False)
    root = settings.output.path
    if root.exists() and not root.is_dir():
        raise SettingsError(f"{root} is a file; --out takes a folder, which is made if need be.")
    progress = ArchiveProgress(console, root, float(settings.sampling.fps), settings.lanes.decode_workers)
    options = ArchiveOptions(sources, start_ns, by_hash, retry_failed, watch_s)
    feed = ArchiveFeed(root, options, progress.phase)
    if not feed.has_work():
        progress.phase("nothing new: every video is finished")
        _end(console, progress, None, root)
        return
    supervisor = Supervisor(settings, on_phase=progress.phase, archive=feed, leave=begin_again)
    with on_stop_signal(supervisor.request_stop, progress.phase), progress:
        status = supervisor.run(on_status=progress.status, on_ready=progress.ready)
    if not feed.is_listed:  # stopped while Ray was starting: there is work, and none of it was begun
        progress.phase("stopped before it began: what there is to do is still to do; the same command does it")
        sys.exit(EXIT_UNFINISHED)
    _end(console, progress, status, root)


class ArchiveTimes(NamedTuple):
    """What the options say of times."""

    window_s: float | None  # length of a window of captions and questions; None for scenes
    start_ns: int | None  # of each video's first frame; None: when its file was last changed
    watch_s: float  # from one look for new videos to the next; 0: there is one look


def archive_times(every: str, start: str, watch_every: str | None) -> ArchiveTimes:
    """Read the options `--every`, `--start` and `--watch-every`; the last is None without `--watch`.

    Raises:
        SettingsError: If one of them is no such time.
    """
    from ..durations import moment_ns, parse_duration_s, parse_moment

    try:
        watch_s = 0.0 if watch_every is None else parse_duration_s(watch_every)
        if watch_every is not None and not watch_s:
            raise ValueError(f"--watch-every {watch_every}: expected more than 0, such as 10s; without --watch it ends")
        return ArchiveTimes(
            window_s=None if every == SCENES else WHOLE_VIDEO_S if every == VIDEO else parse_duration_s(every),
            start_ns=None if start == "mtime" else 0 if start == "0" else moment_ns(parse_moment(start)),
            watch_s=watch_s,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _settings(path: Path | None, overrides: Sequence[str], out: Path | None, tokens: bool | None) -> Settings:
    from ..settings import load_settings

    wanted = [*overrides]
    if tokens is not None:
        wanted.append(f"output.keep_tokens={str(tokens).lower()}")
    defaults: dict[str, dict[str, Any]] = {
        "lanes": {
            "decode_workers": min(MAX_DECODERS, max(2, os.cpu_count() or 2)),
            "barrier_interval_s": BARRIER_INTERVAL_S,
            "stall_s": STALL_S,
            "decode_limit_s": DECODE_LIMIT_S,
        },
    }
    settings = load_settings(path, wanted, defaults)
    if out is not None:
        settings = settings.model_copy(update={"output": settings.output.model_copy(update={"path": out})})
    elif "path" not in settings.output.model_fields_set:
        raise SettingsError("where to? Give --out FOLDER, or output.path in the settings.")
    return settings


def archive_queries(
    settings: Settings, questions: Sequence[tuple[str, float | None]], window_s: float | None, captions: bool
) -> list[Query]:
    """Return the standing queries of an archive: those of the settings, or captions, and the questions.

    Args:
        settings: Where they say nothing of queries, there are captions.
        questions: What is asked, and the length of its windows; None for scenes.
        window_s: Of captions; None for scenes.
        captions: Whether there are any.

    Raises:
        SettingsError: If a question or a window is impossible.
    """
    from pydantic import ValidationError

    from ..query_settings import Query

    queries = list(settings.queries) if "queries" in settings.model_fields_set else []
    drafts: list[tuple[str, dict[str, Any], float | None]] = []
    if captions and not queries:
        drafts.append(("caption", {}, window_s))
    drafts += [(slug(text), {"prompt": text}, length_s) for text, length_s in questions]
    taken = {query.id for query in queries}
    for name, fields, length_s in drafts:
        query_id = next(i for i in (name, *(f"{name}-{n}" for n in range(2, 1_000))) if i not in taken)
        taken.add(query_id)
        window = {"scenes": True} if length_s is None else {"window_s": length_s}
        try:
            queries.append(Query.model_validate({"id": query_id, **fields, **window}))
        except ValidationError as error:
            wrong = "; ".join(f"{e['loc'][0] if e['loc'] else 'query'}: {e['msg']}" for e in error.errors())
            raise SettingsError(f"--ask, --every: {wrong}") from None
    if not queries and not settings.output.keep_tokens:
        raise SettingsError("neither captions nor questions nor tokens: nothing would come of it.")
    return queries


def slug(question: str) -> str:
    """Return a name for a question, from its words.

    >>> slug("Is there a red car?")
    'is-there-a-red-car'
    """
    words = re.findall(r"[a-z0-9]+", question.lower())
    return "-".join(words)[:48].strip("-") or "question"


def _end(console: Console, progress: ArchiveProgress, status: RunStatus | None, root: Path) -> None:
    from rich.markup import escape

    from ..archive.outcomes import count_states, outcomes
    from ..archive.progress import failure_lines, present, summary_table

    found = outcomes(root)
    now = present(found)
    console.print(summary_table(progress, status, now, _write_videos(root, found)))
    for line in failure_lines(now):
        console.print(f"[red]failed[/] {escape(line)}", soft_wrap=True)
    _write_report(console, progress, root)
    sys.exit(exit_status(count_states(now)))


def exit_status(states: Mapping[str, int]) -> int:
    """Return the command's exit status, by how many videos are in which state (`outcomes.Outcome`)."""
    if states.get("waiting"):
        return EXIT_UNFINISHED
    return EXIT_FAILED_VIDEOS if states.get("failed") else 0


def _write_videos(root: Path, found: Sequence[Outcome]) -> str:
    """Write the overview; return where it is, or why it is not: the run is over, and does not fail for it."""
    from ..archive.outcomes import write_videos

    try:
        return f"{write_videos(root, found)}"
    except OSError as error:
        return f"not written: {error.strerror or error}"


def _write_report(console: Console, progress: ArchiveProgress, root: Path) -> None:
    """Write the report; the run is over, and does not fail for it."""
    import sqlite3

    from rich.markup import escape

    from ...operators.errors import StormlineError
    from ..archive.report import write_report
    from ..result_index import open_result_index

    try:
        with open_result_index(root) as index:
            path = write_report(root, index, tell=progress.phase)
    except (StormlineError, OSError, sqlite3.Error) as error:
        console.print(f"[red]no report[/] {escape(str(error))}; try `stormline report {escape(str(root))}`")
        return
    console.print(f"[dim]report[/]  {escape(str(path))}", soft_wrap=True)
