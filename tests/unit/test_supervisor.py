"""What the supervisor does about a lane that failed, as far as that needs no Ray."""

import errno
import time
from dataclasses import replace

import pytest
import ray

from stormline.operators.errors import StormlineError
from stormline.pipeline import lane as lane_module
from stormline.pipeline.checkpoint import lane_folder
from stormline.pipeline.embedded_ray import embedded_ray
from stormline.pipeline.lane import LaneCommitter, LanePlan
from stormline.pipeline.poison import SuspectList
from stormline.pipeline.recovery import recover
from stormline.pipeline.settings import Settings, load_settings
from stormline.pipeline.supervisor import LaneSlot, Supervisor

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


def fill_disk(root):
    (lane_folder(root, 0) / ".owner.tmp").symlink_to("/dev/full")


def test_lane_when_the_disk_is_full_as_it_restarts_then_it_waits_and_tries_again(failed, tmp_path, monkeypatch):
    supervisor, slot, told = failed
    started = []
    monkeypatch.setattr(lane_module, "start_lane", lambda plan: started.append(plan) or pytest.fail("started"))
    fill_disk(tmp_path)

    supervisor._tend()
    supervisor._tend()

    assert (slot.actor, slot.restarts, started) == (None, 2, [])
    assert all("No space left on device" in text for text in told)
    (lane_folder(tmp_path, 0) / ".owner.tmp").unlink()
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
    fill_disk(tmp_path)
    for _ in range(3):
        supervisor._tend()

    with pytest.raises(StormlineError, match=r"failed 4 times without a commit between; last: .*No space left"):
        supervisor._tend()


def test_lane_when_it_fails_for_the_first_time_then_restarts_at_once_and_later_waits_longer_each_time(failed):
    supervisor, slot, told = failed
    supervisor._settings = load_settings(None, ["lanes.restart_backoff_s=5"])

    for _ in range(3):
        supervisor._back_off(slot, "it broke")

    waits = [text.partition("restart from its checkpoint ")[2] for text in told]
    assert waits == ["at once", "in 5 s", "in 10 s"]


@pytest.mark.parametrize(("epoch", "is_stalled"), [(0, False), (1, True)], ids=["still starting", "under way"])
def test_lane_when_no_barrier_comes_for_long_then_stalled_unless_it_still_loads_its_model(failed, epoch, is_stalled):
    supervisor, slot, _ = failed
    slot.started_s = time.monotonic() - 300
    slot.status = replace(LaneCommitter(slot.plan, lambda offsets: None).status(), epoch=epoch, last_barrier_s=300.0)

    assert supervisor._stalled(slot) == is_stalled


def test_ray_when_it_is_not_up_in_time_then_an_error_that_says_to_run_again(monkeypatch):
    def init(**options):
        raise Exception("The current node timed out during startup.")  # its very type

    monkeypatch.setattr(ray, "init", init)
    alone = Settings.model_validate({"ray": {"fork_workers": False}})

    with pytest.raises(StormlineError, match=r"timed out during startup.*Run again"), embedded_ray(alone, print):
        pytest.fail("it came up")
