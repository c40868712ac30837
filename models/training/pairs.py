"""Real video with text: pairs from a folder, JSON lines or Parquet, for the stages that name `data`.

    folder     every video with a text file of the same name beside it (street.mp4, street.txt): its caption
    .jsonl     a line each: {"video": "street.mp4", "answer": "Cars wait.", "prompt": …, "start_s": …, "stop_s": …}
    .parquet   the same as columns; needs pyarrow

`video` is relative to the file that names it. Without `prompt` the text is a caption; without `start_s` and `stop_s`
it is about the whole video. See `real_video` for the frames.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .questions import CAPTION_PROMPT, Question
from .real_video import read_stretch, stretch_s

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_LONGEST_S = 1e9  # no video is as long: 30 years
_KEYS = {"video", "answer", "prompt", "start_s", "stop_s"}


@dataclass(frozen=True)
class VideoTexts:
    """A stretch of a video, and what is asked and told about it."""

    video: Path
    start_s: float
    stop_s: float | None  # None: to its end
    questions: tuple[Question, ...]


@dataclass(frozen=True, eq=False)
class PairClip:
    """A stretch of a video as `n_frames` evenly spaced frames."""

    texts: VideoTexts
    n_frames: int
    size_px: int

    def render(self) -> np.ndarray:
        """Decode the frames: (n_frames, size, size, 3) uint8 RGB.

        Raises:
            ValueError: If the video cannot be decoded.
        """
        return read_stretch(self.texts.video, self.texts.start_s, self.texts.stop_s, self.n_frames, self.size_px)

    def length_s(self) -> float:
        """Return how much time the frames stand for; decodes nothing. Raises as `real_video.stretch_s`."""
        return stretch_s(self.texts.video, self.texts.start_s, self.texts.stop_s)


def read_pairs(source: str | Path) -> list[VideoTexts]:
    """Read pairs; texts about the same stretch of a video come together.

    Raises:
        FileNotFoundError: If there is no such file or folder, or a video that it names is not there.
        ValueError: If it holds no pair, or one that cannot be understood; the message says where.
    """
    path = Path(source)
    if path.is_dir():
        records = [
            (f"{text}", video.parent, {"video": video.name, "answer": _text_of(text).strip()})
            for video in sorted(path.rglob("*"))
            if video.suffix.lower() in VIDEO_SUFFIXES and (text := video.with_suffix(".txt")).is_file()
        ]
    elif path.suffix == ".jsonl" and path.is_file():
        lines = _text_of(path).split("\n")  # JSON may hold what Unicode ends lines with
        records = [(f"{path}:{i}", path.parent, _parse(f"{path}:{i}", x)) for i, x in enumerate(lines, 1) if x.strip()]
    elif path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as pq

        rows = pq.read_table(path).to_pylist()
        records = [(f"{path} row {i}", path.parent, row) for i, row in enumerate(rows)]
    else:
        raise FileNotFoundError(f"data is {str(source)!r}; expected a folder, or a .jsonl or .parquet file that exists")
    if not records:
        raise ValueError(
            f"{path} holds no pair; expected videos ({' '.join(VIDEO_SUFFIXES)}) each with a .txt beside it, or lines"
        )
    return _grouped(records)


def check_videos(pairs: Iterable[VideoTexts]) -> None:
    """Look at the head of every video, so that one that cannot be trained on is told before the training begins.

    Raises:
        ValueError: If one cannot be opened, has no video or no frames, or ends before what is told of it.
    """
    for pair in pairs:
        stretch_s(pair.video, pair.start_s, pair.stop_s)


def _text_of(path: Path) -> str:
    """Return what a text file says, without the mark that Windows' editors begin it with."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: got {type(record).__name__}; expected an object with video and answer")
    return record


def _check(where: str, record: Mapping[str, Any]) -> None:
    for key in ("video", "answer", "prompt"):
        if not isinstance(record.get(key), str | None):
            raise ValueError(f"{where}: {key} is {record[key]!r}; expected text, in quotes")
    for key in ("video", "answer"):
        if not (record.get(key) or "").strip():
            raise ValueError(f"{where}: got {dict(record)}; expected a video and an answer, neither empty")
    for key in ("start_s", "stop_s"):
        value = record.get(key)
        if value is not None and (type(value) not in (int, float) or not abs(value) <= _LONGEST_S):
            raise ValueError(f"{where}: {key} is {value!r}; expected a number of seconds")


def _grouped(records: Iterable[tuple[str, Path, Mapping[str, Any]]]) -> list[VideoTexts]:
    groups: dict[tuple[Path, float, float | None], list[Question]] = {}
    for where, folder, record in records:
        if unknown := sorted(set(record) - _KEYS):
            raise ValueError(f"{where}: unknown keys {unknown}; expected only {sorted(_KEYS)}")
        _check(where, record)
        video = folder / record["video"]
        if not video.is_file():
            raise FileNotFoundError(f"{where}: there is no video {video}")
        start_s, stop_s = float(record.get("start_s") or 0.0), record.get("stop_s")
        if start_s < 0 or (stop_s is not None and not start_s < stop_s):
            raise ValueError(f"{where}: runs from {start_s} s to {stop_s} s; expected 0 or more, then a later time")
        prompt = record.get("prompt") or CAPTION_PROMPT
        kind = "caption" if prompt == CAPTION_PROMPT else "question"
        question = Question(kind, prompt, record["answer"], None)
        groups.setdefault((video, start_s, None if stop_s is None else float(stop_s)), []).append(question)
    return [VideoTexts(video, start, stop, tuple(asked)) for (video, start, stop), asked in groups.items()]
