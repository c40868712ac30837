"""Reads lengths of time and moments as people write them: `10m`, `90`, `2026-01-31T12:00`."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_YEARS = range(1700, 2200)  # whose nanoseconds since 1970 fit 64 bits, with room to count back


def parse_duration_s(text: str) -> float:
    """Return the seconds of ``30s``, ``10m``, ``1.5h``, ``2d`` or a bare number of seconds.

    >>> parse_duration_s("10m"), parse_duration_s("90")
    (600.0, 90.0)

    Raises:
        ValueError: If it is none of these.
    """
    match = _DURATION.fullmatch(text.strip() if text.strip()[-1:] in UNITS_S else f"{text.strip()}s")
    if match is None:
        raise ValueError(f"{text!r} is no length of time; expected 90, 30s, 10m, 1.5h or 2d")
    return float(match.group(1)) * UNITS_S[match.group(2)]


def parse_moment(text: str) -> datetime:
    """Return an ISO 8601 time, UTC where it names no zone.

    Raises:
        ValueError: If it is none, or no year of video.
    """
    try:
        moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text.strip()))
    except ValueError:
        raise ValueError(
            f"{text!r} is no time; expected ISO 8601 such as 2026-01-31T12:00 (UTC) or 2026-01-31T12:00+01:00"
        ) from None
    if moment.year not in _YEARS:
        raise ValueError(f"{text!r} is no time of video; expected a year from {_YEARS.start} to {_YEARS.stop - 1}")
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def parse_since(text: str, now: datetime) -> datetime:
    """Return the moment that ``10m`` (that long before `now`) or an ISO 8601 time names.

    Raises:
        ValueError: If it is neither, or before the calendar begins.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        return parse_moment(text)
    try:
        return now - timedelta(seconds=parse_duration_s(text))
    except OverflowError:
        raise ValueError(f"{text!r} is before the calendar begins; expected less") from None


def moment_ns(moment: datetime) -> int:
    """Return nanoseconds since 1970 of an aware time, exact to its microseconds."""
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1_000


def format_moment(time_ns: int) -> str:
    """Return ``2026-01-31T12:00:00.000Z`` of nanoseconds since 1970, UTC, rounded down to milliseconds."""
    moment = _EPOCH + timedelta(microseconds=time_ns // 1_000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
