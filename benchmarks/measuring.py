"""What the benchmarks share: seconds taken in turns, and a result as JSON that says where it comes from."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
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
