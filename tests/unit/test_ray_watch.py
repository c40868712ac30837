"""The process ends with the Ray that it started, or its command begins again in it."""

import inspect
import subprocess
import sys
import threading

import pytest
from ray._private import worker
from ray._private.node import Node

from stormline.pipeline.ray_watch import (
    EXIT_RAY_DIED,
    MOST_SHORT_LIVES,
    NEEDED,
    SHORT_LIFE_S,
    RayWatch,
    begin_again,
    unless_stopped,
)

LIVES = """
import os, sys
from pathlib import Path
from stormline.pipeline.ray_watch import begin_again

lives, ran_s, most = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
with lives.open("a") as file:
    print(os.getpid(), *sys.argv[1:], file=file)
if len(lives.read_text().splitlines()) < most:
    begin_again("Ray died (raylet)", ran_s, print)
"""


class StubNode:
    """Ray's record of what it started: `live` may die."""

    def __init__(self):
        self.dead = [("log_monitor", None)]  # without which it goes on

    def dead_processes(self):
        return self.dead


@pytest.fixture
def live(tmp_path):
    """Return a function that runs a program that begins again, and returns its process and what each life noted."""

    def live(ran_s, most=100):
        command = [sys.executable, "-c", LIVES, str(tmp_path / "lives"), str(ran_s), str(most)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return done, (tmp_path / "lives").read_text().splitlines()

    return live


def test_ray_when_its_server_dies_then_this_process_leaves_and_says_why():
    node, told, left = StubNode(), [], threading.Event()
    reasons = []

    def leave(why, ran_s, tell):
        assert 0 <= ran_s < SHORT_LIFE_S
        tell("leaving")
        reasons.append(why)
        left.set()

    with RayWatch(node, told.append, leave, poll_s=0.001):
        node.dead = [*node.dead, ("raylet", None)]
        assert left.wait(10)

    assert (reasons, told) == (["Ray died (raylet)"], ["leaving"])


def test_command_when_it_begins_again_then_it_is_the_same_process_with_the_same_arguments(live):
    done, lives = live(ran_s=SHORT_LIFE_S, most=MOST_SHORT_LIVES + 3)

    assert (done.returncode, len(lives), len(set(lives))) == (0, MOST_SHORT_LIVES + 3, 1), done.stderr
    assert done.stdout.count("Ray died (raylet): beginning again, from what was committed") == len(lives) - 1


def test_command_when_its_lives_are_short_then_it_ends_and_says_so(live):
    done, lives = live(ran_s=SHORT_LIFE_S - 1)

    assert (done.returncode, len(lives)) == (EXIT_RAY_DIED, MOST_SHORT_LIVES + 1), done.stderr
    assert f"Ray died (raylet), {MOST_SHORT_LIVES + 1} times within 60 s: ending too" in done.stdout


def test_command_when_it_was_asked_to_stop_then_it_does_not_begin_again(monkeypatch):
    stop, left = threading.Event(), []
    monkeypatch.setattr("os._exit", left.append)
    leave = unless_stopped(stop, lambda *_: left.append("again"))

    leave("Ray died (raylet)", 1.0, print)
    stop.set()
    leave("Ray died (raylet)", 1.0, print)

    assert left == ["again", EXIT_RAY_DIED]


def test_command_when_python_is_gone_then_it_ends_and_says_so(monkeypatch):
    told, left = [], []
    monkeypatch.setattr("os._exit", left.append)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    monkeypatch.setenv("STORMLINE_SHORT_LIVES", "0")

    begin_again("Ray died (gcs_server)", 1.0, told.append)

    assert left == [EXIT_RAY_DIED]
    assert "/nowhere/python" in told[-1] or "No such file" in told[-1]


def test_ray_when_only_its_log_monitor_dies_then_nothing_ends():
    looked = threading.Event()

    class Looked(StubNode):
        def dead_processes(self):
            looked.set()
            return super().dead_processes()

    told, left = [], []

    with RayWatch(Looked(), told.append, lambda *of: left.append(of), poll_s=0.001):
        assert looked.wait(10)

    assert (told, left) == ([], [])


def test_ray_when_read_then_names_its_servers_so():
    assert "_global_node" in vars(worker)
    source = inspect.getsource(Node)
    assert {"PROCESS_TYPE_GCS_SERVER", "PROCESS_TYPE_RAYLET"} <= set(source.replace(".", " ").replace(",", " ").split())
    constants = inspect.getmodule(Node).ray_constants
    assert (constants.PROCESS_TYPE_GCS_SERVER, constants.PROCESS_TYPE_RAYLET) == NEEDED
