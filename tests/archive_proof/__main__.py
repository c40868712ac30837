"""`python -m tests.archive_proof`: the proof, from the command line."""

# ruff: noqa: T201 (a command line)

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from stormline.pipeline.archive.work_list import RANGES_PER_VIDEO

from ..chaos.compare import differences, row_counts
from .check import finished, problems, states, written_after
from .folder import CODECS, CONTAINERS, Clip, make_folder, write_long
from .memory import MemoryLog
from .runs import Run, archive, n_finished

HELP = """\
Makes a folder of at least 200 videos, good and bad, and archives it twice: in peace, and killed three times on the way
(its own process twice, then all of Ray with it). Every good video must be complete, every bad one told of with its
reason, and the tables of both the same, tokens bit for bit.
"""
FAILED_STATUS = 3
KILLS = ("driver", "driver", "cluster")


def check_run(run: Run, root: Path, clips: list[Clip]) -> list[str]:
    """Return what is wrong with a run that came to its end."""
    told = problems(root, clips)
    n_failed = states(root).get("failed", 0)
    if run.status != FAILED_STATUS:
        told.append(f"exit status {run.status}, expected {FAILED_STATUS}: {run.text[-2000:]}")
    if run.summary != (len(clips) - n_failed, n_failed):
        told.append(f"the summary says {run.summary}, expected {(len(clips) - n_failed, n_failed)}")
    return told


def killed_runs(videos: Path, out: Path, clips: list[Clip], ray_folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Archive a folder under kills; return what became of each start, and what is wrong."""
    starts, told, moments = [], [], []
    for i, kill in enumerate((*KILLS, "")):
        before = n_finished(out)
        goal = before + (len(clips) - before) // (len(KILLS) + 1 - i)
        run = archive(
            videos,
            out,
            ray_folder=ray_folder,
            kill=kill,
            kill_when=partial(_has_finished, out, goal) if kill else None,
        )
        if run.killed != kill:
            told.append(f"start {i + 1} ended with {run.status} before it could be killed: {run.text[-2000:]}")
        moments.append((finished(out), time.time()))
        starts.append(
            {
                "killed": run.killed or "no",
                "finished_before": before,
                "finished_after": run.finished,
                "took_s": round(run.took_s),
                "left_alive_after_30_s": run.left,
            }
        )
        print(f"start {i + 1}: {starts[-1]}", flush=True)
    told += check_run(run, out, clips)
    for done, moment_s in moments:
        told += written_after(out, done, moment_s, RANGES_PER_VIDEO)
    return starts, told


def memory_of_lengths(folder: Path, ray_folder: Path, lengths_s: Sequence[int]) -> dict[str, Any]:
    """Archive a video of each length, alone, with a question about the whole of it; return what memory it took."""
    told = {}
    for seconds in lengths_s:
        write_long(folder / f"{seconds}" / "long.mkv", seconds)
        log = MemoryLog()
        run = archive(folder / f"{seconds}", folder / f"out-{seconds}", ray_folder=ray_folder, on_look=log.look)
        if run.status:
            raise SystemExit(f"the video of {seconds} s ended with status {run.status}: {run.text[-2000:]}")
        told[f"{seconds} s"] = log.report()
        print(f"video of {seconds} s: {told[f'{seconds} s']}", flush=True)
    return told


def _has_finished(out: Path, n: int) -> bool:
    return n_finished(out) >= n


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.archive_proof", description=HELP)
    parser.add_argument("--clips", type=int, default=200, help="generated good ones (default: 200)")
    parser.add_argument("--long-s", type=int, default=7200, help="length of the long one (default: 7200)")
    parser.add_argument("--memory-s", default="600,7200", help="lengths to compare memory of (default: 600,7200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="proof-", dir="/tmp"))  # short: Ray puts sockets into it
    ray_folder = folder / "ray"
    ray_folder.mkdir()
    began_s = time.monotonic()
    clips = make_folder(folder / "videos", args.clips, long_s=args.long_s)
    made_s = time.monotonic() - began_s
    hours = sum(clip.n_sampled for clip in clips) / 2 / 3600
    print(f"{len(clips)} files, {hours:.2f} h, made in {made_s:.0f} s, in {folder}", flush=True)
    quiet = archive(folder / "videos", folder / "quiet", ray_folder=ray_folder)
    told = [f"in peace: {text}" for text in check_run(quiet, folder / "quiet", clips)]
    print(quiet.text[-1500:], flush=True)
    starts, more = killed_runs(folder / "videos", folder / "killed", clips, ray_folder)
    told += [f"killed: {text}" for text in more]
    told += differences(folder / "killed", folder / "quiet")
    memory = memory_of_lengths(folder / "memory", ray_folder, [int(s) for s in args.memory_s.split(",") if s])
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "ray": ray.__version__,
        "files": len(clips),
        "hours_of_video": round(hours, 2),
        "longest_s": args.long_s,
        "containers": list(CONTAINERS),
        "codecs": list(CODECS),
        "states": states(folder / "quiet"),
        "reasons": {clip.name: clip.reason for clip in clips if clip.reason},
        "exit_status": quiet.status,
        "summary_done_failed": quiet.summary,
        "times_real_time": quiet.times_real_time,
        "took_s": round(quiet.took_s),
        "rows": row_counts(folder / "quiet"),
        "starts_under_kills": starts,
        "differences": told,
        "memory": memory,
        "load_average": os.getloadavg()[1],
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    for text in told:
        print(text, file=sys.stderr)
    if told:
        print(f"what was written is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(clips)} files, {len(KILLS)} kills: every good one whole, every bad one told of, tables the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
