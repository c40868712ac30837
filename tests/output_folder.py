"""Output folders as a lane leaves them, for tests of what reads them."""

from __future__ import annotations

import numpy as np

from stormline.operators.rows import Chunk, Position, Result
from stormline.pipeline.archive.work_list import WorkItem, WorkList
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.recovery import recover

S_NS = 10**9


class StoppedError(Exception):
    """A lane was ended."""


class StopsBeforeManifest(EpochWriter):
    """Ends where rows are there and not committed."""

    def step_done(self, number):
        if number == 3:
            raise StoppedError


class Folder:
    """An output folder with one lane that commits."""

    def __init__(self, root, topic="video"):
        self.root = root
        self._topic = topic
        self._at = 0
        self._writer = self._new_writer()

    def _new_writer(self):
        start = recover(self.root, lanes=1, identity={}).for_lane(0, [(self._topic, 0)])
        return EpochWriter(start, model="m", identity={})

    def restart(self):
        self._writer = self._new_writer()

    def commit(self, *results, chunks=(), dead_letters=(), next_offset=None):
        self._at = self._at + 1 if next_offset is None else next_offset
        self._writer.commit(
            results=results,
            chunks=chunks,
            dead_letters=dead_letters,
            positions=[Position(self._topic, 0, self._at)],
            snapshots={},
        )


def caption(stream, start_s, end_s, answer, *, session="s", origin_s=0.0, query="caption", kind="caption", prompt="?"):
    start_ns, end_ns = (round((origin_s + s) * S_NS) for s in (start_s, end_s))
    prompt = {"?": "Describe what happens."}.get(prompt, prompt)
    return Result(query, kind, stream, session, start_ns, end_ns, prompt, answer, kind == "alert", 16, "", 1.5, "m", 7)


def chunk(stream, index, start_s, *, session="s", seconds=2.0):
    start_ns = round(start_s * S_NS)
    tokens = np.arange(8, dtype=np.float16).reshape(2, 4)
    end_ns = start_ns + round(seconds * S_NS)
    return Chunk(stream, session, index, start_ns, end_ns, start_ns, 4, 0.5, "video", 0, index, 0, tokens)


def list_videos(root, *names, start_ns=0, n_bytes=10):
    """Write an archive's list of videos, each the next of partition 0."""
    work = WorkList(root)
    before = len(work.read())
    work.append(
        WorkItem(0, before + i, f"/videos/{name}", name, "v1", 1, n_bytes, 0, start_ns) for i, name in enumerate(names)
    )
    return work.read()
