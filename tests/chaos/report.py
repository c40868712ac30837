"""What campaigns found, for people and as JSON."""

# ruff: noqa: T201 (a command line)

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from .campaign import Outcome, Report

QUIET_LOAD = 4.0  # load average below which nothing else took the cores: a campaign's own is 1 to 3


def by_kind(outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """Return for each kind how often, how long until the next row, what that is made of, and records read again.

    Times are of those that no other fault followed before the run was back.
    """
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        kinds[outcome.kind].append(outcome)
    n = Counter(kind for o in outcomes for kind in (o.kind, *o.overlapped))
    told = {}
    for kind, struck in sorted(kinds.items()):
        found = [o for o in struck if not o.overlapped]
        if not found:
            told[kind] = {"n": n[kind], "alone": 0}
            continue
        times = [o.recovered_s for o in found]
        parts = {name: [o.parts[name] for o in found if name in o.parts] for o in found for name in o.parts}
        told[kind] = {
            "n": n[kind],
            "alone": len(found),
            "next_row_s": {"median": round(statistics.median(times), 1), "worst": round(max(times), 1)},
            "made_of_s": {name: round(statistics.median(values), 1) for name, values in parts.items()},
            "cpu_s": round(statistics.median([o.cpu_s for o in found if o.cpu_s] or [0.0]), 1),  # where there were any
            "records_again": {
                "median": statistics.median(o.replayed_records for o in found),
                "worst": max(o.replayed_records for o in found),
            },
        }
    return told


def write_json(path: Path, reports: list[Report], *, add: bool) -> None:
    """Write all campaigns into one file; with `add`, beside those that are there, but for those of the same seed."""
    before = json.loads(path.read_text())["campaigns"] if add and path.exists() else []
    mine = [{**asdict(report), "load_average": round(report.load_average, 1)} for report in reports]
    seeds = {report.seed for report in reports}
    campaigns = [c for c in before if c["seed"] not in seeds] + mine
    outcomes = [Outcome(**o) for c in campaigns for o in c["outcomes"]]
    summary = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "ray": ray.__version__,
        "load_average": os.getloadavg()[1],
        "faults": sum(1 + len(o.overlapped) for o in outcomes),
        "seeds": [c["seed"] for c in campaigns],
        "records": sum(c["records"] for c in campaigns),
        "rows": {t: sum(c["rows"][t] for c in campaigns) for t in campaigns[0]["rows"]},
        "rows_lost_doubled_or_other": sum(len(c["differences"]) for c in campaigns),
        "quiet_load_average": QUIET_LOAD,
        "by_kind_quiet": by_kind(_of([c for c in campaigns if _load(c) < QUIET_LOAD], fork_workers=True)),
        "by_kind": by_kind(_of(campaigns, fork_workers=True)),
        "by_kind_without_fork_workers": by_kind(_of(campaigns, fork_workers=False)),
        "campaigns": campaigns,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1) + "\n")


def _load(campaign: dict[str, Any]) -> float:
    load = campaign.get("load_average")
    return math.inf if load is None else load


def _of(campaigns: list[dict[str, Any]], *, fork_workers: bool) -> list[Outcome]:
    return [Outcome(**o) for c in campaigns if c.get("fork_workers", False) == fork_workers for o in c["outcomes"]]


def print_table(outcomes: list[Outcome]) -> None:
    """Print a line for each kind."""
    print(f"{'kind':<22} {'n':>3} {'median s':>9} {'worst s':>8} {'again':>6} {'cpu s':>6}  made of, s")
    for kind, told in by_kind(outcomes).items():
        if not told["alone"]:
            print(f"{kind:<22} {told['n']:>3}  never alone")
            continue
        made_of = ", ".join(f"{name} {value}" for name, value in told["made_of_s"].items())
        print(
            f"{kind:<22} {told['n']:>3} {told['next_row_s']['median']:>9} {told['next_row_s']['worst']:>8} "
            f"{told['records_again']['median']:>6} {told['cpu_s']:>6}  {made_of}"
        )
