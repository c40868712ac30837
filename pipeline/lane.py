"""A lane: one ordered Ray Data execution that never ends, from its Kafka partitions to its committed epochs.

    source ─▶ decode (actor pool, ordered) ─▶ encode (one actor) ─▶ annotate (one actor, async) ─▶ commit (here)

Ray Data is built for work that ends; what makes it run for ever, row by row, is in `endless_dataset`.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.data import DataContext, Dataset

from ..operators import annotate as annotate_step
from ..operators import encode as encode_step
from ..operators.annotate import Annotate, Ask
from ..operators.decode import Decode
from ..operators.encode import Encode
from ..operators.errors import OrderError
from ..operators.in_hand import Suspect
from ..operators.rows import AnnotatedSegment, Barrier, Chunk, DeadLetter, Result, Row, rows_of
from ..operators.sampling import GridSpec
from ..operators.scenes import SceneSpec
from . import kafka_source
from .archive.asking import AskTogether
from .archive.source import LaneRows, Pace, open_source
from .checkpoint import LaneStart
from .endless_dataset import EXECUTOR_TURN_S, FILES_TURN_S, actor_step, build_dataset, lane_context
from .kafka_source import KafkaSource, SourcePlan
from .lane_metrics import LaneMetrics
from .parquet_sink import EpochWriter
from .poison import marks_folder
from .query_registry import QueryRegistry
from .serving import LlmClient, StoreClient
from .settings import ModelSettings, Settings

if TYPE_CHECKING:
    from ..models.loading import LoadedModel
    from .archive.feed import ArchivePlan

logger = logging.getLogger(__name__)

FILE_ROWS_AHEAD = 24  # ranges of files under way beyond what decodes: windows to be asked about together
ASK_WAIT_S = 3.0  # that a question about a file waits for others, to be answered together
LATENCY_SAMPLES = 4096  # of the newest committed records, for percentiles
# Logical CPUs of the parts of a lane, for Ray's scheduling: small, because a lane's parts wait for each other, and
# because Ray would otherwise leave a part unscheduled on a small machine. With the source and two decoders they sum
# up to 1.
DECODE_CPUS, ENCODE_CPUS, ANNOTATE_CPUS, LANE_CPUS = 0.2, 0.25, 0.1, 0.1


@dataclass(frozen=True)
class LanePlan:
    """Everything that one lane needs to start, or to start again."""

    lane: int
    settings: Settings
    model_name: str
    frame_hw: tuple[int, int]
    identity: Mapping[str, Any]  # what a checkpoint must agree with
    partitions: tuple[tuple[str, int], ...]
    start: LaneStart  # from recovery: positions and states that belong together
    new_partitions: frozenset[tuple[str, int]] = frozenset()  # of `partitions`, those found while running
    suspects: tuple[Suspect, ...] = ()  # records that processes died of, or while at them
    archive: ArchivePlan | None = None  # files to read instead of Kafka


@dataclass(frozen=True)
class LaneStatus:
    """What a lane has done since it started, and how far behind it is."""

    lane: int
    epoch: int = 0  # newest committed; 0 for none
    segments: int = 0
    committed: int = 0  # of the segments
    frames: int = 0  # good ones that came, needed or not
    sampled: int = 0
    chunks: int = 0
    results: int = 0
    dead_letters: int = 0
    duplicates: int = 0
    skipped: int = 0  # records that were too old; see `lag:` of the settings
    lag_records: int = -1  # behind the ends of its partitions at the newest barrier; -1 where unknown
    lag_s: float = -1.0  # age of what is committed: all that was appended so long ago and before; -1 where unknown
    commit_p50_ms: float = 0.0  # from a record's Kafka timestamp to its committed row
    commit_p95_ms: float = 0.0
    last_barrier_s: float = 0.0  # age of the newest barrier
    idle_s: float = 0.0  # since the newest row that was not a barrier
    newest: tuple[Result, ...] = ()  # results of the newest epochs, for a live view
    finished: bool = False  # the source has ended, and everything is committed
    n_bytes: int = 0  # of media
    next_offsets: Mapping[tuple[str, int], int] = field(default_factory=dict)  # as committed
    busy_s: Mapping[str, float] = field(default_factory=dict)  # by step, of all its workers together

    def got_further_than(self, before: LaneStatus | None) -> bool:
        """Whether the lane has come further in this life, or has nothing left to stumble over.

        Its first epoch alone shows neither: every life begins with a barrier, and commits that.
        """
        committed_before = before.committed if before else 0
        return self.committed > committed_before or (self.epoch > 0 and self.lag_records == 0)


@dataclass(frozen=True)
class LoadFromSettings:
    """Load the model where the encoder runs; picklable."""

    model: ModelSettings

    def __call__(self) -> LoadedModel:
        """Return the model."""
        from ..models.loading import load_model

        return load_model(self.model.path, device=self.model.device, dtype=self.model.dtype)


def grid_of(settings: Settings) -> GridSpec:
    """Return the sampling grid that the settings name."""
    return GridSpec(settings.sampling.fps, round(settings.sampling.max_hold_s * 1e9))


def scenes_of(settings: Settings) -> SceneSpec:
    """Return how the settings tell scenes apart."""
    scenes = settings.scenes
    return SceneSpec(round(scenes.min_s * 1e9), round(scenes.max_s * 1e9), scenes.sensitivity)


def lane_dataset(plan: LanePlan, n_taken: Callable[[], int]) -> Dataset:
    """Return the whole lane up to the commit; reads the states that it starts from.

    Args:
        plan: The lane.
        n_taken: Tells the source, which runs elsewhere, how many rows the lane has taken to its end.
    """
    settings = plan.settings
    states = plan.start.load_snapshots()

    def snapshots_of(step: str) -> dict[tuple[str, int], bytes]:
        return {(key.topic, key.partition): blob for key, blob in states.items() if key.step == step}

    lanes = settings.lanes
    marks = marks_folder(plan.start.root, plan.lane)
    grid = grid_of(settings)
    if plan.archive is not None:
        source = open_source(
            plan.archive,
            plan.partitions,
            plan.start.positions,
            barrier_interval_s=lanes.barrier_interval_s,
            pace=Pace(n_taken, max_ahead=lanes.decode_workers * 2 + FILE_ROWS_AHEAD),
        )
    else:
        source = KafkaSource(
            SourcePlan(
                kafka=settings.kafka,
                partitions=plan.partitions,
                next_offsets={(p.topic, p.partition): p.next_offset for p in plan.start.positions},
                snapshots=snapshots_of(kafka_source.STEP_NAME),
                barrier_interval_s=lanes.barrier_interval_s,
                new_partitions=plan.new_partitions,
                lag=tuple(settings.lag),
                session_idle_s=lanes.session_idle_s,
            )
        )
    decode = {
        "fps": settings.sampling.fps,
        "frame_hw": plan.frame_hw,
        "max_hold_s": settings.sampling.max_hold_s,
        "dead_letter_bytes": settings.output.dead_letter_bytes,
        "picture_interval_s": lanes.picture_interval_s,
        "limit_s": lanes.longest_decode_s,
        "memory_bytes": lanes.decode_memory_bytes,
        "marks": marks,
        "suspects": plan.suspects,
    }
    encode = {
        "load": LoadFromSettings(settings.model),
        "grid": grid,
        "threads": lanes.encode_threads,
        "on_news": StoreClient(),
        "snapshots": snapshots_of(encode_step.STEP_NAME),
        "marks": marks,
    }
    # Twice what is written at once: a next answer waits at the model when one ends.
    ask: Ask = LlmClient(settings.llm.timeout_s, at_once=2 * settings.llm.max_batch_size * settings.llm.replicas)
    if plan.archive is not None:
        ask = AskTogether(ask, settings.llm.max_batch_size, ASK_WAIT_S)
    annotate = {
        "read_queries": QueryRegistry(plan.start.root).for_lanes,
        "ask": ask,
        "model_name": plan.model_name,
        "scenes": scenes_of(settings),
        "snapshots": snapshots_of(annotate_step.STEP_NAME),
    }
    return build_dataset(
        source,
        {
            "decode": actor_step(Decode, decode, size=lanes.decode_workers, num_cpus=DECODE_CPUS),
            "encode": actor_step(Encode, encode, num_cpus=ENCODE_CPUS, num_gpus=settings.ray.encode_num_gpus),
            "annotate": actor_step(Annotate, annotate, calls=lanes.max_rows_in_flight, num_cpus=ANNOTATE_CPUS),
        },
    )


def iter_rows(dataset: Dataset) -> Iterator[Row]:
    """Yield the lane's rows as they come, checking that none is missing.

    Raises:
        OrderError: If a row is missing or out of order.
    """
    next_seq = 0
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in rows_of(table):
            if row.lane_seq != next_seq:
                raise OrderError(f"commit got row {row.lane_seq}, expected {next_seq}: the lane restarts")
            next_seq += 1
            yield row


class LaneCommitter:
    """Gather a lane's rows between barriers and commit them together with state and offsets.

    This is the whole of exactly-once: when a barrier arrives, everything before it has arrived, and it carries the
    offsets and every step's state as they were at its place in the flow.
    """

    def __init__(self, plan: LanePlan, report_offsets: Callable[[Mapping[tuple[str, int], int]], None]):
        self._keep_tokens = plan.settings.output.keep_tokens
        self._writer = EpochWriter(plan.start, model=plan.model_name, identity=plan.identity)
        self._report_offsets = report_offsets
        self._chunks: list[Chunk] = []
        self._results: list[Result] = []
        self._dead_letters: list[DeadLetter] = []
        self._append_ns: list[int] = []
        self._latencies_ms: deque[float] = deque(maxlen=LATENCY_SAMPLES)
        self._newest: deque[Result] = deque(maxlen=64)
        self._last_row_s = time.monotonic()
        self.last_barrier_s = time.monotonic()
        self._until_ns = 0  # what was appended up to then is committed; 0 where unknown
        self._metrics = LaneMetrics(plan.lane)
        self._status = LaneStatus(plan.lane)

    def take(self, row: Row) -> Barrier | None:
        """Take one row; commits and returns the barrier where it was one."""
        if row.kind == Barrier.KIND:
            barrier = Barrier.from_row(row)
            self._commit(barrier)
            return barrier
        annotated = AnnotatedSegment.from_row(row)
        encoded = annotated.encoded
        # Chunks and dead letters are views into the row's block, which stays alive until the epoch is written.
        self._chunks += encoded.chunks
        self._results += annotated.results
        self._dead_letters += encoded.dead_letters
        self._append_ns.append(encoded.meta.append_ns)
        self._last_row_s = time.monotonic()
        s = self._status
        self._status = replace(
            s,
            n_bytes=s.n_bytes + encoded.meta.n_bytes,
            segments=s.segments + 1,
            frames=s.frames + encoded.n_frames,
            sampled=s.sampled + encoded.n_sampled,
        )
        return None

    def _commit(self, barrier: Barrier) -> None:
        self._dead_letters += barrier.dead_letters
        report = self._writer.commit(
            chunks=self._chunks if self._keep_tokens else (),
            results=self._results,
            dead_letters=self._dead_letters,
            positions=barrier.positions,
            snapshots=barrier.snapshots,
        )
        if not report.skipped:
            next_offsets = {(p.topic, p.partition): p.next_offset for p in barrier.positions}
            self._report_offsets(next_offsets)
            self._committed(report.epoch, next_offsets)
        lags = [p.lag for p in barrier.positions]
        self.last_barrier_s = time.monotonic()
        self._until_ns = min((p.until_ns for p in barrier.positions), default=barrier.made_ns)
        self._status = replace(
            self._status,
            lag_records=-1 if any(lag < 0 for lag in lags) else sum(lags),
            duplicates=barrier.counters.get("duplicates", 0),
            skipped=barrier.counters.get("skipped", 0),
            busy_s=barrier.busy_s,
            finished=barrier.final,
        )
        self._metrics.tell(barrier, self._lag_s())

    def _lag_s(self) -> float:
        return max(0.0, (time.time_ns() - self._until_ns) / 1e9) if self._until_ns else -1.0

    def _committed(self, epoch: int, next_offsets: Mapping[tuple[str, int], int]) -> None:
        now_ns = time.time_ns()
        self._latencies_ms += [(now_ns - append_ns) / 1e6 for append_ns in self._append_ns]
        self._newest += self._results
        s = self._status
        self._status = replace(
            s,
            epoch=epoch,
            committed=s.committed + len(self._append_ns),
            next_offsets=next_offsets,
            chunks=s.chunks + len(self._chunks),
            results=s.results + len(self._results),
            dead_letters=s.dead_letters + len(self._dead_letters),
        )
        self._chunks, self._results, self._dead_letters, self._append_ns = [], [], [], []

    def status(self) -> LaneStatus:
        """Return the counts so far; safe to call from another thread."""
        latencies = list(self._latencies_ms)
        cuts = statistics.quantiles(latencies, n=20) if len(latencies) > 1 else [0.0] * 19
        now_s = time.monotonic()
        return replace(
            self._status,
            lag_s=self._lag_s(),
            commit_p50_ms=cuts[9],
            commit_p95_ms=cuts[18],
            last_barrier_s=now_s - self.last_barrier_s,
            idle_s=now_s - self._last_row_s,
            newest=tuple(self._newest),
        )


def start_lane(plan: LanePlan) -> Any:
    """Start a lane's actor; it is never restarted on its own, and answers while it runs."""
    return ray.remote(Lane).options(num_cpus=LANE_CPUS, max_restarts=0, max_concurrency=4).remote(plan)


class Lane:
    """A lane as a Ray actor: `run` until told to stop; `stop` and `status` answer meanwhile."""

    def __init__(self, plan: LanePlan):
        self._plan = plan
        self._stopping = False
        self._committer: LaneCommitter | None = None
        self._n_taken = 0

    def run(self) -> LaneStatus:
        """Run until `stop`, or until the source ends; whatever goes wrong in any part of the lane raises here."""
        lane_context(DataContext.get_current(), EXECUTOR_TURN_S if self._plan.archive is None else FILES_TURN_S)
        n_taken = LaneRows(ray.get_runtime_context().current_actor)
        with self._offset_reporter() as report:
            self._committer = LaneCommitter(self._plan, report)
            for row in iter_rows(lane_dataset(self._plan, n_taken)):
                barrier = self._committer.take(row)
                self._n_taken += 1
                # At a barrier everything taken is committed; leaving the loop ends the read task and the actors.
                if barrier is not None and (self._stopping or barrier.final):
                    break
        return self._committer.status()

    def _offset_reporter(self) -> AbstractContextManager[Callable[[Mapping[tuple[str, int], int]], None]]:
        from .offset_reporter import OffsetReporter

        if self._plan.archive is not None:
            return nullcontext(lambda next_offsets: None)
        return OffsetReporter(self._plan.settings.kafka)

    def n_taken(self) -> int:
        """Return how many rows have come through the whole lane."""
        return self._n_taken

    def stop(self) -> None:
        """Ask `run` to return after the next commit."""
        self._stopping = True

    def status(self) -> LaneStatus | None:
        """Return the counts, or None before the lane has started."""
        return self._committer.status() if self._committer else None
