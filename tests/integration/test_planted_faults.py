"""The comparison of `tests/chaos` sees what it is for: each way to break the protocol is planted, and found.

A lane in this process, wired by the product's own code: the source over the real broker, the real steps one after the
other, the real commits. It dies at fixed places, and its next life begins with what recovery finds. Only the LLM is
left out: an answer here is a digest of all that it would have been shown.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable
from contextlib import closing

import pytest
from chaos.compare import differences, row_counts
from chaos.feed import BARE, endless, publish_once, send
from kafka import KafkaProducer

from stormline.infra.broker import EmbeddedBroker
from stormline.models import selection
from stormline.models.loading import load_model
from stormline.models.prompts import VideoAnswer
from stormline.operators import encode as encode_step
from stormline.operators.errors import CheckpointError, TopicAnewError
from stormline.operators.rows import Barrier, block_of, rows_of
from stormline.pipeline import kafka_source, lane_source, parquet_sink, recovery
from stormline.pipeline import lane as lane_module
from stormline.pipeline.lane import LaneCommitter, LanePlan, iter_rows, lane_dataset
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.query_registry import QueryRegistry
from stormline.pipeline.recovery import recover
from stormline.pipeline.settings import load_settings

TOPIC, PARTITIONS, RECORDS = "planted", 3, 36
MAX_ROWS = 1_000  # of a life, barriers included
# Of each life: barriers so many looks at the clock apart, how many segments until it shall die, and after which step
# of the commit that follows; None for the last one. An epoch that is undone is longer than those that replace it.
LIVES = ((4, 6, 3), (12, 4, 2), (3, 5, 1), (12, 5, 3), (3, 7, 4), (12, 6, 2), (4, None, None))
QUERIES = "queries=[{id: caption, window_s: 3}, {id: scene, scenes: true}]"


class CrashError(Exception):
    pass


class InProcess:
    """A dataset whose steps run here, one after the other."""

    def __init__(self, source, steps):
        self._read = source.get_read_tasks(1)[0]
        self._steps = [step() for step in steps.values()]

    def iter_batches(self, **_):
        with closing(self._read()) as blocks, asyncio.Runner() as runner:
            for block in itertools.chain.from_iterable(map(one_by_one, blocks)):
                yield from self._through(runner, block, 0)

    def _through(self, runner, block, at):
        if at == len(self._steps):
            yield block
            return
        for out in called(runner, self._steps[at], block):
            yield from self._through(runner, out, at + 1)


def one_by_one(block):
    return [block_of([row]) for row in rows_of(block)]


def called(runner, step, block):
    out = step(block)
    if hasattr(out, "__aiter__"):

        async def gathered():
            return [each async for each in out]

        return runner.run(gathered())
    return out if hasattr(out, "__next__") else [out]


class Clock:
    """Goes on by one at each look, so that a barrier comes every so many records."""

    def __init__(self):
        self.now_s = 0

    def monotonic(self):
        self.now_s += 1
        return self.now_s

    def time_ns(self):
        return 0


async def digest(prompt):
    shown = hashlib.sha256(prompt.text.encode())
    for chunk in prompt.chunks:
        shown.update(f"{chunk.start_s} {chunk.end_s}".encode() + chunk.tokens.tobytes())
    return VideoAnswer(shown.hexdigest(), 0, sum(len(c.tokens) for c in prompt.chunks), 0, "stop")


@pytest.fixture(scope="module")
def topic():
    """Yield the address of a broker whose topic has all the records."""
    with EmbeddedBroker() as broker:
        published = publish_once(broker.bootstrap_servers, streams=("ring", "yard", BARE))
        broker.create_topic(TOPIC, partitions=PARTITIONS)
        producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
        for record in itertools.islice(endless(published, PARTITIONS), RECORDS):
            send(producer, TOPIC, record)
        producer.close()
        yield broker.bootstrap_servers


@pytest.fixture(scope="module")
def loaded():
    return load_model(None, device="cpu")


@pytest.fixture
def run(topic, loaded, monkeypatch):
    """Return a function that runs lives over all records into a folder."""
    monkeypatch.setattr(lane_module, "build_dataset", InProcess)
    monkeypatch.setattr(lane_module, "actor_step", lambda cls, kwargs, **_: lambda: cls(**kwargs))
    monkeypatch.setattr(lane_module, "LoadFromSettings", lambda model: lambda: loaded)
    monkeypatch.setattr(lane_module, "LlmClient", lambda timeout_s, at_once: digest)
    monkeypatch.setattr(lane_module, "StoreClient", lambda: lambda news: None)
    clock = Clock()
    monkeypatch.setattr(kafka_source, "time", clock)
    monkeypatch.setattr(lane_source, "time", clock)

    def run(root, lives):
        partitions = tuple((TOPIC, p) for p in range(PARTITIONS))
        size = loaded.model.config.image_size
        for barriers, segments, step in lives:
            settings = load_settings(
                None, [f"kafka.bootstrap_servers={topic}", f"lanes.barrier_interval_s={barriers}", QUERIES]
            )
            QueryRegistry(root).take_settings(settings.queries)
            start = recover(root, lanes=1, identity={}).for_lane(0, partitions)
            plan = LanePlan(0, settings, "tiny", (size, size), {}, partitions, start)
            if live(plan, segments, step):
                return
        raise AssertionError("the last life died too")

    return run


def live(plan, segments, step):
    """Run one life until its death, or the end of all records; tell whether it got there."""
    taken = 0

    class Dying(EpochWriter):
        def step_done(self, number):
            if segments is not None and taken >= segments and number == step:
                raise CrashError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane_module, "EpochWriter", Dying)
        committer = LaneCommitter(plan, lambda offsets: None)
        rows = iter_rows(lane_dataset(plan, n_taken=int))  # only files ask how far the lane is
        try:
            for row in itertools.islice(rows, MAX_ROWS):
                barrier = committer.take(row)
                taken += barrier is None
                if barrier is not None and sum(p.next_offset for p in barrier.positions) >= RECORDS:
                    return True
        except CrashError:
            return False
        finally:
            rows.close()
    raise AssertionError("the rows ended before the records")


@pytest.fixture(scope="module")
def peace(topic, loaded, tmp_path_factory):
    return tmp_path_factory.mktemp("peace")


@pytest.fixture
def undisturbed(run, peace):
    """Return the folder of a run in which nothing died."""
    if not (peace / "tokens").exists():
        run(peace, [(6, None, None)])
    return peace


def test_lane_when_it_dies_again_and_again_then_the_tables_are_those_of_a_run_in_peace(run, undisturbed, tmp_path):
    run(tmp_path, LIVES)

    assert differences(tmp_path, undisturbed) == []
    assert all(n_rows >= 4 for n_rows in row_counts(undisturbed).values())


def steps(*names) -> Callable:
    return lambda patch: patch.setattr(EpochWriter, "STEPS", names)


def forget(step) -> Callable:
    """One step begins anew in each life."""

    def plant(patch):
        real, cls = lane_module.LaneStart.load_snapshots, lane_module.LaneStart
        patch.setattr(cls, "load_snapshots", lambda self: {k: v for k, v in real(self).items() if k.step != step})

    return plant


def encoder_forgets_unseen(patch):
    """As it is refused below; but the chunks that begin anew, before those that were there, reach the answer."""
    forget(encode_step.STEP_NAME)(patch)
    patch.setattr(selection, "_check_chunks", lambda chunks: None)


def shifted(by) -> Callable:
    """A life begins that many records after, or before, the one that it should begin with."""

    def moved(**kwargs):
        offsets = {p: max(0, offset + by) for p, offset in kwargs["next_offsets"].items()}
        return kafka_source.SourcePlan(**kwargs | {"next_offsets": offsets})

    return lambda patch: patch.setattr(lane_module, "SourcePlan", moved)


def one_too_far_unseen(patch):
    """As it is refused below, where a partition ends before; but nobody looks where it ends."""
    shifted(1)(patch)
    patch.setattr(kafka_source, "_check_ends", lambda kafka, ends, next_offsets: None)


def stale_states(patch):
    """Each commit writes the states of the one before."""
    real, before = parquet_sink.write_states, {}

    def write_states(root, lane, epoch, snapshots, known=()):
        written = real(root, lane, epoch, before.get(root, {}), ())
        before[root] = snapshots
        return written

    patch.setattr(parquet_sink, "write_states", write_states)


def keep_what_never_happened(patch):
    patch.setattr(recovery._Record, "clean", lambda self, lanes: 0)


def late_snapshot(patch):
    """The encoder's snapshot has one row more than the barrier stands for."""

    class Late(encode_step.Encode):
        held = None

        def _handle(self, row):
            out = [super()._handle(row)] if row.kind != Barrier.KIND else []
            if self.held is not None:
                out.insert(0, super()._handle(self.held))
            self.held = row if row.kind == Barrier.KIND else None
            return out

        def __call__(self, table):
            for arrived in rows_of(table):
                for row in self._order.push(arrived.lane_seq, arrived):
                    yield from (block_of([out]) for out in self._handle(row))

    patch.setattr(lane_module, "Encode", Late)


FAULTS = {
    "the manifest before the tables have their names": steps(
        "write_tables", "write_manifest", "publish_tables", "write_states"
    ),
    "tables never get their names": steps("write_tables", "write_states", "write_manifest"),
    "no state files": steps("write_tables", "publish_tables", "write_manifest"),
    "stale state files": stale_states,
    "the source forgets": forget(kafka_source.STEP_NAME),
    "the encoder forgets": encoder_forgets_unseen,
    "annotate forgets": forget(lane_module.annotate_step.STEP_NAME),
    "one record too far": one_too_far_unseen,
    "what never happened is kept": keep_what_never_happened,
    "a snapshot one row late": late_snapshot,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_protocol_when_broken_then_the_comparison_finds_it(fault, run, undisturbed, tmp_path, monkeypatch):
    FAULTS[fault](monkeypatch)

    run(tmp_path, LIVES)

    assert differences(tmp_path, undisturbed) != []


def test_protocol_when_the_encoder_forgets_then_a_window_whose_chunks_go_back_is_refused(run, tmp_path, monkeypatch):
    forget(encode_step.STEP_NAME)(monkeypatch)

    with pytest.raises(ValueError, match="expected them in time order"):
        run(tmp_path, LIVES)


def test_protocol_when_a_lane_goes_on_past_a_partitions_end_then_it_is_refused(run, tmp_path, monkeypatch):
    shifted(1)(monkeypatch)

    with pytest.raises(TopicAnewError, match=r"planted\[\d\]: reading goes on at offset \d+, but .* ends at \d+"):
        run(tmp_path, LIVES)


def test_protocol_when_a_lane_goes_on_one_record_too_early_then_its_first_commit_is_refused(run, tmp_path, monkeypatch):
    shifted(-1)(monkeypatch)

    with pytest.raises(CheckpointError, match=r"planted\[\d\]@\d+ is before \d+"):
        run(tmp_path, LIVES)
