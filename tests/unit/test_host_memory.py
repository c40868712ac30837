"""Memory that is freed stays with the process: taking it again costs no page faults."""

import subprocess
import sys

import pytest

TAKE_AND_FREE = """
import ctypes, resource, sys
import torch
from stormline.models.host_memory import keep_freed_memory

PR_SET_THP_DISABLE = 41  # of <linux/prctl.h>: where the kernel gives huge pages unasked, there are few faults to count
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
kept = sys.argv[1] == "kept" and keep_freed_memory()
for _ in range(8):  # where the blocks lie settles in a few rounds
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(16 << 20)  # 64 MB, more than the C library keeps by itself
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults)
"""

VARY_AND_GIVE_BACK = """
import torch
from stormline.models.host_memory import give_back_freed_memory, keep_freed_memory

def resident_mb():
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * 4096 >> 20

kept = keep_freed_memory()
held = [(torch.ones(2 << 20), torch.ones(16)) for _ in range(32)]  # 8 MB each, and a little that stays behind it
small = [each for _, each in held]
before = resident_mb()
del held
freed = resident_mb()
print(kept, before, freed, give_back_freed_memory(), resident_mb())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tells glibc what to do")
def test_give_back_freed_memory_when_blocks_in_use_lie_between_then_what_is_free_goes():
    done = subprocess.run([sys.executable, "-c", VARY_AND_GIVE_BACK], capture_output=True, check=True, text=True)
    kept, before, freed, gave, after = done.stdout.split()

    if kept != "True":
        pytest.skip("another C library than glibc")
    assert int(freed) > int(before) - 32
    assert gave == "True"
    assert int(after) < int(freed) - 200


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tells glibc what to do")
def test_keep_freed_memory_when_large_blocks_come_and_go_then_they_are_not_fetched_anew():
    kept, by_default = (
        subprocess.run([sys.executable, "-c", TAKE_AND_FREE, way], capture_output=True, check=True, text=True).stdout
        for way in ("kept", "by default")
    )

    if not kept.startswith("True"):
        pytest.skip("another C library than glibc")
    assert int(by_default.split()[1]) > 4 * 1000
    assert int(kept.split()[1]) < 100
