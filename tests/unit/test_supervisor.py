"""What the supervisor does about a lane that failed, as far as that needs no Ray."""

import errno
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayTaskError

from stormline.operators.errors import CommitError, SourceError, StormlineError, TopicAnewError
from stormline.pipeline import kafka_source, partition_watch
from stormline.pipeline import lane as lane_module
from stormline.pipeline import supervisor as supervisor_module
from stormline.pipeline.checkpoint import lane_folder
from stormline.pipeline.embedded_ray import embedded_ray
from stormline.pipeline.kafka_source import TopicsThere
from stormline.pipeline.lane import LaneCommitter, LanePlan
from stormline.pipeline.poison import SuspectList
from stormline.pipeline.recovery import recover
from stormline.pipeline.settings import Settings, load_settings
from stormline.pipeline.supervisor import LaneSlot, Supervisor, root_cause

PARTITIONS = (("video", 0),)


@pytest.fixture
def failed(tmp_path):
    """Return a supervisor of one lane that has failed, and what it says."""
    told = []
    settings = load_settings(None, [f"output.path={tmp_path}", "lanes.restart_backoff_s=1e-9", "lanes.max_restarts=3"])
    supervisor = Supervisor(settings, told.append)
    start = recover(tmp_path, lanes=1, identity={}).for_lane(0, PARTITIONS)
    slot = LaneSlot(LanePlan(0, settings, "m", (64, 64), {}, PARTITIONS, start), to_recover=True)
    supervisor._slots.append(slot)
    supervisor._suspects = SuspectList(tmp_path)
    return supervisor, slot, told


def tend_on_a_full_disk(supervisor, root):
    (lane_folder(root, 0) / ".owner.tmp").symlink_to("/dev/full")  # a draft that cannot be written is removed
    supervisor._tend()


def test_lane_when_the_disk_is_full_as_it_restarts_then_it_waits_and_tries_again(failed, tmp_path, monkeypatch):
    supervisor, slot, told = failed
    started = []
    monkeypatch.setattr(lane_module, "start_lane", lambda plan: started.append(plan) or pytest.fail("started"))

    tend_on_a_full_disk(supervisor, tmp_path)
    tend_on_a_full_disk(supervisor, tmp_path)

    assert (slot.actor, slot.restarts, started) == (None, 2, [])
    assert all("No space left on device" in text for text in told)
    assert supervisor._recover(slot)
    assert not slot.to_recover


def test_lane_when_its_suspects_cannot_be_written_then_it_waits_too(failed, monkeypatch):
    supervisor, slot, told = failed

    def take_marks(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "suspects.json")

    monkeypatch.setattr(supervisor._suspects, "take_marks", take_marks)

    supervisor._tend()

    assert (slot.actor, slot.restarts, slot.to_recover) == (None, 1, True)
    assert "No space left on device" in told[0]


def test_lane_when_the_disk_stays_full_then_given_up_with_the_reason(failed, tmp_path):
    supervisor, _, _ = failed
    for _ in range(3):
        tend_on_a_full_disk(supervisor, tmp_path)

    with pytest.raises(StormlineError, match=r"failed 4 times without a commit between; last: .*No space left"):
        tend_on_a_full_disk(supervisor, tmp_path)


def test_lane_when_it_fails_for_the_first_time_then_restarts_at_once_and_later_waits_longer_each_time(failed):
    supervisor, slot, told = failed
    supervisor._settings = load_settings(None, ["lanes.restart_backoff_s=5"])

    for _ in range(3):
        supervisor._back_off(slot, "it broke")

    waits = [text.partition("restart from its checkpoint ")[2] for text in told]
    assert waits == ["at once", "in 5 s", "in 10 s"]


def test_lane_when_it_has_failed_for_days_then_it_still_waits_and_tries_again(failed):
    supervisor, slot, told = failed
    supervisor._settings = load_settings(None, ["lanes.restart_backoff_s=5", "lanes.max_restarts=100000"])
    slot.restarts = 5000

    supervisor._back_off(slot, "it broke")

    assert told[-1].endswith("restart from its checkpoint in 30 s")


@pytest.mark.parametrize(
    ("epoch", "idle_s", "is_stalled"),
    [(0, 300.0, False), (1, 300.0, True), (1, 3.0, False)],
    ids=["still starting", "under way", "slow, but rows arrive"],
)
def test_lane_when_no_barrier_comes_for_long_then_stalled_unless_it_still_works(failed, epoch, idle_s, is_stalled):
    supervisor, slot, _ = failed
    slot.started_s = time.monotonic() - 300
    fresh = LaneCommitter(slot.plan, lambda offsets: None).status()
    slot.status = replace(fresh, epoch=epoch, last_barrier_s=300.0, idle_s=idle_s)

    assert supervisor._stalled(slot) == is_stalled


class StubAnswer:
    def __init__(self, answer):
        self.answer = answer


class StubActor:
    """A lane's actor; `answers` are its statuses, None for a question that it does not answer."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.n_asked = self.n_stops = 0
        self.status = SimpleNamespace(remote=self._asked)
        self.stop = SimpleNamespace(remote=self._stopped)

    def _asked(self):
        self.n_asked += 1
        return StubAnswer(self.answers.pop(0))

    def _stopped(self):
        self.n_stops += 1


@pytest.fixture
def under_way(failed, monkeypatch):
    """Return a supervisor of one lane that runs, its slot, a status and what it failed of."""
    supervisor, slot, _ = failed
    supervisor._settings = load_settings(None, ["lanes.stall_s=60"])
    fresh = LaneCommitter(slot.plan, lambda offsets: None).status()
    status = replace(fresh, epoch=9, segments=5, last_barrier_s=1.0, idle_s=1.0)
    failures = []
    monkeypatch.setattr(supervisor, "_fail", lambda slot, reason: failures.append(reason))

    def wait(refs, **kwargs):
        ready = [ref for ref in refs if getattr(ref, "answer", None) is not None]
        return ready, [ref for ref in refs if ref not in ready]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda ref: ref.answer)
    slot.run_ref, slot.status = object(), status
    return supervisor, slot, status, failures


def test_lane_when_it_is_to_be_renewed_and_is_stuck_then_it_has_failed(under_way):
    supervisor, slot, status, failures = under_way
    old = replace(status, segments=10**9)
    slot.actor = StubActor(old, replace(old, last_barrier_s=61.0, idle_s=61.0), None)

    supervisor._tend()
    supervisor._tend()
    before = (slot.actor.n_stops, list(failures))
    supervisor._tend()

    assert before == (1, [])
    assert failures == ["no barrier for 60 s"]


def test_lane_when_it_no_longer_answers_then_it_is_asked_once_and_has_failed_when_the_time_is_over(
    under_way, monkeypatch
):
    supervisor, slot, status, failures = under_way
    slot.actor = StubActor(status, None)
    now_s = [1000.0]
    monkeypatch.setattr(supervisor_module, "time", SimpleNamespace(monotonic=lambda: now_s[0]))

    failed_after = []
    for _ in range(8):
        supervisor._tend()
        failed_after.append(len(failures))
        now_s[0] += 15

    assert slot.actor.n_asked == 2
    assert failed_after == [0, 0, 0, 0, 0, 0, 1, 2]


def test_lane_when_its_answer_lay_there_while_the_supervisor_was_busy_then_it_goes_on(under_way, monkeypatch):
    supervisor, slot, status, failures = under_way
    slot.actor = StubActor(status, None, status)
    now_s = [1000.0]
    monkeypatch.setattr(supervisor_module, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    supervisor._tend()
    supervisor._tend()

    now_s[0] += 3600
    slot.status_ref.answer = status
    supervisor._tend()

    assert (failures, slot.silent_s) == ([], 0.0)


def test_ray_when_it_is_not_up_in_time_then_an_error_that_says_to_run_again(monkeypatch):
    def init(**options):
        raise Exception("The current node timed out during startup.")  # its very type

    monkeypatch.setattr(ray, "init", init)
    alone = Settings.model_validate({"ray": {"fork_workers": False}})

    with pytest.raises(StormlineError, match=r"timed out during startup.*Run again"), embedded_ray(alone, print):
        pytest.fail("it came up")


def test_partition_when_its_topic_is_deleted_then_the_lane_goes_on_without_it_and_has_it_again_when_it_is_back(failed):
    supervisor, slot, told = failed
    other = LaneSlot(replace(slot.plan, lane=1, partitions=(("cam", 0), ("cam", 1))))
    supervisor._slots.append(other)

    supervisor._let_go([("cam", 1)])
    gone = other.plan.partitions
    supervisor._adopt([("cam", 1)])

    assert (gone, other.plan.partitions) == ((("cam", 0),), (("cam", 0), ("cam", 1)))
    assert "cam[1] is gone: lane 1 goes on without it" in told


def test_lane_when_nothing_is_left_for_it_then_it_waits_for_something(failed, monkeypatch):
    supervisor, slot, _ = failed
    monkeypatch.setattr(supervisor, "_refresh", lambda: None)
    started = []
    monkeypatch.setattr(supervisor, "_start_lane", started.append)

    supervisor._let_go([("video", 0)])
    supervisor._tend()
    waiting = list(started)
    supervisor._adopt([("video", 1)])
    supervisor._tend()

    assert (waiting, started) == ([], [slot])


def test_topic_when_it_was_deleted_before_the_run_then_told_and_waited_for_and_read_from_where_it_was_left(
    tmp_path, monkeypatch
):
    told, asked = [], []
    settings = load_settings(None, [f"output.path={tmp_path}", "lanes.count=2"])
    monkeypatch.setattr(kafka_source, "check_offsets_exist", lambda kafka, next_offsets: asked.append(next_offsets))
    supervisor = Supervisor(settings, told.append)
    there = TopicsThere(settings.kafka, ("other",), ())
    start = recover(tmp_path, lanes=1, identity={}).for_lane(0, ())
    supervisor._slots.append(LaneSlot(LanePlan(0, settings, "m", (64, 64), {}, (), start)))

    supervisor._compare(there, {("video", 0): 7})
    n_up = supervisor.status().lanes_up
    supervisor._adopt([("video", 0)])

    assert asked == []
    assert told[0] == "not read any more (deleted, or not in kafka.topics): video[0]; the checkpoint stays"
    assert told[1].endswith("waiting for it")
    assert n_up == 1
    assert supervisor._slots[0].to_recover


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (CommitError("no space"), "lane"),
        (SourceError("away"), "lane"),
        (OSError("MapBatches(Decode) died"), "decode"),
        (OSError("something"), None),
    ],
)
def test_lane_when_its_own_commit_or_source_failed_then_no_record_is_blamed(failed, monkeypatch, error, blamed):
    supervisor, slot, _ = failed
    of_ray = RayTaskError("run", f"ray::Lane.run() {error}", error, "ray::Lane.run", 1, "127.0.0.1", "Lane", "abc")
    failures = []
    monkeypatch.setattr(supervisor, "_fail", lambda slot, reason, blamed: failures.append(blamed))

    def get(ref):
        raise of_ray.as_instanceof_cause()

    monkeypatch.setattr(ray, "get", get)

    supervisor._lane_ended(slot)

    assert failures == [blamed]


def test_root_cause_when_ray_data_has_added_its_advice_then_what_failed_is_still_told():
    error = SourceError("Reading failed at kafka:9092.\nFailed to run map task after 1/1 attempts.\nTo change…")
    of_ray = RayTaskError("run", "ray::Lane.run()", error, "ray::Lane.run", 1, "127.0.0.1", "Lane", "abc")

    assert root_cause(of_ray.as_instanceof_cause()) == "SourceError: Reading failed at kafka:9092."
    assert root_cause(ValueError("Traceback\n  File\nKeyError: 3")) == "ValueError: KeyError: 3"


def test_lane_when_its_topic_was_made_anew_then_the_run_ends_before_the_new_one_has_come_as_far(failed, monkeypatch):
    supervisor, slot, _ = failed
    error = TopicAnewError("video[0]: it goes on at offset 20, but the broker ends at 15.")
    of_ray = RayTaskError("run", "ray::Lane.run()", error, "ray::Lane.run", 1, "127.0.0.1", "Lane", "abc")
    monkeypatch.setattr(ray, "kill", lambda actor: None)

    def get(ref):
        raise of_ray.as_instanceof_cause()

    monkeypatch.setattr(ray, "get", get)

    with pytest.raises(TopicAnewError, match=r"lane 0 .*offset 20, but the broker ends at 15\. .*committed is safe"):
        supervisor._lane_ended(slot)

    assert (slot.actor, slot.restarts) == (None, 0)


@pytest.fixture
def watched(failed, monkeypatch):
    """Return a supervisor of two lanes without Ray, and a function that has it watch them until they are idle.

    `look(n)` is called in place of tending the lanes, with the number of the look from 1 on; the function returns
    what each look showed.
    """
    supervisor, slot, _ = failed
    supervisor._slots.append(LaneSlot(replace(slot.plan, lane=1, partitions=(("video", 1),))))
    stub = SimpleNamespace(start=lambda: None, stop=lambda: None, take=lambda: [], take_gone=lambda: [])
    monkeypatch.setattr(partition_watch, "PartitionWatch", lambda kafka, known: stub)
    monkeypatch.setattr(supervisor_module, "POLL_S", 0.0)
    for name in ("_plan", "_describing", "_stop_lanes"):
        monkeypatch.setattr(supervisor, name, lambda *args: None)

    def watch(look):
        seen = []
        monkeypatch.setattr(supervisor, "_tend", lambda: look(len(seen) + 1))
        supervisor._watch(SimpleNamespace(ready=lambda: True), 10.0, seen.append, lambda: None)
        return seen

    return supervisor, stub, watch


def test_run_until_idle_when_a_lane_with_a_backlog_restarts_then_it_goes_on_until_that_is_read(watched):
    supervisor, _, watch = watched
    first, second = supervisor._slots
    idle = replace(LaneCommitter(first.plan, print).status(), epoch=3, lag_records=0, lag_s=0.0, idle_s=20.0)
    behind = replace(idle, lane=1, lag_records=900, lag_s=99.0, idle_s=0.0)
    life = [behind, behind, None, None, behind, replace(idle, lane=1)]

    def look(n):
        first.status, second.status = idle, life[n - 1]

    seen = watch(look)

    assert [status.lag_records for status in seen] == [900, 900, -1, -1, 900, 0]
    assert [status.idle_s for status in seen] == [0.0] * 5 + [20.0]
    assert [status.lag_s for status in seen] == [99.0, 99.0, -1.0, -1.0, 99.0, 0.0]


@pytest.mark.parametrize("change", [{"partitions": ()}, {"finished": True}], ids=["nothing to read", "finished"])
def test_status_when_a_lane_has_nothing_left_to_do_then_the_others_alone_count(watched, change):
    supervisor, _, _ = watched
    first, second = supervisor._slots
    first.status = replace(LaneCommitter(first.plan, print).status(), lag_records=5, lag_s=1.0, idle_s=20.0)
    second.plan = replace(second.plan, partitions=change.get("partitions", second.plan.partitions))
    second.finished = change.get("finished", False)

    status = supervisor.status()

    assert (status.lag_records, status.lag_s, status.idle_s) == (5, 1.0, 20.0)


def test_partition_when_it_went_and_came_back_between_two_looks_then_its_lane_reads_it(watched, monkeypatch):
    supervisor, watch_stub, watch = watched
    renewed = []
    monkeypatch.setattr(supervisor, "_renew", renewed.append)
    first, second = supervisor._slots
    second.actor = object()
    changes = [[("video", 1)]]
    watch_stub.take = watch_stub.take_gone = lambda: changes[0]

    def look(n):
        changes[0] = []
        supervisor.request_stop()

    watch(look)

    assert (first.plan.partitions, second.plan.partitions) == ((("video", 0),), (("video", 1),))
    assert renewed == [second]
