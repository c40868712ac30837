"""`stormline archive` as a person runs it, and as it is killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from stormline.pipeline.archive.outcomes import outcomes

LOOK_S = 0.5
LEFT_S = 30.0  # for the rest of a killed run to be gone
SUMMARY = re.compile(r"^videos +([\d,]+) done, ([\d,]+) failed", re.MULTILINE)
SPEED = re.compile(r"^speed +([\d.]+) x real time", re.MULTILINE)


@dataclass
class Run:
    """One start of the command."""

    status: int
    text: str
    took_s: float
    finished: int  # videos at its end
    summary: tuple[int, int] | None = None  # done, failed, as it printed
    times_real_time: float | None = None
    killed: str = ""
    left: list[str] = field(default_factory=list)  # processes that outlived it


@contextlib.contextmanager
def started(
    videos: Path, out: Path, log: Path, ray_folder: Path, sets: Sequence[str] = ()
) -> Iterator[subprocess.Popen]:
    """Start the command; whatever is left of it is killed at the end of the block."""
    command = [sys.executable, "-m", "stormline.pipeline", "archive", str(videos), "--out", str(out)]
    command += ["--ask-video", "What is it?", *(word for one in sets for word in ("--set", one))]
    environ = {**os.environ, "RAY_TMPDIR": str(ray_folder), "HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environ)
        census = {}
        try:
            yield process
        finally:
            census = tree(process.pid)
            for one in census.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()


def tree(pid: int) -> dict[int, psutil.Process]:
    """Return a process and all below it."""
    try:
        root = psutil.Process(pid)
        return {p.pid: p for p in [root, *root.children(recursive=True)]}
    except psutil.NoSuchProcess:
        return {}


def n_finished(out: Path) -> int:
    """Return how many videos are finished."""
    return sum(o.state != "waiting" for o in outcomes(out))


def archive(
    videos: Path,
    out: Path,
    *,
    ray_folder: Path,
    sets: Sequence[str] = (),
    kill_when: Callable[[], bool] | None = None,
    kill: str = "driver",
    on_look: Callable[[int], None] | None = None,
) -> Run:
    """Run it to its end, or kill it on the way.

    Args:
        videos: The folder.
        out: The output folder.
        ray_folder: For Ray's files; short, because it puts sockets there.
        sets: Settings.
        kill_when: Tells that the moment has come.
        kill: What: `driver`, the command's own process; `cluster`, that and all that it started, at once.
        on_look: Called with the process's number as it runs.
    """
    began_s = time.monotonic()
    log = out.with_suffix(".log")
    killed, census = "", {}
    with started(videos, out, log, ray_folder, sets) as process:
        while process.poll() is None:
            if on_look:
                on_look(process.pid)
            if kill_when is not None and kill_when():
                census = tree(process.pid)
                targets = census.values() if kill == "cluster" else [census[process.pid]]
                for one in targets:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.send_signal(signal.SIGKILL)
                killed = kill
                process.wait()
                break
            time.sleep(LOOK_S)
        left = _left_of(census)
    text = log.read_text()
    summary, speed = SUMMARY.search(text), SPEED.search(text)
    return Run(
        status=process.returncode,
        text=text,
        took_s=time.monotonic() - began_s,
        finished=n_finished(out),
        summary=(int(summary[1].replace(",", "")), int(summary[2].replace(",", ""))) if summary else None,
        times_real_time=float(speed[1]) if speed else None,
        killed=killed,
        left=left,
    )


def _left_of(census: dict[int, psutil.Process]) -> list[str]:
    """Wait until a killed run's processes are gone, as they should by themselves; kill and name those that are not."""
    _, alive = psutil.wait_procs(list(census.values()), timeout=LEFT_S)
    told = []
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            told.append(one.name())
            one.kill()
    return told
