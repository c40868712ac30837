"""The process ends with the Ray that it started."""

import inspect
import threading

from ray._private import worker
from ray._private.node import Node

from stormline.pipeline.ray_watch import EXIT_RAY_DIED, NEEDED, RayWatch


class StubNode:
    """Ray's record of what it started: `live` may die."""

    def __init__(self):
        self.dead = [("log_monitor", None)]  # without which it goes on

    def dead_processes(self):
        return self.dead


def test_ray_when_its_server_dies_then_this_process_leaves_and_says_why():
    node, told, left = StubNode(), [], threading.Event()
    statuses = []

    def leave(status):
        statuses.append(status)
        left.set()

    with RayWatch(node, told.append, leave, poll_s=0.001):
        node.dead = [*node.dead, ("raylet", None)]
        assert left.wait(10)

    assert statuses == [EXIT_RAY_DIED]
    assert "Ray died (raylet)" in told[0]


def test_ray_when_only_its_log_monitor_dies_then_nothing_ends():
    looked = threading.Event()

    class Looked(StubNode):
        def dead_processes(self):
            looked.set()
            return super().dead_processes()

    told, statuses = [], []

    with RayWatch(Looked(), told.append, statuses.append, poll_s=0.001):
        assert looked.wait(10)

    assert (told, statuses) == ([], [])


def test_ray_when_read_then_names_its_servers_so():
    assert "_global_node" in vars(worker)
    source = inspect.getsource(Node)
    assert {"PROCESS_TYPE_GCS_SERVER", "PROCESS_TYPE_RAYLET"} <= set(source.replace(".", " ").replace(",", " ").split())
    constants = inspect.getmodule(Node).ray_constants
    assert (constants.PROCESS_TYPE_GCS_SERVER, constants.PROCESS_TYPE_RAYLET) == NEEDED
