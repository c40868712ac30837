"""What can go wrong: each kind of fault, how it strikes, and how one sees that it is over."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from .proxy import CuttableProxy
from .service import Service, kill

CHUNK_BYTES = 1 << 20
FOUND_WITHIN_S = 120.0
ARMED_WITHIN_S = 120.0


class FaultError(Exception):
    """The harness could not strike as it wanted."""


@dataclass
class Target:
    """What there is to strike."""

    service: Service
    proxy: CuttableProxy
    broker_pid: int
    output: Path  # on a disk of its own where `small_disk`
    folder: Path  # of the probe
    rng: random.Random
    small_disk: bool = False
    patience_s: float = FOUND_WITHIN_S  # for a process to appear that shall be killed


@dataclass(frozen=True)
class Strike:
    """When a fault began and was over; recovery counts from `end_s`."""

    began_s: float
    end_s: float
    detail: str


@dataclass(frozen=True)
class Fault:
    """One kind.

    `seen_by` says which commit shows that it is over: `new_life` is the first with rows of a lane that started after
    it, `read_on` one of records that had not been read when it struck, `answered` one with an answer given after it,
    `rows` any with rows.
    """

    kind: str
    strike: Callable[[Target], Strike]
    seen_by: str


def _kill_one(kind: str, *marks: str) -> Callable[[Target], Strike]:
    """Kill one process whose command line holds one of the marks."""

    def strike(target: Target) -> Strike:
        limit_s = time.monotonic() + target.patience_s
        while True:
            found = [p for p in target.service.tree() if any(mark in _command(p) for mark in marks)]
            if found:
                victim = target.rng.choice(sorted(found, key=lambda p: p.pid))
                now_s = time.time()
                if kill(victim):
                    return Strike(now_s, now_s, f"{kind} pid {victim.pid}")
            if time.monotonic() >= limit_s:
                raise FaultError(
                    f"no {kind} to kill in {target.patience_s:.0f} s: no process with {' or '.join(marks)}"
                )
            time.sleep(0.05)

    return strike


def _kill_supervisor(target: Target) -> Strike:
    process = target.service.tree()[0]
    now_s = time.time()
    kill(process)
    return Strike(now_s, now_s, f"supervisor pid {process.pid}")


def _kill_cluster(target: Target) -> Strike:
    """All of Ray: its servers first, then every worker; the supervisor lives."""
    tree = target.service.tree()[1:]
    now_s = time.time()
    for process in tree:
        kill(process)
    return Strike(now_s, now_s, f"{len(tree)} processes of Ray")


def _kill_machine(target: Target) -> Strike:
    """Everything at once, as when the power fails."""
    tree = target.service.tree()
    now_s = time.time()
    for process in tree:
        kill(process)
    return Strike(now_s, now_s, f"all {len(tree)} processes")


def _pause_broker(target: Target) -> Strike:
    """Stop the broker for some seconds; its connections stay."""
    began_s, pause_s = time.time(), target.rng.uniform(1.0, 4.0)
    os.kill(target.broker_pid, signal.SIGSTOP)
    try:
        time.sleep(pause_s)
    finally:
        os.kill(target.broker_pid, signal.SIGCONT)
    return Strike(began_s, time.time(), f"for {pause_s:.1f} s")


def _cut_connections(target: Target) -> Strike:
    """Reset all connections to the broker, and refuse new ones for a moment."""
    began_s, away_s = time.time(), target.rng.choice([0.0, target.rng.uniform(0.5, 4.0)])
    n = target.proxy.cut()
    time.sleep(away_s)
    target.proxy.mend()
    return Strike(began_s, time.time(), f"{n} connections, away for {away_s:.1f} s")


def _fill_disk(target: Target) -> Strike:
    """Fill the output's disk until a commit has failed, then give room again."""
    if not target.small_disk:
        raise FaultError("the output is on no disk of its own")
    began_s, n_lines = time.time(), len(target.service.lines)
    filler = target.output / "filler"
    limit_s = time.monotonic() + ARMED_WITHIN_S
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(CHUNK_BYTES))
        while not any("No space left" in line.text for line in target.service.lines[n_lines:]):
            if time.monotonic() > limit_s:
                raise FaultError(f"nothing failed in {ARMED_WITHIN_S:.0f} s with a full disk")
            time.sleep(0.05)
        time.sleep(target.rng.uniform(0.0, 3.0))
    finally:
        filler.unlink()
    return Strike(began_s, time.time(), "full")


def _fail_commit(number: int, way: str) -> Callable[[Target], Strike]:
    def strike(target: Target) -> Strike:
        order = target.folder / "fail"
        draft = order.with_suffix(".draft")
        draft.write_text(f"{number} {way}")
        draft.replace(order)
        limit_s = time.monotonic() + ARMED_WITHIN_S
        while order.exists():
            if time.monotonic() > limit_s:
                order.unlink(missing_ok=True)
                raise FaultError(f"no commit came to the end of step {number} in {ARMED_WITHIN_S:.0f} s")
            time.sleep(0.005)
        now_s = time.time()
        return Strike(now_s, now_s, f"{way} after step {number}")

    return strike


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


KILLS = (
    Fault("source", _kill_one("source", "ReadKafkaSource"), "new_life"),
    Fault("decoder", _kill_one("decoder", "MapWorker(MapBatches(Decode))"), "new_life"),
    Fault("encoder", _kill_one("encoder", "MapWorker(MapBatches(Encode))"), "new_life"),
    Fault("annotate", _kill_one("annotate", "MapWorker(MapBatches(Annotate))"), "new_life"),
    Fault("lane driver", _kill_one("lane driver", "ray::Lane"), "new_life"),
    Fault("supervisor", _kill_supervisor, "new_life"),
    Fault("llm replica", _kill_one("llm replica", "VideoLLM"), "answered"),
    Fault("token store", _kill_one("token store", "TokenStore"), "rows"),
    Fault("serve controller", _kill_one("serve controller", "ServeController"), "rows"),
    Fault("raylet", _kill_one("raylet", "/raylet/raylet", "raylet --"), "new_life"),
    Fault("gcs", _kill_one("gcs", "gcs_server"), "new_life"),
    Fault("cluster", _kill_cluster, "new_life"),
    Fault("machine", _kill_machine, "new_life"),
)
COMMITS = tuple(
    Fault(f"commit step {number} {way}", _fail_commit(number, way), "new_life")
    for number in (1, 2, 3, 4)
    for way in ("error", "kill")
)
OTHERS = (
    Fault("broker paused", _pause_broker, "read_on"),
    Fault("connections cut", _cut_connections, "read_on"),
    Fault("disk full", _fill_disk, "new_life"),
)
FAULTS = {fault.kind: fault for fault in (*KILLS, *COMMITS, *OTHERS)}
