"""What the benchmarks share: seconds taken in turns, and a result as JSON that says where it comes from."""

from __future__ import annotations

import contextlib
import cProfile
import json
import os
import platform
import re
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
PARTS = {  # of a job: what a process's command line holds
    "broker": "broker --listener-url",
    "source": "Source",
    "decode": "(Decode)",
    "encode": "(Encode",
    "annotate": "(Annotate)",
    "lane": "ray::Lane",
    "llm": "VideoLLM",
    "token store": "TokenStore",
    "serve": "Serve",
    "fork server": "fork_server",
    "ray": "ray",
    "supervisor": "soak.py",
}
Works = Mapping[str, Callable[[], Any]]


def in_turns(works: Works, rounds: int) -> dict[str, float]:
    """Return each work's median seconds over so many rounds, after one to warm up.

    Every round does each work once: these machines are not quiet, and a busy moment should meet all of them.
    """
    took: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began_s = time.perf_counter()
            work()
            if turn:
                took[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(series) for name, series in took.items()}


def median_s(work: Callable[[], Any], rounds: int) -> float:
    """Return one work's median seconds."""
    return in_turns({"it": work}, rounds)["it"]


def spent_on(work: Callable[[], Any], *, times: int = 3, most: int = 6) -> dict[str, float]:
    """Return what a work spends its time on: the functions with the largest shares of their own, by Python's profiler.

    What C does counts for the built-in function that called it. Profiling itself weighs on what calls much.
    """
    work()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(times):
        work()
    profile.disable()
    own: dict[str, float] = {}
    for entry in profile.getstats():
        code = entry.code
        name = code if isinstance(code, str) else f"{Path(code.co_filename).stem}.{code.co_name}"
        name = re.sub(r"^<(?:built-in method|method) '?([^'>]*)'?.*>$", r"\1", name)
        own[name] = own.get(name, 0.0) + entry.inlinetime
    total = sum(own.values())
    largest = sorted(own.items(), key=lambda item: -item[1])[:most]
    return {name: round(s / total, 3) for name, s in largest}


def part_of(command: str) -> str | None:
    """Return which part of a job a process is, by its command line."""
    return next((part for part, mark in PARTS.items() if mark in command), None)


class CpuLog:
    """CPU seconds of all processes below one, by what they are; looked at while they run."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[str, float]] = {}

    def look(self, pid: int) -> None:
        """See what the process and those below it have taken so far."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for one in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    part = "command" if one == root else part_of(" ".join(one.cmdline())) or "other"
                    times = one.cpu_times()
                    self._of[one.pid] = part, times.user + times.system

    def seconds(self) -> dict[str, float]:
        """Return them by part."""
        found: dict[str, float] = {}
        for part, seconds in self._of.values():
            found[part] = found.get(part, 0.0) + seconds
        return found


def write_result(name: str, measured: Mapping[str, Any], packages: Sequence[str] = ()) -> Path:
    """Write and print `results/NAME.json`: the machine, the packages' versions, its load, and what was measured."""
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        **{package: version(package) for package in packages},
        **measured,
        "load_average": {"1 minute": round(os.getloadavg()[0], 2), "5 minutes": round(os.getloadavg()[1], 2)},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2), flush=True)
    return path


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
