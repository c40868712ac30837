"""How a source is published, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...operators.errors import SettingsError
from .segmenter import Method

TRUTH_WINDOW_S = 10.0  # as the default caption window


@dataclass(frozen=True)
class PublishOptions:
    """How a source is published; checked when built.

    Raises:
        SettingsError: If a value is out of range.
    """

    speed: float = 0.0  # media seconds a second; 0: as fast as possible. Live sources set their own pace
    loop: int | None = 1  # passes over a file; None: for ever
    session: str | None = None  # None: a new one. A live source's later sessions add -2, -3…
    start_ns: int | None = None  # UTC time of the first frame; None: now
    segment_s: float = 2.0
    method: Method = "auto"
    bitrate: int | None = None  # of transcoded video, bits a second
    input_options: Mapping[str, str] = field(default_factory=dict)  # for FFmpeg's demuxer
    max_reconnects: int | None = None  # tries in a row to reach a lost live source; None: for ever
    awaits_start: bool = False  # a URL that is not there at the start is tried again as a lost one is
    truth: Path | None = None  # where to write what the generated feed shows, as JSON lines
    truth_window_s: float = TRUTH_WINDOW_S

    def __post_init__(self) -> None:
        _require(self.speed >= 0, "speed", self.speed, "0 (as fast as possible) or more")
        _require(self.loop is None or self.loop >= 1, "loop", self.loop, "1 or more, or None (for ever)")
        _require(0.1 <= self.segment_s <= 600, "segment_s", self.segment_s, "0.1 to 600 seconds")
        _require(self.method in ("auto", "copy", "transcode"), "method", self.method, "auto, copy or transcode")
        _require(self.bitrate is None or self.bitrate >= 1000, "bitrate", self.bitrate, "1000 bits a second or more")
        _require(self.start_ns is None or self.start_ns >= 0, "start_ns", self.start_ns, "a time from 1970 on")
        _require(self.truth_window_s > 0, "truth_window_s", self.truth_window_s, "more than 0 seconds")


def _require(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        raise SettingsError(f"publish option {name}: got {got!r}, expected {expected}")


@dataclass(frozen=True)
class PublishReport:
    """What became of one source. What is counted was acknowledged, once the publisher has returned."""

    stream_id: str
    sessions: tuple[str, ...] = ()
    n_segments: int = 0
    n_frames: int = 0
    n_bytes: int = 0
    media_ms: int = 0  # length of all sessions together
    n_dropped_frames: int = 0  # leading frames of open GOPs that `copy` left out
    n_skipped_packets: int = 0  # before the first keyframe, also after timestamps jumped; broken, or with a wild time
    transcoded: bool = False
    stopped: bool = False  # asked to, before the source's end
    notices: tuple[str, ...] = ()
