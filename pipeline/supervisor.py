"""The supervisor: starts Ray, the services and the lanes, restarts a lane that fails, and stops them all cleanly."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..operators.errors import (
    CheckpointError,
    CommitError,
    OrderError,
    SourceError,
    StormlineError,
    TopicAnewError,
)
from .embedded_ray import embedded_ray, may_fork
from .ray_watch import Leave, end_process, unless_stopped
from .settings import Settings
from .waits import doubled_wait_s

if TYPE_CHECKING:
    from ..operators.in_hand import Suspect
    from .archive.feed import ArchiveFeed
    from .kafka_source import TopicsThere
    from .lane import LanePlan, LaneStatus
    from .poison import SuspectList
    from .serving import StartingServices
    from .video_llm import ModelDescription

logger = logging.getLogger(__name__)

POLL_S = 0.5
STOP_WAIT_S = 30.0  # for a lane's last commit; after that it is killed, which loses nothing but the time to redo it
MAX_BACKOFF_S = 30.0
START_LIMIT_S = (
    600.0  # of a lane until its first commit: it loads its model, which may be large and come over a network
)
MEANWHILE = ("delivery", "front.deployment", "lane", "partition_watch", "recovery")


@dataclass
class LaneSlot:
    """One lane's place: its plan, its actor, and how it has fared."""

    plan: LanePlan
    actor: Any = None
    run_ref: Any = None
    started_s: float = 0.0
    restarts: int = 0  # in a row, without a commit between
    total_restarts: int = 0
    renewals: int = 0
    retry_at_s: float = 0.0
    status: LaneStatus | None = None
    status_ref: Any = None  # of the question for the next one, while it has no answer
    asked_s: float = 0.0
    silent_s: float = 0.0  # for how long that question has waited
    last_error: str = ""
    finished: bool = False  # its source has ended: nothing is left to do
    renewing: bool = False  # it was told to stop at its next commit, and starts again from there
    to_recover: bool = False  # its plan is that of a life that is over
    blamed: str | None = None  # for its last failure: see `SuspectList.take_marks`
    gone: frozenset[tuple[str, int]] = frozenset()  # partitions that it read until they went
    done: list[LaneStatus] = field(default_factory=list)  # of its earlier lives, for totals


@dataclass(frozen=True)
class RunStatus:
    """All lanes together, for a live view and a summary."""

    phase: str  # starting, running, stopping, stopped
    lanes: int
    lanes_up: int  # those that have nothing to read count as up
    restarts: int  # after failures
    renewals: int  # planned ones: see `lanes.renew_after_segments`, and for new partitions
    segments: int
    frames: int
    sampled: int
    chunks: int
    results: int
    dead_letters: int
    duplicates: int
    skipped: int  # records that were too old; see `lag:` of the settings
    lag_records: int  # -1 where unknown
    lag_s: float  # age of what is committed, of the lane that is furthest behind; -1 where unknown
    commit_p50_ms: float
    commit_p95_ms: float
    idle_s: float  # since any lane's newest record; 0 while a lane that has something to read is not up
    model_name: str = ""
    model_trained: bool = True
    newest: tuple[Any, ...] = ()
    n_bytes: int = 0  # of media
    next_offsets: Mapping[tuple[str, int], int] = field(default_factory=dict)  # as committed
    busy_s: Mapping[str, float] = field(default_factory=dict)  # by step, of all lanes' workers together


class Supervisor:
    """Run the lanes of one settings file until told to stop.

    Args:
        settings: What to run.
        on_phase: Told what it is doing, in a sentence, as it starts and stops.
        archive: Files to read instead of Kafka; it is then over when they are.
        leave: What this process does should a Ray of its own die (`ray_watch`).
    """

    def __init__(
        self,
        settings: Settings,
        on_phase: Callable[[str], None] | None = None,
        archive: ArchiveFeed | None = None,
        leave: Leave = end_process,
    ):
        self._settings = settings
        self._archive = archive
        self._tell = on_phase or (lambda text: logger.info("%s", text))
        self._stop = threading.Event()
        self._leave = unless_stopped(self._stop, leave)
        self._slots: list[LaneSlot] = []
        self._phase = "starting"
        self._model: ModelDescription | None = None
        self._suspects: SuspectList | None = None

    def request_stop(self) -> None:
        """Ask for a clean stop; safe from a signal handler or another thread."""
        self._stop.set()

    def run(
        self,
        *,
        until_idle_s: float | None = None,
        on_status: Callable[[RunStatus], None] | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> RunStatus:
        """Start everything, watch it until `request_stop`, stop it; returns what was done.

        Args:
            until_idle_s: Also stop when nothing has come for so long and nothing is waiting.
            on_status: Called a few times a second.
            on_ready: Called once, when every lane takes records.

        Raises:
            StormlineError: What could not start, or the lane that failed too often, and why.
        """
        from .delivery import DeliveryThread
        from .output_lock import OutputLock
        from .query_registry import QueryRegistry

        root = Path(self._settings.output.path)
        with OutputLock(root), embedded_ray(self._settings, self._tell, self._leave, MEANWHILE):
            QueryRegistry(root).take_settings(self._settings.queries)
            if not self._stop.is_set():
                delivery = DeliveryThread(root, self._settings.delivery, self._settings.kafka)
                with self._services() as services, delivery:
                    self._watch(services, until_idle_s, on_status or (lambda status: None), on_ready or (lambda: None))
            self._phase = "stopped"
            return self.status()

    def _watch(
        self,
        services: StartingServices,
        until_idle_s: float | None,
        on_status: Callable[[RunStatus], None],
        on_ready: Callable[[], None],
    ) -> None:
        if self._stop.is_set():
            return
        from .partition_watch import PartitionWatch

        self._plan(self._describing(services))
        self._tell(f"starting {len(self._slots)} lane(s)")
        ready = False
        known = (p for slot in self._slots for p in slot.plan.partitions)
        watch = self._archive.watch() if self._archive else PartitionWatch(self._settings.kafka, known)
        try:
            watch.start()
            while not self._stop.is_set():
                self._let_go(watch.take_gone())
                self._adopt(watch.take())  # after it: what went and came back meanwhile is among both
                self._tend()
                status = self.status()
                if not ready and services.ready() and status.lanes_up == len(self._slots):
                    ready, self._phase = True, "running"
                    on_ready()
                on_status(status)
                if all(slot.finished for slot in self._slots):
                    break
                if until_idle_s is not None and ready and status.idle_s >= until_idle_s and status.lag_records == 0:
                    break
                self._stop.wait(POLL_S)
        finally:
            self._phase = "stopping"
            watch.stop()
            self._stop_lanes()

    def _services(self) -> AbstractContextManager[StartingServices]:
        from .serving import starting_services

        http = ", the HTTP service" if self._settings.serve.enabled else ""
        self._tell(f"starting the LLM{http} and the token store on Ray Serve")
        return starting_services(self._settings)

    def _describing(self, services: StartingServices) -> Callable[[], ModelDescription]:
        """Begin to find out what the model is; apart where that costs little, so that lanes start beside the services.

        Returns:
            What waits for the answer and returns it.
        """
        from ray.exceptions import RayError

        from .serving import describe_model, describing_apart

        settings = self._settings
        may_be_apart = settings.model.path is None and may_fork(settings) and not services.ready()
        apart = describing_apart(settings.model) if may_be_apart else None

        def described() -> ModelDescription:
            if apart is not None:
                try:
                    return apart()
                except RayError as error:
                    logger.warning("describe_apart_failed error=%r", error)
            services.wait()
            return describe_model()

        return described

    def _plan(self, described: Callable[[], ModelDescription]) -> None:
        """Find the partitions, recover what is committed, and plan each lane."""
        from .checkpoint import list_lanes
        from .kafka_source import look_for_topics
        from .lane import LanePlan
        from .poison import SuspectList
        from .recovery import recover

        settings, archive = self._settings, self._archive
        if archive:
            there, partitions = None, archive.partitions(settings.lanes.count)
        else:
            there = look_for_topics(settings.kafka)
            partitions = there.partitions
        count = min(settings.lanes.count, max(1, len(partitions)))
        if count < settings.lanes.count:
            self._tell(f"{len(partitions)} partition(s) for {settings.lanes.count} lanes: starting {count}")
        self._model = model = described()  # what there was to import and to ask the broker was done meanwhile
        identity = {**run_identity(settings, model), **(archive.identity if archive else {})}
        recovery = recover(settings.output.path, lanes=count, identity=identity)
        for warning in recovery.warnings:
            self._tell(f"checkpoint: {warning}")
        if recovery.partitions:
            self._tell(f"going on from the checkpoint: {len(recovery.partitions)} partition(s)")
        if archive:
            archive.recovered()
        if there:
            self._compare(there, recovery.next_offsets)
        self._suspects = SuspectList(settings.output.path)
        for lane in list_lanes(recovery.root):
            self._tell_set_aside(self._suspects.take_marks(lane, recovery.next_offsets))
        for lane in range(count):
            mine = tuple(partitions[lane::count])
            self._slots.append(
                LaneSlot(
                    LanePlan(
                        lane=lane,
                        settings=settings,
                        model_name=model.name,
                        frame_hw=model.frame_hw,
                        identity=identity,
                        partitions=mine,
                        start=recovery.for_lane(lane, mine),
                        suspects=self._suspects.of(mine),
                        archive=archive.plan if archive else None,
                    )
                )
            )

    def _compare(self, there: TopicsThere, next_offsets: Mapping[tuple[str, int], int]) -> None:
        """Refuse topics that were never there, and those that were made anew; tell which are gone."""
        from .kafka_source import check_offsets_exist

        there.check({topic for topic, _ in next_offsets})
        here = {p: n for p, n in next_offsets.items() if p in set(there.partitions)}
        if here:
            check_offsets_exist(there.kafka, here)
        if left := sorted(next_offsets.keys() - here.keys()):
            names = ", ".join(f"{topic}[{partition}]" for topic, partition in left[:5])
            more = ", …" if len(left) > 5 else ""
            self._tell(f"not read any more (deleted, or not in kafka.topics): {names}{more}; the checkpoint stays")
        if not there.partitions:
            self._tell(f"none of {', '.join(there.kafka.topics)} is at {there.kafka.bootstrap_servers}: waiting for it")

    def _adopt(self, partitions: list[tuple[str, int]]) -> None:
        """Give new partitions to the lanes that have the fewest; each takes them up at its next commit."""
        for partition in partitions:
            # One that comes back goes to the lane that had it, which may not have noticed yet that it was gone.
            had_it = (slot for slot in self._slots if partition in slot.gone)
            slot = next(had_it, min(self._slots, key=lambda slot: len(slot.plan.partitions)))
            slot.gone -= {partition}
            slot.plan = replace(
                slot.plan,
                partitions=(*slot.plan.partitions, partition),
                new_partitions=slot.plan.new_partitions | {partition},
            )
            self._tell(f"new partition {partition[0]}[{partition[1]}]: lane {slot.plan.lane} takes it up")
            if slot.actor is not None:
                self._renew(slot)
            slot.to_recover = True  # a checkpoint may tell where the partition goes on

    def _let_go(self, partitions: list[tuple[str, int]]) -> None:
        """Leave partitions that are gone out of what their lanes read in their next life; nothing comes of them now."""
        for partition in partitions:
            for slot in (slot for slot in self._slots if partition in slot.plan.partitions):
                left = tuple(p for p in slot.plan.partitions if p != partition)
                slot.plan = replace(slot.plan, partitions=left)
                slot.gone |= {partition}
                self._tell(f"{partition[0]}[{partition[1]}] is gone: lane {slot.plan.lane} goes on without it")

    def _renew(self, slot: LaneSlot) -> None:
        """Have a lane stop at its next commit, to start again from there with the slot's plan."""
        if not slot.renewing:
            slot.renewing = True
            slot.actor.stop.remote()

    def _tend(self) -> None:
        """Start what should run, restart what failed, refresh what they say."""
        import ray

        for slot in self._slots:
            if slot.finished:
                continue
            if slot.actor is None and slot.plan.partitions and time.monotonic() >= slot.retry_at_s:
                self._start_lane(slot)
            elif slot.actor is not None:
                done, _ = ray.wait([slot.run_ref], timeout=0)
                if done:
                    self._lane_ended(slot)
                elif self._stalled(slot):  # also one that is being renewed
                    self._fail(slot, f"no barrier for {self._settings.lanes.stall_s:.0f} s")
                elif self._is_old(slot):
                    self._renew(slot)
        self._refresh()

    def _start_lane(self, slot: LaneSlot) -> None:
        from .lane import start_lane

        if slot.to_recover and not self._recover(slot):
            return
        slot.actor = start_lane(slot.plan)
        slot.run_ref = slot.actor.run.remote()
        slot.started_s = time.monotonic()

    def _refresh(self) -> None:
        """Take what lanes say of themselves; one that still owes an answer is not asked again."""
        import ray

        for slot in self._slots:
            if slot.actor is not None and slot.status_ref is None:
                slot.status_ref, slot.asked_s = slot.actor.status.remote(), time.monotonic()
        asked = {slot.status_ref: slot for slot in self._slots if slot.status_ref is not None}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_S) if asked else ([], [])
        for ref, slot in asked.items():
            if ref in ready:
                self._take_status(slot)
            else:
                slot.silent_s = time.monotonic() - slot.asked_s

    def _take_status(self, slot: LaneSlot) -> None:
        import ray
        from ray.exceptions import RayError

        ref, slot.status_ref, slot.silent_s = slot.status_ref, None, 0.0
        try:
            status: LaneStatus | None = ray.get(ref)
        except RayError:
            return  # it has died; its run_ref tells why
        if status is not None:
            if status.got_further_than(slot.status):
                slot.restarts = 0
            slot.status = status

    def _is_old(self, slot: LaneSlot) -> bool:
        limit = self._settings.lanes.renew_after_segments
        return slot.status is not None and slot.status.segments >= limit

    def _stalled(self, slot: LaneSlot) -> bool:
        stall_s = self._settings.lanes.stall_s
        if slot.status is None or slot.status.epoch == 0:
            return time.monotonic() - slot.started_s > max(START_LIMIT_S, 2 * stall_s)
        # Barriers flow among the rows: while rows arrive it is slow, and not stuck.
        return min(slot.status.last_barrier_s, slot.status.idle_s) + slot.silent_s > stall_s

    def _lane_ended(self, slot: LaneSlot) -> None:
        import ray
        from ray.exceptions import RayError

        from .poison import step_of

        try:
            status: LaneStatus = ray.get(slot.run_ref)
        except TopicAnewError as e:
            # Restarted until the new topic has come as far as the old one, it would leave out all that lies before.
            self._take_down(slot, blamed="lane")
            raise TopicAnewError(
                f"lane {slot.plan.lane} cannot go on: {root_cause(e)} What was committed is safe."
            ) from e
        except RayError as e:
            # What the commit or the source says of itself is no record's doing. Ray's error is of its cause's class.
            is_lanes_own = isinstance(e, CommitError | CheckpointError | SourceError | OrderError)
            self._fail(slot, root_cause(e), blamed="lane" if is_lanes_own else step_of(e))
            return
        if status.finished:
            slot.finished, slot.status = True, status
            self._take_down(slot)
            return
        if not slot.renewing:
            self._fail(slot, "it ended by itself")
            return
        slot.status = status
        slot.renewals += 1
        self._take_down(slot, blamed="renewal")
        logger.info("lane_renewed lane=%d epoch=%d segments=%d", slot.plan.lane, status.epoch, status.segments)

    def _fail(self, slot: LaneSlot, reason: str, blamed: str | None = None) -> None:
        """Take a failed lane down and have it start again from its last checkpoint.

        Args:
            slot: The lane.
            reason: Of the failure, for people.
            blamed: The step that it came from, for the count of what its records did; None where it is unclear.

        Raises:
            StormlineError: If it failed too often in a row.
        """
        self._take_down(slot, blamed)
        self._back_off(slot, reason)

    def _back_off(self, slot: LaneSlot, reason: str) -> None:
        lanes = self._settings.lanes
        slot.last_error = reason
        slot.restarts += 1
        slot.total_restarts += 1
        if slot.restarts > lanes.max_restarts:
            raise StormlineError(
                f"lane {slot.plan.lane} failed {slot.restarts} times without a commit between; last: {reason}. "
                "What was committed is safe: mend the cause and run again."
            )
        # At once where it had committed meanwhile: what killed it is over, as a rule.
        first_s = lanes.restart_backoff_s
        wait_s = 0.0 if slot.restarts == 1 else doubled_wait_s(first_s, slot.restarts - 2, MAX_BACKOFF_S)
        slot.retry_at_s = time.monotonic() + wait_s
        soon = f"in {wait_s:.0f} s" if wait_s else "at once"
        self._tell(f"lane {slot.plan.lane} failed ({reason}); restart from its checkpoint {soon}")

    def _take_down(self, slot: LaneSlot, blamed: str | None = None) -> None:
        """End a lane's actor; its next life begins with its newest checkpoint, and with what its marks tell."""
        import ray

        ray.kill(slot.actor)
        if slot.status is not None:
            slot.done.append(slot.status)
        slot.actor, slot.run_ref, slot.status, slot.renewing = None, None, None, False
        slot.status_ref, slot.silent_s = None, 0.0
        slot.to_recover, slot.blamed = True, blamed

    def _recover(self, slot: LaneSlot) -> bool:
        """Plan a lane's next life from its newest checkpoint; tell whether the disk let us, which may be full."""
        from .recovery import recover_lane

        plan = slot.plan
        assert self._suspects is not None  # a lane was planned
        try:
            start = recover_lane(
                plan.start.root, plan.lane, lanes=plan.start.lanes, partitions=plan.partitions, identity=plan.identity
            )
            next_offsets = {(p.topic, p.partition): p.next_offset for p in start.positions}
            self._tell_set_aside(self._suspects.take_marks(plan.lane, next_offsets, slot.blamed))
        except (CommitError, OSError) as error:
            self._back_off(slot, str(error))
            return False
        slot.plan = replace(plan, start=start, suspects=self._suspects.of(plan.partitions))
        slot.to_recover = False
        return True

    def _tell_set_aside(self, suspects: list[Suspect]) -> None:
        for s in suspects:
            where = f"{s.topic}[{s.partition}]@{s.offset} of stream {s.stream_id}"
            self._tell(
                f"{where} is set aside, see dead_letters: the process that was to {s.step} it died {s.deaths} times"
            )

    def _forget_marks(self, slot: LaneSlot) -> None:
        """Remove the marks of a lane that was ended on purpose: what its workers had in hand is innocent."""
        if self._suspects is not None:
            self._suspects.forget(slot.plan.lane)

    def _stop_lanes(self) -> None:
        import ray
        from ray.exceptions import RayError

        running = []
        for slot in self._slots:
            if slot.status is not None and slot.status.segments:
                running += [slot] if slot.actor is not None else []
            elif slot.actor is not None:
                ray.kill(slot.actor)  # it has taken nothing yet, so there is nothing to finish
                self._forget_marks(slot)
        if not running:
            return
        self._tell("stopping: the lanes finish what they have begun")
        for slot in running:
            slot.actor.stop.remote()
        done, _ = ray.wait([s.run_ref for s in running], num_returns=len(running), timeout=STOP_WAIT_S)
        for slot in running:
            if slot.run_ref in done:
                try:
                    slot.status = ray.get(slot.run_ref)
                    self._forget_marks(slot)
                except RayError as e:
                    self._tell(f"lane {slot.plan.lane} failed while stopping ({root_cause(e)}); its checkpoint stands")
            else:
                self._tell(f"lane {slot.plan.lane} did not stop in {STOP_WAIT_S:.0f} s; its checkpoint stands")
            ray.kill(slot.actor)

    def status(self) -> RunStatus:
        """Return all lanes' counts together."""
        now = [slot.status for slot in self._slots if slot.status is not None]
        ever = now + [status for slot in self._slots for status in slot.done]
        lags = [s.lag_records for s in now]
        # One that is between two lives may have anything before it.
        unknown = any(slot.status is None and slot.plan.partitions and not slot.finished for slot in self._slots)

        def total(name: str) -> int:
            return sum(getattr(s, name) for s in ever)

        return RunStatus(
            phase=self._phase,
            lanes=len(self._slots),
            lanes_up=sum(s.lag_records != -1 or s.epoch > 0 for s in now)
            + sum(slot.actor is None and not slot.plan.partitions for slot in self._slots),
            restarts=sum(slot.total_restarts for slot in self._slots),
            renewals=sum(slot.renewals for slot in self._slots),
            segments=total("segments"),
            frames=total("frames"),
            sampled=total("sampled"),
            chunks=total("chunks"),
            results=total("results"),
            dead_letters=total("dead_letters"),
            duplicates=total("duplicates"),
            skipped=total("skipped"),
            lag_records=-1 if unknown or not lags or min(lags) < 0 else sum(lags),
            lag_s=-1.0 if unknown or any(s.lag_s < 0 for s in now) else max((s.lag_s for s in now), default=-1.0),
            commit_p50_ms=max((s.commit_p50_ms for s in now), default=0.0),
            commit_p95_ms=max((s.commit_p95_ms for s in now), default=0.0),
            idle_s=0.0 if unknown else min((s.idle_s for s in now), default=0.0),
            model_name=self._model.name if self._model else "",
            model_trained=self._model.trained if self._model else False,
            newest=tuple(r for s in now for r in s.newest),
            n_bytes=total("n_bytes"),
            next_offsets={p: offset for s in reversed(ever) for p, offset in s.next_offsets.items()},
            busy_s={step: sum(s.busy_s.get(step, 0.0) for s in ever) for s in ever for step in s.busy_s},
        )


def run_identity(settings: Settings, model: ModelDescription) -> dict[str, Any]:
    """Return what must stay the same for a checkpoint to be gone on from."""
    from .tables import SCHEMA_VERSION

    return {
        "model": model.fingerprint,
        "sampling.fps": str(settings.sampling.fps),
        "sampling.max_hold_s": settings.sampling.max_hold_s,
        "chunk_frames": model.chunk_frames,
        "frame_hw": list(model.frame_hw),
        "tables.schema_version": SCHEMA_VERSION,
    }


def root_cause(error: BaseException) -> str:
    """Return the innermost cause of a Ray error in one line."""
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None and inner is not cause:
        cause = inner
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    # Our own errors begin with what happened, and Ray Data adds advice; elsewhere a traceback may come first.
    at = 0 if isinstance(cause, StormlineError) else -1
    text = lines[at].strip() if lines else ""
    return text if text.startswith(type(cause).__name__) else f"{type(cause).__name__}: {text}"
