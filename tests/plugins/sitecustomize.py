"""Makes processes die of certain records, as a fault in FFmpeg or in a kernel would: for tests, never installed.

Python imports a module of this name when it starts, where the folder is on its PYTHONPATH. So the code under test
has no hook for it: `stormline`'s own functions are wrapped as their modules are loaded.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
from functools import wraps

BAD_SEQ = 2  # of the streams below, the segment with this number
KILLS_DECODER, KILLS_ENCODER, HANGS_DECODER = "kills-decoder", "kills-encoder", "hangs-decoder"


def die():
    os.kill(os.getpid(), signal.SIGSEGV)
    signal.pause()


def hang():
    while True:
        pass


def wrap_decode(module):
    decode_segment = module.decode_segment

    @wraps(decode_segment)
    def trapped(data, meta, **options):
        if meta.seq == BAD_SEQ and meta.stream_id == KILLS_DECODER:
            die()
        if meta.seq == BAD_SEQ and meta.stream_id == HANGS_DECODER:
            hang()
        return decode_segment(data, meta, **options)

    module.decode_segment = trapped


def wrap_encode(module):
    step = module.Encoder.step

    @wraps(step)
    def trapped(encoder, stream, decoded):
        if decoded.meta.seq == BAD_SEQ and decoded.meta.stream_id == KILLS_ENCODER and not decoded.failed:
            die()
        return step(encoder, stream, decoded)

    module.Encoder.step = trapped


TRAPS = {"stormline.operators.decode": wrap_decode, "stormline.operators.encode": wrap_encode}


class TrapFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of TRAPS as the others do, and sets their traps once they are loaded."""

    def find_spec(self, name, path=None, target=None):
        if name not in TRAPS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        load = spec.loader.exec_module

        def load_and_trap(module):
            load(module)
            TRAPS[name](module)

        spec.loader.exec_module = load_and_trap
        return spec


sys.meta_path.insert(0, TrapFinder())
