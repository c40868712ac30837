"""Training on jemalloc: the program starts again on it, once."""

import os
import subprocess
import sys

import pytest

from stormline.pipeline.allocator import run_on_jemalloc

SCRIPT = """
import sys
from stormline.pipeline.allocator import run_on_jemalloc
print("began", flush=True)
run_on_jemalloc()
print("libjemalloc" in open("/proc/self/maps").read(), sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the C library's own allocator is used")
def test_jemalloc_when_ray_brings_it_then_the_program_runs_on_it_with_its_arguments(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "MALLOC_CONF")}

    told = subprocess.run([sys.executable, script, "a b", "--c"], env=environment, capture_output=True, check=True)

    assert told.stdout.decode().split("\n") == ["began", "began", "True ['a b', '--c']", ""]


@pytest.mark.parametrize("chosen", ["LD_PRELOAD", "MALLOC_CONF"])
def test_jemalloc_when_somebody_has_chosen_an_allocator_then_it_stays(monkeypatch, chosen):
    monkeypatch.setenv(chosen, "")
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started again"))

    run_on_jemalloc()
