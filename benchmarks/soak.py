"""Ten minutes of four live streams on the whole job: latency to token store and to Parquet, and memory over time.

    python benchmarks/soak.py [--minutes 10] [--streams 4] [--json benchmarks/results/soak.json]

Publishes bikes.mp4 twice and generated feeds, at their own speed and each from its own process, to an embedded
broker; runs one lane with the real encoder and the LLM on Ray Serve; and reads the resident memory, the open
descriptors and the threads of every process every five seconds, the lane's lag, and how many files lie in Ray's folder
and under checkpoints/. What must stay flat is the private memory of the job's processes; the broker keeps its log in
memory and is told apart, and so is Ray's shared object store, which is of fixed size. Private memory counts pages that
forked workers still share once for each of them; proportional memory (PSS), read once a minute, shares them out, so
that it grows where they part, and its sum is what the job takes.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from measuring import PARTS, part_of
from ray import serve

from stormline.infra.broker import EmbeddedBroker
from stormline.pipeline.commands.demo import street_video
from stormline.pipeline.ray_watch import own_ray
from stormline.pipeline.settings import Settings
from stormline.pipeline.supervisor import RunStatus, Supervisor

RESULT = Path(__file__).parent / "results" / "soak.json"
SAMPLE_S = 5.0
SAMPLES_PER_MINUTE = round(60 / SAMPLE_S)
SETTLED_S = {
    True: 300.0,
    False: 60.0,
}  # after the first rows, until memory shall be flat: in a long run, in a short one
LONG_MINUTES = 20.0


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment."""

    time_s: float
    private_bytes: dict[str, int]  # by process, as "PART PID"
    proportional_bytes: dict[str, int]  # the same; empty but once a minute
    descriptors: dict[str, int]
    threads: dict[str, int]
    figures: dict[str, float]  # of the job as a whole


class ProcessLog:
    """Private memory, open descriptors and threads of each of the job's processes, sampled as it runs."""

    def __init__(self, settled_s: float) -> None:
        self._apart: set[int] = set()
        self._settled_s = settled_s
        self.began_s = time.monotonic()
        self.samples: list[Sample] = []

    def begin(self, apart: set[int]) -> None:
        """Count time from now; the processes `apart` are not the job's: broker and publishers."""
        self._apart, self.began_s = apart, time.monotonic()

    def sample(self, **figures: float) -> None:
        private, proportional, descriptors, threads = {}, {}, {}, {}
        is_minute = len(self.samples) % SAMPLES_PER_MINUTE == 0
        job = psutil.Process()
        for process in [job, *job.children(recursive=True)]:
            if process.pid in self._apart:
                continue
            try:
                command, memory = " ".join(process.cmdline()), process.memory_info()
                n_descriptors, n_threads = process.num_fds(), process.num_threads()
                shared_out = process.memory_full_info().pss if is_minute else 0
            except psutil.Error:
                continue
            part = part_of(command)
            if part is not None:
                name = f"{part} {process.pid}"
                private[name], descriptors[name], threads[name] = memory.rss - memory.shared, n_descriptors, n_threads
                if is_minute:
                    proportional[name] = shared_out
        time_s = time.monotonic() - self.began_s
        self.samples.append(Sample(time_s, private, proportional, descriptors, threads, figures))

    @property
    def settled(self) -> list[Sample]:
        """Return the samples after the first while."""
        return [s for s in self.samples if s.time_s >= self._settled_s]

    def report(self) -> dict[str, dict[str, float]]:
        """Return, for each part and in all, MB after the first while and at the end, and the slope in MB/min."""
        told = {}
        for part in [*PARTS, "all"]:
            series = [
                (s.time_s, sum(b for name, b in s.private_bytes.items() if part in ("all", part_named(name))) / 1e6)
                for s in self.settled
            ]
            if any(mb for _, mb in series):
                first, last, slope = flatness(series)
                told[part] = {
                    "settled_mb": round(first, 1),
                    "at_the_end_mb": round(last, 1),
                    "slope_mb_per_min": round(slope / 60, 3),
                }
        return told

    def proportional(self) -> dict[str, Any]:
        """Return MB of the whole job with shared pages shared out, its slope in MB/h, and (seconds, MB) each minute."""
        series = [(s.time_s, sum(s.proportional_bytes.values()) / 1e6) for s in self.samples if s.proportional_bytes]
        first, last, slope = flatness([(at_s, mb) for at_s, mb in series if at_s >= self._settled_s])
        return {
            "settled_mb": round(first, 1),
            "at_the_end_mb": round(last, 1),
            "slope_mb_per_h": round(slope, 1),
            "second_half_slope_mb_per_h": round(flatness(series[len(series) // 2 :])[2], 1),
            "each_minute_mb": [(round(at_s), round(mb)) for at_s, mb in series],
        }

    def by_process(self) -> dict[str, dict[str, Any]]:
        """Return the same for each process that lived all the time, in MB/h, and its descriptors and threads."""
        names = set.intersection(*(set(s.private_bytes) for s in self.settled))
        minutes = [s for s in self.settled if s.proportional_bytes]
        told = {}
        for name in sorted(names):
            first, last, slope = flatness([(s.time_s, s.private_bytes[name] / 1e6) for s in self.settled])
            told[name] = {
                "settled_mb": round(first, 1),
                "at_the_end_mb": round(last, 1),
                "slope_mb_per_h": round(slope, 1),
                "proportional_slope_mb_per_h": round(
                    flatness([(s.time_s, s.proportional_bytes[name] / 1e6) for s in minutes])[2], 1
                ),
                "descriptors": [
                    round(v) for v in flatness([(s.time_s, s.descriptors[name]) for s in self.settled])[:2]
                ],
                "threads": [round(v) for v in flatness([(s.time_s, s.threads[name]) for s in self.settled])[:2]],
            }
        return told

    def figures(self) -> dict[str, dict[str, float]]:
        """Return how the job's figures began and ended, their slopes per hour, and their extremes."""
        told = {}
        for name in self.settled[0].figures:
            series = [(s.time_s, s.figures[name]) for s in self.settled]
            first, last, slope = flatness(series)
            values = [value for _, value in series]
            told[name] = {
                "settled": round(first, 2),
                "at_the_end": round(last, 2),
                "slope_per_h": round(slope, 2),
                "median": round(statistics.median(values), 2),
                "worst": round(max(values), 2),
            }
        return told


def part_named(name: str) -> str:
    """Return the part of a process named as "PART PID"."""
    return name.rpartition(" ")[0]


def flatness(series: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the medians of the first and the last tenth of (seconds, value), and the fitted slope per hour."""
    tenth = max(1, len(series) // 10)
    first = statistics.median(value for _, value in series[:tenth])
    last = statistics.median(value for _, value in series[-tenth:])
    slope = statistics.linear_regression([t / 3600 for t, _ in series], [v for _, v in series]).slope
    return first, last, slope


def n_files(folder: Path) -> int:
    """Return how many files lie below a folder."""
    return sum(len(files) for _, _, files in os.walk(folder))


def start_publishers(bootstrap: str, n_streams: int) -> list[subprocess.Popen]:
    bikes = str(street_video())
    sources = {"street-1": bikes, "street-2": bikes}
    sources |= {f"shapes-{k}": f"shapes:?seed={k}" for k in range(1, n_streams - 1)}
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
    parser.add_argument("--streams", type=int, default=4, help="two of bikes.mp4, the others generated")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    minutes = args.minutes
    publishers: list[subprocess.Popen] = []
    with EmbeddedBroker() as broker, tempfile.TemporaryDirectory() as folder:
        broker.create_topic("video", partitions=2)
        settings = Settings.model_validate(
            {
                "kafka": {"bootstrap_servers": broker.bootstrap_servers, "topics": ["video"]},
                "output": {"path": folder},
                "lanes": {"barrier_interval_s": 2.0},
                # Full after minutes, as they are in the long run.
                "store": {"max_bytes": 1 << 20},
                "llm": {"prefix_cache_bytes": 1 << 25},
                "queries": [{"id": "caption", "prompt": "Describe what happens.", "window_s": 10.0}],
            }
        )
        supervisor = Supervisor(settings, print)
        log = ProcessLog(SETTLED_S[minutes >= LONG_MINUTES])
        pushed: list = []

        def on_ready() -> None:
            publishers.extend(start_publishers(broker.bootstrap_servers, args.streams))
            log.begin({broker.pid, *(p.pid for p in publishers)})

        def on_status(status: RunStatus) -> None:
            if not publishers or (log.samples and time.monotonic() - log.began_s < log.samples[-1].time_s + SAMPLE_S):
                return
            log.sample(
                lag_s=status.lag_s,
                lag_records=status.lag_records,
                files_of_ray=n_files(Path(own_ray().get_session_dir_path())),
                files_of_checkpoints=n_files(Path(folder, "checkpoints")),
            )
            if len(log.samples) % SAMPLES_PER_MINUTE == 1:
                stats = serve.get_deployment_handle("TokenStore", "stormline-store").stats.remote().result()
                pushed[:] = [stats["push_latency"]]
                last = log.samples[-1]
                mb, n_descriptors = sum(last.proportional_bytes.values()) / 1e6, sum(last.descriptors.values())
                told = f"{status.segments} segments  lag {status.lag_s:.1f} s  {mb:.0f} MB  {n_descriptors} descriptors"
                print(f"{last.time_s:5.0f} s  {told}", flush=True)
            if log.samples[-1].time_s >= minutes * 60:
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
        "streams": args.streams,
        "segments": status.segments,
        "results": status.results,
        "restarts": status.restarts,
        "committed_p50_ms": round(status.commit_p50_ms),
        "committed_p95_ms": round(status.commit_p95_ms),
        "pushed_p50_ms": round(pushed[0].p50_ms) if pushed else None,
        "pushed_p95_ms": round(pushed[0].p95_ms) if pushed else None,
        "barrier_interval_s": 2.0,
        "settled_s": SETTLED_S[minutes >= LONG_MINUTES],
        "memory": log.report(),
        "proportional": log.proportional(),
        "processes": log.by_process(),
        "figures": log.figures(),
        "load_average": os.getloadavg()[1],
    }
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
