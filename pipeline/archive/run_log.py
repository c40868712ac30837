"""How fast the runs of an archive went, over time: a line now and then, for the report.

OUT/archive/runs.jsonl    samples, one JSON object a line; losing it loses a chart
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

OFTEN_S = 10.0  # between two samples of a run's first ten minutes
SELDOM_S = 60.0  # of the rest: a night is 700 lines
OFTEN_UNTIL_S = 600.0


@dataclass(frozen=True)
class RunSample:
    """How far one run had come at one moment."""

    time_s: float  # since 1970
    took_s: float  # since the run began to work
    video_s: float  # looked at in this run
    n_done: int
    n_videos: int
    answers: int
    busy: Mapping[str, float] = field(default_factory=dict)  # share of the time, by step
    run_s: float = 0.0  # when the run began: its name


class RunLog:
    """The samples of one output folder.

    Args:
        root: The output folder.
    """

    def __init__(self, root: Path):
        self._path = root / "archive" / "runs.jsonl"
        self._run_s = time.time()
        self._before: RunSample | None = None

    def add(self, sample: RunSample, *, last: bool = False) -> None:
        """Take a sample down, if the time has come and there is something new, or it is a run's last one."""
        before = self._before
        if before is not None:
            due_s = before.took_s + (OFTEN_S if sample.took_s < OFTEN_UNTIL_S else SELDOM_S)
            if (sample.took_s < due_s and not last) or (sample.video_s, sample.n_done) == (
                before.video_s,
                before.n_done,
            ):
                return
        self._before = sample
        line = json.dumps({**asdict(sample), "run_s": self._run_s}) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(line)
        except OSError as error:  # a full disk, say: the lanes will tell of it
            logger.warning("sample not written path=%s error=%s", self._path, error)

    def read(self) -> Iterator[RunSample]:
        """Yield all samples, the oldest first; what a crash cut short is left out."""
        if not self._path.exists():
            return
        with self._path.open() as file:
            for line in file:
                try:
                    yield RunSample(**json.loads(line))
                except (ValueError, TypeError):
                    continue
