"""Addresses of video within a question: ``stream://cam-1?last=600s``."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlencode

from ..durations import moment_ns, parse_duration_s, parse_moment

SCHEME = "stream://"
DEFAULT_LAST_S = 600.0


@dataclass(frozen=True)
class StreamRange:
    """A stream and either its newest `last_s` seconds or the range [start_ns, end_ns); an end of None is its newest."""

    stream_id: str
    last_s: float | None = None
    start_ns: int | None = None
    end_ns: int | None = None


def parse_stream_url(url: str) -> StreamRange:
    """Read ``stream://ID``, with ``?last=600s``, or with ``?start=TIME`` and perhaps ``&end=TIME``.

    Without any of them it is the last ten minutes. "Last" counts back from the stream's newest frame, so that it also
    means something for a stream that has ended. The id may be percent-encoded.

    Raises:
        ValueError: If it is none of these; the message names the part that is wrong.
    """
    name, _, query = url.removeprefix(SCHEME).partition("?")
    stream_id = unquote(name)
    if not url.startswith(SCHEME) or not stream_id:
        raise ValueError(f"{url!r} is no address of a stream; expected stream://ID?last=600s or ?start=TIME&end=TIME")
    options = parse_qsl(query, keep_blank_values=True)
    given = dict(options)
    unknown = sorted(given.keys() - {"last", "start", "end"})
    if unknown or len(given) < len(options):
        raise ValueError(f"{url!r}: expected last, start and end, each once at most; got {unknown or sorted(given)}")
    if ("last" in given and len(given) > 1) or ("end" in given and "start" not in given):
        raise ValueError(f"{url!r}: expected last alone, or start, or start and end")
    if "start" not in given:
        last_s = parse_duration_s(given["last"]) if "last" in given else DEFAULT_LAST_S
        if not last_s > 0:
            raise ValueError(f"{url!r}: last is {last_s:g} s; expected more than 0")
        return StreamRange(stream_id, last_s=last_s)
    start_ns, end_ns = _time_ns(given["start"]), _time_ns(given["end"]) if "end" in given else None
    if end_ns is not None and end_ns <= start_ns:
        raise ValueError(f"{url!r}: the end is not after the start")
    return StreamRange(stream_id, start_ns=start_ns, end_ns=end_ns)


def _time_ns(text: str) -> int:
    # In a query a plus sign stands for a space; who wrote +01:00 unescaped meant the plus.
    return moment_ns(parse_moment(text.replace(" ", "+")))


def make_stream_url(stream_id: str, **options: str | None) -> str:
    """Return the address of a stream, the options escaped as needed; those that are None are left out.

    >>> make_stream_url("cam 1", last="10m", start=None)
    'stream://cam%201?last=10m'
    """
    query = urlencode({key: value for key, value in options.items() if value is not None})
    return SCHEME + quote(stream_id, safe="") + (f"?{query}" if query else "")
