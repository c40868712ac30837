"""One campaign: a run, faults at random moments from a seed, and the comparison with a run in peace."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stormline.infra.broker import EmbeddedBroker

from .commits import Commit, CommitWatch
from .compare import differences, row_counts
from .faults import FAULTS, FOUND_WITHIN_S, Fault, FaultError, Strike, Target
from .feed import Feeder, end_offsets, endless, publish_once
from .proxy import CuttableProxy
from .service import Service

TOPIC = "chaos"
PARTITIONS = 4
BACKLOG_RECORDS = (4, 12)  # that wait for the lanes: few enough that each fault is soon over, enough to have work
RECORDS_PER_S = 6.0
DISK_BYTES = 64 << 20
START_LIMIT_S = 300.0  # limits are for a machine that others use too
RECOVERY_LIMIT_S = 300.0
DRAIN_LIMIT_S = 300.0
QUIET_S = (0.0, 1.5)  # between a recovery and the next fault
# Of faults, so many are followed by another one while the run comes back; twice at most.
OVERLAP_SHARE, OVERLAPS, OVERLAP_AFTER_S = 0.35, 2, (0.0, 8.0)
OVERLAPPING = ("broker paused", "connections cut", "source", "decoder", "encoder", "annotate", "lane driver")
QUERIES = [
    {"id": "caption", "window_s": 4, "max_new_tokens": 8},
    {"id": "scene", "scenes": True, "max_new_tokens": 8},
    {"id": "appears", "kind": "alert", "prompt": "Does anything appear?", "window_s": 2, "max_new_tokens": 4},
]


class ChaosError(Exception):
    """The run did not come back, or its tables are not those of a run in peace."""


@dataclass
class Outcome:
    """One fault and how the run came over it."""

    kind: str
    detail: str
    began_s: float
    end_s: float
    recovered_s: float  # from the fault's end to the next committed row that shows it is over
    replayed_records: int
    parts: dict[str, float] = field(default_factory=dict)  # what that time is made of, in order
    cpu_s: float = 0.0  # that the processes took which were started for it: says what a busy machine's clock does not
    overlapped: list[str] = field(default_factory=list)  # kinds of the faults that came while it did


@dataclass
class Report:
    """What a campaign found."""

    seed: int
    outcomes: list[Outcome]
    starts: int
    records: int
    rows: dict[str, int]
    differences: list[str]
    leftovers: list[str]
    duration_s: float
    lanes: list[int] = field(default_factory=lambda: [1, 2])  # numbers of them, one drawn at each start
    fork_workers: bool = False  # whether workers were copies of one that had imported all (`ray.fork_workers`)
    load_average: float = math.inf  # of the five minutes at its end, its own work included; unknown of old ones


def told(outcome: Outcome) -> str:
    """Return an outcome as a line."""
    what = ", then ".join([f"{outcome.kind} ({outcome.detail})", *outcome.overlapped])
    parts = "".join(f", {name} {value:.1f}" for name, value in [*outcome.parts.items(), ("CPU", outcome.cpu_s)])
    return f"{what}: next row after {outcome.recovered_s:.1f} s, {outcome.replayed_records} records again{parts}"


def bag_of(kinds: Sequence[str], rng: random.Random) -> Iterator[Fault]:
    """Yield faults for ever, each kind as often as any other, in random order."""
    while True:
        yield from (FAULTS[kind] for kind in rng.sample(list(kinds), len(kinds)))


class Campaign:
    """Strikes one run `n_faults` times and compares.

    Args:
        seed: All that is random comes from it, but for what the machine's timing does.
        kinds: Of the faults, from `FAULTS`.
        lanes: Numbers of lanes, one of which is chosen at each start.
        serve: Whether the HTTP service runs too.
        limit_s: After so long no further fault strikes.
        tell: Told of each fault.
    """

    def __init__(
        self,
        seed: int,
        n_faults: int,
        kinds: Sequence[str],
        *,
        lanes: Sequence[int] = (1, 2),
        serve: bool = True,
        limit_s: float = math.inf,
        tell: Callable[[str], None] = print,
    ):
        self.seed, self.n_faults, self.kinds = seed, n_faults, list(kinds)
        self._lanes, self._serve, self._limit_s, self._tell = lanes, serve, limit_s, tell
        self._rng = random.Random(seed)
        self._lane_rng = random.Random(seed)

    def run(self) -> Report:
        """Run it all.

        Raises:
            ChaosError: If the run does not come back from a fault, or does not finish. The log's end is in it.
        """
        began_s = time.monotonic()
        with ExitStack() as stack:
            self.folder = stack.enter_context(kept_on_failure())
            for name in ("out", "peace", "read", "ray"):
                (self.folder / name).mkdir()
            self.small_disk = stack.enter_context(small_disk(self.folder / "out"))
            if not self.small_disk and "disk full" in self.kinds:
                self._tell("no disk of its own can be mounted here: no fault of the kind 'disk full'")
                self.kinds.remove("disk full")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            self.broker = stack.enter_context(EmbeddedBroker(advertise=f"127.0.0.1:{port}"))
            self.proxy = stack.enter_context(CuttableProxy(port, self.broker.port))
            self.address = f"127.0.0.1:{port}"
            self.broker.create_topic(TOPIC, partitions=PARTITIONS)
            published = publish_once(self.address)
            self.service = Service(
                self.folder, self._settings_file("out"), lambda: self._lane_rng.choice(list(self._lanes))
            )
            stack.callback(self.service.kill_all)
            self.commits = CommitWatch(self.folder / "out")
            self._backlog, self._allowed, self._paced_s = 0, 0.0, time.monotonic()
            self.feeder = Feeder(self.address, TOPIC, endless(published, PARTITIONS), self._wanted)
            outcomes = self._strike_all(stack)
            leftovers = [f"{p.pid} {p.name()}" for p in self.service.wait_until_gone()]
            self._tell(f"seed {self.seed}: in peace over the same {self.feeder.sent} records")
            self._run_in_peace()
            return Report(
                seed=self.seed,
                outcomes=outcomes,
                starts=self.service.starts,
                records=self.feeder.sent,
                rows=row_counts(self.folder / "out"),
                differences=differences(self.folder / "out", self.folder / "peace"),
                leftovers=leftovers,
                lanes=list(self._lanes),
                fork_workers=True,
                duration_s=time.monotonic() - began_s,
                load_average=os.getloadavg()[1],
            )

    def _strike_all(self, stack: ExitStack) -> list[Outcome]:
        self.commits.start()
        stack.callback(self.commits.stop)
        self.service.start()
        self.feeder.start()
        stack.callback(self.feeder.stop)
        self._wait("the first rows", lambda: self._commit_after(0.0), START_LIMIT_S)
        outcomes = []
        end_s = time.monotonic() + self._limit_s
        bag = bag_of(self.kinds, self._rng)
        for i in range(self.n_faults):
            self._backlog = self._rng.randint(*BACKLOG_RECORDS)
            time.sleep(self._rng.uniform(*QUIET_S))
            outcome = self._strike(next(bag))
            outcomes.append(outcome)
            self._tell(f"seed {self.seed} {i + 1}/{self.n_faults}: {told(outcome)}")
            if time.monotonic() > end_s:
                break
        self.feeder.stop()
        ends = end_offsets(self.address, TOPIC)
        drained = lambda: all(self.commits.next_offsets.get(p, 0) >= end for p, end in ends.items())  # noqa: E731
        self._wait("the rest", drained, DRAIN_LIMIT_S)
        status = self.service.stop()
        if status != 0:
            raise ChaosError(f"the run ended with status {status}, expected 0\n{self.service.tail()}")
        return outcomes

    def _strike(self, fault: Fault) -> Outcome:
        self.service.take_census()
        read_before = self._read_offsets()
        n_events = len(self._events())
        strike = fault.strike(self._target())
        more = list(self._strike_meanwhile())
        again = "new_life" in (fault.seen_by, *(FAULTS[kind].seen_by for kind, _ in more))
        read = {**read_before, **self._read_offsets()} if again else read_before
        began_s, end_s = strike.began_s, max([strike.end_s, *(s.end_s for _, s in more)])
        if again and fault.seen_by != "new_life":
            began_s = next(s.began_s for kind, s in more if FAULTS[kind].seen_by == "new_life")
        shows = {
            "new_life": lambda: self._commit_of_new_life(began_s, end_s),
            "read_on": lambda: self._commit_beyond(read_before, end_s),
            "answered": lambda: self._commit_answered(end_s),
            "rows": lambda: self._commit_after(end_s),
        }["new_life" if again else fault.seen_by]
        what = ", ".join([f"{fault.kind} ({strike.detail})", *(f"{kind} ({s.detail})" for kind, s in more)])
        commit = self._wait(f"a row after {what}", shows, RECOVERY_LIMIT_S)
        cpu_s = self.service.cpu_since(strike.began_s)
        return Outcome(
            kind=fault.kind,
            detail=strike.detail,
            began_s=strike.began_s,
            end_s=end_s,
            recovered_s=commit.time_s - end_s,
            replayed_records=self._replayed(read, commit) if again else 0,
            parts=self._parts(strike, commit, self._events()[n_events:]) if again and not more else {},
            cpu_s=round(cpu_s, 1) if again else 0.0,
            overlapped=[kind for kind, _ in more],
        )

    def _strike_meanwhile(self) -> Iterator[tuple[str, Strike]]:
        """Strike again while the run comes back from a fault, sometimes; tells what struck."""
        for _ in range(OVERLAPS):
            if self._rng.random() >= OVERLAP_SHARE:
                return
            kind = self._rng.choice([k for k in OVERLAPPING if k in self.kinds] or [""])
            time.sleep(self._rng.uniform(*OVERLAP_AFTER_S))
            with suppress(FaultError, KeyError):  # it may be down as a whole
                yield kind, FAULTS[kind].strike(self._target(patience_s=0.0))

    # What the probe and the commits tell.

    def _events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _read_offsets(self) -> dict[tuple[str, int], int]:
        found = {}
        for path in (self.folder / "read").iterdir():
            topic, _, partition = path.name.rpartition("-")
            found[topic, int(partition)] = int(path.read_text() or 0)
        return found

    def _commit_after(self, time_s: float) -> Commit | None:
        return next((c for c in list(self.commits.commits) if c.time_s > time_s and c.n_rows), None)

    def _commit_of_new_life(self, began_s: float, end_s: float) -> Commit | None:
        began = [e for e in self._events() if e["name"] == "lane_began" and e["time_s"] > began_s]
        for event in began:
            for commit in list(self.commits.commits):
                if commit.lane == event["lane"] and commit.time_s > max(event["time_s"], end_s) and commit.n_rows:
                    return commit
        return None

    def _commit_beyond(self, read: dict[tuple[str, int], int], time_s: float) -> Commit | None:
        return next(
            (
                c
                for c in list(self.commits.commits)
                if c.time_s > time_s and c.n_rows and any(o > read.get(p, 0) for p, o in c.next_offsets.items())
            ),
            None,
        )

    def _commit_answered(self, time_s: float) -> Commit | None:
        return next((c for c in list(self.commits.commits) if c.newest_answer_s > time_s), None)

    def _replayed(self, read: dict[tuple[str, int], int], commit: Commit) -> int:
        """Return how many records the lane read a second time: read when it died, and not committed."""
        committed: dict[tuple[str, int], int] = {}
        for c in list(self.commits.commits):
            if c is not commit and c.time_s < commit.time_s:
                for p, offset in c.next_offsets.items():
                    committed[p] = max(offset, committed.get(p, 0))
        return sum(max(0, read.get(p, 0) - committed.get(p, 0)) for p in commit.next_offsets)

    def _parts(self, strike: Strike, commit: Commit, events: list[dict[str, Any]]) -> dict[str, float]:
        """Return what the time to the next row is made of, seconds each, in order."""
        began = [e for e in events if e["name"] == "lane_began" and e["lane"] == commit.lane]
        began = [e for e in began if strike.began_s < e["time_s"] < commit.time_s]
        if not began:
            return {}
        life = began[-1]
        later = [e for e in events if life["time_s"] <= e["time_s"] <= commit.time_s]
        noticed = [
            line.time_s
            for line in self.service.lines
            if strike.began_s < line.time_s <= life["time_s"]
            and any(mark in line.text for mark in (" failed (", "[ended", "Ray died ("))
        ]

        def last(name: str, default: float) -> float:
            return max((e["time_s"] for e in later if e["name"] == name), default=default)

        noticed_s = noticed[0] if noticed else life["time_s"]
        imported_s = max(last(f"{step}_imported", life["time_s"]) for step in ("decode", "encode", "annotate"))
        ready_s = max(last(f"{step}_ready", imported_s) for step in ("decode", "encode", "annotate"))
        row_s = max(ready_s, last("first_row", ready_s))
        moments = {
            "noticed": noticed_s,
            "lane began": life["time_s"],
            "imported": imported_s,
            "loaded": ready_s,
            "first row": row_s,
            "committed": commit.time_s,
        }
        parts, before_s = {}, strike.began_s
        for name, moment_s in moments.items():
            parts[name], before_s = round(max(0.0, moment_s - before_s), 2), max(before_s, moment_s)
        return parts

    # The run itself.

    def _wanted(self, sent: int) -> bool:
        now_s = time.monotonic()
        self._allowed = min(2.0, self._allowed + (now_s - self._paced_s) * RECORDS_PER_S)
        self._paced_s = now_s
        if self._allowed < 1.0 or sent - self.commits.n_records >= max(self._backlog, BACKLOG_RECORDS[0]):
            return False
        self._allowed -= 1.0
        return True

    def _target(self, patience_s: float = FOUND_WITHIN_S) -> Target:
        return Target(
            service=self.service,
            proxy=self.proxy,
            broker_pid=self.broker.pid,
            output=self.folder / "out",
            folder=self.folder,
            rng=self._rng,
            small_disk=self.small_disk,
            patience_s=patience_s,
        )

    def _settings_file(self, out: str) -> Path:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        path = self.folder / f"{out}.yaml"
        settings = {
            "kafka": {"bootstrap_servers": self.address, "topics": [TOPIC]},
            "output": {"path": str(self.folder / out)},
            "lanes": {"barrier_interval_s": 0.5},
            "serve": {"enabled": self._serve and out == "out", "port": port},
            "queries": QUERIES,
            # In peace, workers start as Ray starts them: so whatever a fork could change would show.
            "ray": {"object_store_bytes": 200 << 20, "fork_workers": out == "out"},
        }
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path

    def _run_in_peace(self) -> None:
        service = Service(self.folder, self._settings_file("peace"), lambda: 1)
        commits = CommitWatch(self.folder / "peace")
        ends = end_offsets(self.address, TOPIC)
        commits.start()
        service.start()
        try:
            self._wait(
                "the run in peace",
                lambda: all(commits.next_offsets.get(p, 0) >= end for p, end in ends.items()),
                START_LIMIT_S + sum(ends.values()),
                service,
            )
            service.stop()
        finally:
            commits.stop()
            service.kill_all()

    def _wait(self, what: str, look: Callable[[], Any], limit_s: float, service: Service | None = None) -> Any:
        end_s = time.monotonic() + limit_s
        while not (found := look()):
            if time.monotonic() > end_s:
                service = service or self.service
                raise ChaosError(f"seed {self.seed}: {what} did not come in {limit_s:.0f} s\n{service.tail()}")
            time.sleep(0.05)
        return found


@contextmanager
def kept_on_failure() -> Iterator[Path]:
    """Give a folder for the block, and leave it there if the block raises."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))  # short: Ray puts sockets into it
    try:
        yield folder
    except BaseException as error:
        error.add_note(f"what was printed and written is in {folder}")
        raise
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small disk at `folder` for the block, where this machine lets us; tells whether it did."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "stormline-chaos", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)
