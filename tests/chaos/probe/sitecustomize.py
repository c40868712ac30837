"""Read by every Python process of a run under test, from PYTHONPATH: tells what happens there, and fails on demand.

The product knows nothing of this. As some of its modules are imported, their methods are wrapped:

- moments of a lane's start are appended to ``$STORMLINE_CHAOS/events.jsonl``, a line each;
- the source's position goes to ``$STORMLINE_CHAOS/read/TOPIC-PARTITION``, as text;
- where ``$STORMLINE_CHAOS/fail`` holds ``NUMBER error`` or ``NUMBER kill``, the next commit that gets to the end of
  that numbered step fails there, as a disk does, or its process is killed; the file is taken away.
"""

from __future__ import annotations

import errno
import functools
import importlib.machinery
import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("STORMLINE_CHAOS", "/nonexistent"))


def note(name, **more):
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    boot_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    event = {"name": name, "time_s": time.time(), "pid": os.getpid(), "process_started_s": boot_s + ticks, **more}
    descriptor = os.open(FOLDER / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(event) + "\n").encode())
    os.close(descriptor)


def timed_init(cls, name):
    plain = cls.__init__

    @functools.wraps(plain)
    def init(self, *args, **kwargs):
        note(f"{name}_imported")
        plain(self, *args, **kwargs)
        note(f"{name}_ready")

    cls.__init__ = init


def watch_lane(module):
    plain_run, plain_take = module.Lane.run, module.LaneCommitter.take

    @functools.wraps(plain_run)
    def run(self):
        note("lane_began", lane=self._plan.lane)
        return plain_run(self)

    @functools.wraps(plain_take)
    def take(self, row):
        if not getattr(self, "_chaos_noted", False):
            self._chaos_noted = True
            note("first_row", lane=self._writer.lane)
        return plain_take(self, row)

    module.Lane.run, module.LaneCommitter.take = run, take


def watch_source(module):
    plain = module.SessionTracker.take

    @functools.wraps(plain)
    def take(self, record):
        (FOLDER / "read" / f"{record.topic}-{record.partition}").write_text(str(record.offset + 1))
        return plain(self, record)

    module.SessionTracker.take = take


def fail_commits(module):
    def step_done(self, number):
        try:
            wanted, way = (FOLDER / "fail").read_text().split()
            if int(wanted) != number:
                return
            (FOLDER / "fail").unlink()
        except FileNotFoundError:
            return
        note("commit_failed", lane=self.lane, number=number, way=way)
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.root))

    module.EpochWriter.step_done = step_done


WRAPPED = {
    "stormline.pipeline.lane": watch_lane,
    "stormline.pipeline.sessions": watch_source,
    "stormline.pipeline.parquet_sink": fail_commits,
    "stormline.operators.decode": lambda module: timed_init(module.Decode, "decode"),
    "stormline.operators.encode": lambda module: timed_init(module.Encode, "encode"),
    "stormline.operators.annotate": lambda module: timed_init(module.Annotate, "annotate"),
}


class Finder:
    """Finds these modules as usual, and wraps them once they are imported."""

    @staticmethod
    def find_spec(name, path, target=None):
        wrap = WRAPPED.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if wrap else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            wrap(module)

        spec.loader.exec_module = exec_module
        return spec


if FOLDER.is_dir():
    sys.meta_path.insert(0, Finder)
