"""A Ray of one's own beside others."""

import subprocess
import sys

USUAL_PORT = 52365  # of the agent of a node
START = """
import sys
from ray._private import services
from stormline.pipeline.embedded_ray import embedded_ray
from stormline.pipeline.ray_watch import own_ray
from stormline.pipeline.settings import load_settings

theirs = services.get_node
alone = load_settings(None, ["ray.fork_workers=false"])
with embedded_ray(alone, lambda text: None, meanwhile=["endless_dataset"]):
    print(own_ray().dashboard_agent_listen_port)
    print("stormline.pipeline.endless_dataset" in sys.modules, services.get_node is theirs)
"""


def test_ray_when_another_has_the_usual_port_then_its_agent_takes_a_free_one_without_waiting_for_that(ray_session):
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True, timeout=120)

    port, *others = done.stdout.split()
    assert int(port) not in (-1, USUAL_PORT), done.stderr  # -1: it gave up
    assert others == ["True", "True"]  # imported while Ray started, which has its own way again
