"""Ten minutes of four live streams on the whole job: latency to token store and to Parquet, and memory over time.

    python benchmarks/soak.py [--minutes 10]

Publishes bikes.mp4 twice and two generated feeds, at their own speed and each from its own process, to an embedded
broker; runs one lane with the real encoder and the LLM on Ray Serve; and reads the resident memory of every process
every five seconds. What must stay flat is the private memory of the job's processes; the broker keeps its log in
memory and is told apart, and so is Ray's shared object store, which is of fixed size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
import ray
from ray import serve

from stormline.infra.broker import EmbeddedBroker
from stormline.pipeline.commands.demo import street_video
from stormline.pipeline.settings import Settings
from stormline.pipeline.supervisor import RunStatus, Supervisor

RESULT = Path(__file__).parent / "results" / "soak.json"
SAMPLE_S = 5.0
SETTLED_S = 60.0  # after the first rows, until memory shall be flat
PARTS = {  # what a process's command line holds
    "source": "Source",
    "decode": "(Decode)",
    "encode": "(Encode)",
    "annotate": "(Annotate)",
    "lane": "ray::Lane",
    "llm": "VideoLLM",
    "token store": "TokenStore",
    "serve": "Serve",
    "ray": "ray",
    "supervisor": "soak.py",
}


class MemoryLog:
    """Private memory by part of the job, sampled as it runs."""

    def __init__(self) -> None:
        self._apart: set[int] = set()
        self.began_s = time.monotonic()
        self.samples: list[tuple[float, dict[str, int]]] = []

    def begin(self, apart: set[int]) -> None:
        """Count time from now; the processes `apart` are not the job's: broker and publishers."""
        self._apart, self.began_s = apart, time.monotonic()

    def sample(self) -> None:
        parts: dict[str, int] = defaultdict(int)
        job = psutil.Process()
        for process in [job, *job.children(recursive=True)]:
            if process.pid in self._apart:
                continue
            try:
                command, memory = " ".join(process.cmdline()), process.memory_info()
            except psutil.NoSuchProcess:
                continue
            name = next((part for part, mark in PARTS.items() if mark in command), None)
            if name is not None:
                parts[name] += memory.rss - memory.shared
        self.samples.append((time.monotonic() - self.began_s, dict(parts)))

    def report(self) -> dict[str, dict[str, float]]:
        """Return, for each part and in all, MB after the first minute and at the end, and the slope in MB/min."""
        settled = [(t, parts) for t, parts in self.samples if t >= SETTLED_S]
        told = {}
        for name in [*PARTS, "all"]:
            series = [(t, (sum(p.values()) if name == "all" else p.get(name, 0)) / 1e6) for t, p in settled]
            if len(series) < 4 or not any(mb for _, mb in series):
                continue
            fit = statistics.linear_regression([t / 60 for t, _ in series], [mb for _, mb in series])
            tenth = max(1, len(series) // 10)
            told[name] = {
                "after_a_minute_mb": round(statistics.median(mb for _, mb in series[:tenth]), 1),
                "at_the_end_mb": round(statistics.median(mb for _, mb in series[-tenth:]), 1),
                "slope_mb_per_min": round(fit.slope, 2),
            }
        return told


def start_publishers(bootstrap: str) -> list[subprocess.Popen]:
    bikes = str(street_video())
    sources = {"street-1": bikes, "street-2": bikes, "shapes-1": "shapes:?seed=1", "shapes-2": "shapes:?seed=2"}
    command = [sys.executable, "-m", "stormline.pipeline", "publish"]
    options = ["--bootstrap", bootstrap, "--topic", "video", "--speed", "1", "--segment-s", "1"]
    return [
        subprocess.Popen(
            [*command, source, *options, "--stream-id", name, *(["--loop", "0"] if source == bikes else [])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        for name, source in sources.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    minutes = parser.parse_args().minutes
    publishers: list[subprocess.Popen] = []
    with EmbeddedBroker() as broker, tempfile.TemporaryDirectory() as folder:
        broker.create_topic("video", partitions=2)
        settings = Settings.model_validate(
            {
                "kafka": {"bootstrap_servers": broker.bootstrap_servers, "topics": ["video"]},
                "output": {"path": folder},
                "lanes": {"barrier_interval_s": 2.0},
                "store": {"max_bytes": 1 << 20},  # full after two minutes, as any store is in the long run
                "queries": [{"id": "caption", "prompt": "Describe what happens.", "window_s": 10.0}],
            }
        )
        supervisor = Supervisor(settings, print)
        log = MemoryLog()
        pushed: list = []

        def on_ready() -> None:
            publishers.extend(start_publishers(broker.bootstrap_servers))
            log.begin({broker.pid, *(p.pid for p in publishers)})

        def on_status(status: RunStatus) -> None:
            if not publishers or (log.samples and time.monotonic() - log.began_s < log.samples[-1][0] + SAMPLE_S):
                return
            log.sample()
            if len(log.samples) % 12 == 0:
                stats = serve.get_deployment_handle("TokenStore", "stormline-store").stats.remote().result()
                pushed[:] = [stats["push_latency"]]
                told = sum(log.samples[-1][1].values()) / 1e6
                print(f"{log.samples[-1][0]:5.0f} s  {status.segments} segments  {told:.0f} MB", flush=True)
            if log.samples[-1][0] >= minutes * 60:
                supervisor.request_stop()

        try:
            status = supervisor.run(on_status=on_status, on_ready=on_ready)
        finally:
            for publisher in publishers:
                publisher.terminate()
            for publisher in publishers:
                publisher.wait(20)
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "ray": ray.__version__,
        "minutes": minutes,
        "streams": 4,
        "segments": status.segments,
        "results": status.results,
        "restarts": status.restarts,
        "committed_p50_ms": round(status.commit_p50_ms),
        "committed_p95_ms": round(status.commit_p95_ms),
        "pushed_p50_ms": round(pushed[0].p50_ms) if pushed else None,
        "pushed_p95_ms": round(pushed[0].p95_ms) if pushed else None,
        "barrier_interval_s": 2.0,
        "memory": log.report(),
        "load_average": os.getloadavg()[1],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
