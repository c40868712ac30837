"""`stormline run` as an operator has it: in a process of its own, started again whenever it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

RESTART_WAIT_S = 0.1  # systemd's RestartSec
STOP_LIMIT_S = 60.0
LEFTOVERS_GONE_S = 60.0  # agents of Ray that look for their raylet now and then


@dataclass(frozen=True)
class Line:
    """A line that it printed, or a remark of ours in ``[]``."""

    time_s: float
    text: str


class Service(threading.Thread):
    """Keep one `stormline run` up until `stop`.

    Args:
        folder: For its log, its Ray and what the probe notes; short, because Ray puts sockets into it.
        settings: Settings file.
        n_lanes: Gives the number of lanes for each start.
    """

    def __init__(self, folder: Path, settings: Path, n_lanes):
        super().__init__(name="service", daemon=True)
        self._folder, self._settings, self._n_lanes = folder, settings, n_lanes
        self._stopping = threading.Event()
        self._census: dict[int, psutil.Process] = {}
        self.process: subprocess.Popen[str] | None = None
        self.lines: list[Line] = []
        self.starts = 0
        self.exits: list[int] = []

    def run(self) -> None:
        while not self._stopping.is_set():
            process = self._start()
            with (self._folder / "run.log").open("a") as log:
                assert process.stdout
                for line in process.stdout:
                    self._say(line.rstrip(), log)
                status = process.wait()
                self.exits.append(status)
                self._say(f"[ended with status {status}]", log)
            self._stopping.wait(RESTART_WAIT_S)

    def stop(self) -> int:
        """Stop it as SIGTERM does, and return its status; kills it where it does not stop."""
        self._stopping.set()
        process = self.process
        assert process
        self.take_census()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill_all()
        self.join(10)
        return process.returncode

    def tree(self) -> list[psutil.Process]:
        """Return its processes, itself first; none while it is down."""
        process = self.process
        if process is None or process.poll() is not None:
            return []
        try:
            root = psutil.Process(process.pid)
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self._census |= {p.pid: p for p in tree}
        return tree

    take_census = tree

    def cpu_since(self, time_s: float) -> float:
        """Return the CPU seconds of those of its processes that were started after a moment."""
        total_s = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.create_time() >= time_s:
                    times = process.cpu_times()
                    total_s += times.user + times.system
        return total_s

    def wait_until_gone(self) -> list[psutil.Process]:
        """Wait until nothing is left of it; return what is."""
        limit_s = time.monotonic() + LEFTOVERS_GONE_S
        while (left := [p for p in self._census.values() if _alive(p)]) and time.monotonic() < limit_s:
            time.sleep(0.1)
        return left

    def kill_all(self) -> None:
        """Kill everything that it ever started."""
        self._stopping.set()
        self.take_census()
        for process in self._census.values():
            kill(process)

    def tail(self, n: int = 40) -> str:
        """Return the end of what it printed."""
        return "\n".join(line.text for line in self.lines[-n:])

    def _start(self) -> subprocess.Popen[str]:
        self.starts += 1
        command = [sys.executable, "-m", "stormline.pipeline", "run", "-s", str(self._settings), "--no-captions"]
        probe = str(Path(__file__).parent / "probe")
        self.process = subprocess.Popen(
            [*command, "--set", f"lanes.count={self._n_lanes()}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self._folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [probe, os.environ.get("PYTHONPATH")])),
                "STORMLINE_CHAOS": str(self._folder),
                "RAY_TMPDIR": str(self._folder / "ray"),
                "RAY_worker_niceness": "0",  # else whatever else this machine does comes first, and times say nothing
                "HF_HUB_OFFLINE": "1",
                "COLUMNS": "400",
            },
        )
        return self.process

    def _say(self, text: str, log) -> None:
        self.lines.append(Line(time.time(), text))
        log.write(f"{time.strftime('%H:%M:%S')}.{int(time.time() % 1 * 1000):03d} {text}\n")
        log.flush()


def kill(process: psutil.Process) -> bool:
    """Kill a process at once; tell whether it was there."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
