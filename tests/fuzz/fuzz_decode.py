"""Damage real segments in many ways and decode them with the lane's own step, looking for what it cannot stand.

    make fuzz                                       10,000 segments; half a minute on two cores
    make fuzz ARGS="--cases 100000 --seed 7"        more, and others
    make fuzz ARGS="--seed 7 --only 4711"           one of them again; its bytes go to --keep

Each case takes one of the samples of `corpus.py`, in the containers and codecs that this FFmpeg can write, and damages
it in one to three of the ways of `mutations.py`; one case in 20 stays as it is. The seed and a case's number give
the same bytes again. Decode runs in processes of its own, as a lane runs it for a stream that it does not trust.

What must hold, or the case counts as odd, is kept, and the exit status is 1: the process lives and answers in time;
its memory stays bounded; what gave no frame has a dead letter with a reason of REASONS; a sound segment comes out
as when it was decoded first.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import os
import platform
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from corpus import Sample, make_corpus
from mutations import mutate

from stormline.operators.decode import REASONS, DecodeLimits
from stormline.operators.decode_apart import DecodeProcess, ProcessDiedError
from stormline.operators.rows import DecodedSegment, Segment, SegmentMeta, block_of, rows_of

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.json"
FRAME_HW = (64, 64)
DEAD_LETTER_BYTES = 256
START_NS = 1_700_000_000_000_000_000
SOUND_EVERY = 20
KEPT = 10  # of the slowest and of the largest, each
MEMORY_BYTES = 2 << 30  # that a process may take: half of `lanes.decode_memory_bytes`
MOST_BYTES = MEMORY_BYTES + (512 << 20)  # and with what Python takes: beyond it is odd


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    case: int
    sample: str
    damage: str  # what was done to it; nothing where it was left sound
    n_bytes: int
    reasons: tuple[str, ...]  # of its dead letters
    n_frames: int
    took_s: float
    peak_bytes: int  # of its process, Python included
    odd: str = ""

    def to_json(self) -> dict[str, object]:
        """Return it as the report has it."""
        fields = {k: v for k, v in vars(self).items() if k not in ("peak_bytes", "took_s")}
        return {**fields, "took_s": round(self.took_s, 3), "peak_mb": round(self.peak_bytes / 1e6)}


@dataclass
class Report:
    """What became of all cases; safe to add to from several threads."""

    keep: Path | None
    counts: Counter[str] = field(default_factory=Counter)
    n_sound: int = 0
    n_damaged: int = 0
    slowest: list[tuple[float, int, Outcome]] = field(default_factory=list)
    largest: list[tuple[float, int, Outcome]] = field(default_factory=list)
    odd: list[Outcome] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, outcome: Outcome, data: bytes) -> None:
        """Count a case."""
        with self.lock:
            self.n_sound += not outcome.damage
            self.n_damaged += bool(outcome.damage)
            for reason in outcome.reasons or ("used",):
                self.counts[reason] += 1
            self._rank(self.slowest, outcome.took_s, outcome)
            self._rank(self.largest, outcome.peak_bytes, outcome)
            if outcome.odd:
                self.odd.append(outcome)
                print(f"odd: case {outcome.case} {outcome.sample} {outcome.damage}: {outcome.odd}", flush=True)
                self.save(outcome, data)

    def save(self, outcome: Outcome, data: bytes) -> None:
        """Keep a case's bytes."""
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"case-{outcome.case}.bin").write_bytes(data)

    @staticmethod
    def _rank(ranking: list[tuple[float, int, Outcome]], value: float, outcome: Outcome) -> None:
        heapq.heappush(ranking, (value, outcome.case, outcome))
        if len(ranking) > KEPT:
            heapq.heappop(ranking)


class Cases:
    """The cases of a seed, by number."""

    def __init__(self, samples: list[Sample], seed: int):
        self.samples = samples
        self.seed = seed

    def make(self, number: int) -> tuple[Sample, bytes, str]:
        """Return the sample of a case, its bytes, and what was done to them."""
        rng = random.Random(f"{self.seed}/{number}")
        sample = rng.choice(self.samples)
        if number % SOUND_EVERY == 0:
            return sample, sample.data, ""
        return sample, *mutate(sample, rng, self.samples)


class Worker:
    """One decoding process, and what is known of its memory."""

    def __init__(self, limit_s: float):
        options = {
            "fps": "5",
            "frame_hw": FRAME_HW,
            "dead_letter_bytes": DEAD_LETTER_BYTES,
            "picture_interval_s": 1e-9,  # of each a picture, too: that is code that sees the frames
            "limits": vars(DecodeLimits()),
            "memory_bytes": MEMORY_BYTES,
        }
        self.process = DecodeProcess(options, limit_s)
        self.first_rss_bytes = 0
        self.last_rss_bytes = 0
        self.n_decoded = 0

    def decode(self, meta: SegmentMeta, data: bytes) -> tuple[DecodedSegment, int]:
        """Decode a segment; returns it and the most memory that the process had meanwhile."""
        if self.process.pid is not None:
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # the peak counts from here
        (row,) = rows_of(self.process(block_of([Segment(meta, data).to_row(meta.offset)])))
        assert (row.kind, row.lane_seq) == ("frames", meta.offset)
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        memory = {
            k: int(v.split()[0]) << 10
            for k, _, v in (line.partition(":") for line in status.splitlines())
            if k in ("VmHWM", "VmRSS")
        }
        self.n_decoded += 1
        self.last_rss_bytes = memory["VmRSS"]
        if self.n_decoded == 100:  # warmed up
            self.first_rss_bytes = memory["VmRSS"]
        return DecodedSegment.from_row(row), memory["VmHWM"]


def meta_of(number: int, sample: Sample, data: bytes) -> SegmentMeta:
    return SegmentMeta(
        "cam", "a", 0, START_NS, START_NS, sample.content_type, False, 0, "fuzz", 0, number, 0, len(data)
    )


def digest(decoded: DecodedSegment) -> str:
    """Return what a segment came out as, in short."""
    frames = hashlib.sha256(decoded.frames.tobytes()).hexdigest()
    reasons = [d.reason for d in decoded.dead_letters]
    return f"{decoded.n_frames} {decoded.grid_indices.tolist()} {decoded.tail_ns} {reasons} {frames}"


def oddity(decoded: DecodedSegment, meta: SegmentMeta, data: bytes) -> str:
    """Return what is wrong with an answer, or ""."""
    reasons = [d.reason for d in decoded.dead_letters]
    if decoded.meta != meta:
        return "it is of another segment"
    if unknown := set(reasons) - REASONS.keys():
        return f"reasons {unknown} are none of REASONS"
    if "error" in reasons:
        return decoded.dead_letters[0].detail
    if decoded.failed:
        (letter,) = decoded.dead_letters
        return "" if bytes(letter.data) == data[:DEAD_LETTER_BYTES] else "its dead letter has other bytes"
    if decoded.frames.shape != (len(decoded.grid_indices) + 1, *FRAME_HW, 3):
        return f"frames of shape {decoded.frames.shape} for {len(decoded.grid_indices)} grid indices"
    if (np.diff(decoded.grid_indices) <= 0).any() or decoded.tail_ns < decoded.first_ns:
        return "times fall back"
    return "" if set(reasons) <= {"damaged", "too_long"} else f"used, but {reasons}"


def run_case(worker: Worker, number: int, cases: Cases, sound: dict[str, str]) -> tuple[Outcome, bytes]:
    """Decode one case and judge what comes out."""
    sample, data, damage = cases.make(number)
    meta = meta_of(number, sample, data)
    began_s = time.monotonic()

    def outcome(reasons: tuple[str, ...], n_frames: int, peak_bytes: int, odd: str) -> tuple[Outcome, bytes]:
        took_s = time.monotonic() - began_s
        return Outcome(number, sample.name, damage, len(data), reasons, n_frames, took_s, peak_bytes, odd), data

    try:
        decoded, peak_bytes = worker.decode(meta, data)
    except ProcessDiedError as died:
        return outcome(("hang" if died.hung else "crash",), 0, 0, f"the process died: {died.cause}")
    odd = oddity(decoded, meta, data)
    if not damage and digest(decoded) != sound[sample.name]:
        odd = f"a sound segment came out as {digest(decoded)}, before as {sound[sample.name]}"
    if peak_bytes > MOST_BYTES:
        odd = odd or f"it took {peak_bytes / 1e6:.0f} MB of memory"
    return outcome(tuple(d.reason for d in decoded.dead_letters), decoded.n_frames, peak_bytes, odd)


def decode_sound(samples: list[Sample], limit_s: float) -> dict[str, str]:
    """Return what each sample comes out as, undamaged; ends the run where one does not as it should."""
    worker, found = Worker(limit_s), {}
    for number, sample in enumerate(samples):
        decoded, _ = worker.decode(meta_of(number, sample, sample.data), sample.data)
        reasons = [d.reason for d in decoded.dead_letters]
        if reasons != ([] if sample.has_video else ["no_video"]) or decoded.failed == sample.has_video:
            details = [d.detail for d in decoded.dead_letters]
            sys.exit(f"{sample.name}, undamaged, gave {decoded.n_frames} frames, {details}")
        found[sample.name] = digest(decoded)
    worker.process.close()
    return found


def run_all(arguments: argparse.Namespace, cases: Cases, sound: dict[str, str], report: Report) -> list[Worker]:
    """Run the cases in as many processes as were asked for."""
    numbers = iter([arguments.only] if arguments.only is not None else range(arguments.cases))
    lock, done = threading.Lock(), itertools.count(1)
    workers = [Worker(arguments.limit_s) for _ in range(arguments.processes)]

    def work(worker: Worker) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            report.add(*run_case(worker, number, cases, sound))
            if (n := next(done)) % 1000 == 0:
                print(f"{n} cases, {len(report.odd)} odd", flush=True)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in workers:
        worker.process.close()
    return workers


def written(
    arguments: argparse.Namespace,
    cases: Cases,
    missing: list[str],
    report: Report,
    workers: list[Worker],
    wall_s: float,
) -> dict[str, Any]:
    """Return the report as JSON has it."""

    def ranked(ranking: list[tuple[float, int, Outcome]]) -> list[dict[str, object]]:
        return [outcome.to_json() for _, _, outcome in sorted(ranking, reverse=True, key=lambda r: r[:2])]

    return {
        "seed": arguments.seed,
        "segments": report.n_damaged + report.n_sound,
        "damaged": report.n_damaged,
        "sound": report.n_sound,
        "crashes": report.counts["crash"],
        "hangs": report.counts["hang"],
        "odd": [outcome.to_json() for outcome in report.odd],
        "by_reason": dict(report.counts.most_common()),
        "limit_s": arguments.limit_s,
        "wall_s": round(wall_s, 1),
        "slowest": ranked(report.slowest),
        "largest": ranked(report.largest),
        "workers": [
            {
                "decoded": w.n_decoded,
                "rss_mb_after_100": round(w.first_rss_bytes / 1e6),
                "rss_mb_at_the_end": round(w.last_rss_bytes / 1e6),
            }
            for w in workers
        ],
        "samples": [sample.name for sample in cases.samples],
        "not_written_here": missing,
        "ffmpeg": av.ffmpeg_version_info,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--seed", type=int, default=1, help="which (1): same seed, same cases, with the same FFmpeg")
    parser.add_argument("--only", type=int, metavar="CASE", help="only the one with this number")
    parser.add_argument("--processes", type=int, default=2, help="that decode at a time (2)")
    parser.add_argument("--limit-s", type=float, default=30.0, help="what takes longer hangs (30)")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep the odd, slowest and largest cases' bytes there"
    )
    parser.add_argument(
        "--result", type=Path, metavar="FILE", help=f"write the report there ({RESULT.name} in benchmarks/results)"
    )
    arguments = parser.parse_args()
    samples, missing = make_corpus()
    print(f"seed {arguments.seed}: {len(samples)} samples; FFmpeg cannot write here: {len(missing)}")
    cases, report = Cases(samples, arguments.seed), Report(arguments.keep)
    sound = decode_sound(samples, arguments.limit_s)
    began_s = time.monotonic()
    workers = run_all(arguments, cases, sound, report)
    result = written(arguments, cases, missing, report, workers, time.monotonic() - began_s)
    for _, number, outcome in [*report.slowest, *report.largest]:
        report.save(outcome, cases.make(number)[1])
    if arguments.result is not None:
        arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    shown = ("segments", "damaged", "sound", "crashes", "hangs", "by_reason", "wall_s", "workers")
    print(json.dumps({k: result[k] for k in shown}, indent=1))
    for name in ("slowest", "largest"):
        print(f"{name}: {result[name][0]}")
    print(f"{len(report.odd)} odd")
    return 1 if report.odd else 0


if __name__ == "__main__":
    sys.exit(main())
