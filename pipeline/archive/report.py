"""The report of an archive: one HTML file that stands alone, however many videos there are.

It loads nothing, runs nothing, and its size is bounded: the pictures are of `MAX_PICTURES` videos, evenly chosen, and
the failures of the first `MAX_FAILURES`; the numbers are of all.
"""

from __future__ import annotations

import base64
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from itertools import groupby, pairwise
from pathlib import Path

from ...models.video_files import orientation
from ...operators.media import ffmpeg_errors, open_media, open_video_stream, opened_uri
from ...operators.pictures import make_jpeg
from ..durable_files import replace_file
from ..export.subtitles import line_of
from ..result_index import ResultIndex, Session
from .outcomes import Outcome, count_states, outcomes
from .progress import bottleneck, long_time, present
from .run_log import RunLog, RunSample

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"
MAX_PICTURES = 240  # of 10 kB each
MAX_FAILURES = 500
MAX_POINTS = 400  # of the chart
PICTURES_S = 90.0  # for decoding them all; what takes longer goes without
PICTURE_THREADS = 2
TEXT_CHARS = 300

STYLE = """
:root { color-scheme: light dark; --line: #8886; --dim: #777; --bar: #2a78d6; --bad: #c33; }
* { box-sizing: border-box; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.dim { color: var(--dim); } .bad { color: var(--bad); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.facts div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.35rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .8rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
figure img, .none { display: block; width: 100%; aspect-ratio: 16 / 9; object-fit: contain; background: #000; }
.none { display: grid; place-items: center; color: #999; }
figcaption { padding: .5rem .6rem; font-size: .85rem; overflow-wrap: anywhere; }
figcaption b { display: block; margin-bottom: .2rem; }
svg { width: 100%; height: auto; border: 1px solid var(--line); border-radius: .5rem; }
svg text { font-size: 13px; fill: var(--dim); } polyline { fill: none; stroke: var(--bar); stroke-width: 2; }
li { overflow-wrap: anywhere; margin: .35rem 0; } ul { padding-left: 1.1rem; }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1><p class="dim">{subtitle}</p>
{body}
</body></html>
"""


@dataclass(frozen=True)
class Card:
    """One video on the contact sheet."""

    outcome: Outcome
    text: str  # what was said of it first
    jpeg: bytes  # none where it could not be had in time


def write_report(
    root: Path, index: ResultIndex, path: Path | None = None, tell: Callable[[str], None] = lambda text: None
) -> Path:
    """Write the report of an archive in one step; return its path.

    Args:
        root: The output folder.
        index: Of its results.
        path: Where to; None: into the output folder.
        tell: Told what takes a while.
    """
    path = path or root / REPORT_NAME
    found = present(outcomes(root))
    chosen = choose([o for o in found if o.state in ("done", "damaged")], MAX_PICTURES)
    if chosen:
        tell(f"the report: a picture of {len(chosen):,} video(s)")
    cards = [
        Card(outcome, _text(index, outcome), jpeg) for outcome, jpeg in zip(chosen, _pictures(chosen), strict=True)
    ]
    replace_file(path, render(root.resolve().name, found, cards, list(RunLog(root).read())).encode())
    return path


def render(name: str, found: Sequence[Outcome], cards: Sequence[Card], samples: Sequence[RunSample]) -> str:
    """Return the report as HTML.

    Args:
        name: Of the archive.
        found: How each video fared.
        cards: For the contact sheet.
        samples: Of all runs, the oldest first.
    """
    written = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    body = "\n".join([_facts(found, samples), _chart(samples), _failures(found), _sheet(found, cards)])
    return PAGE.format(title=escape(name), style=STYLE, subtitle=f"stormline archive, {written}", body=body)


def choose(found: Sequence[Outcome], n: int) -> list[Outcome]:
    """Return at most `n`, evenly spread over all."""
    if len(found) <= n:
        return list(found)
    return [found[i * len(found) // n] for i in range(n)]


def small_picture(uri: str) -> bytes:
    """Return a frame from about a tenth into a video as a small JPEG.

    Raises:
        MediaError: If it is no video that can be decoded.
        OSError: If it cannot be opened.
    """
    with opened_uri(uri) as source, ffmpeg_errors(), open_media(source) as container:
        stream = open_video_stream(container)
        if container.duration:
            container.seek(container.duration // 10)
        for frame in container.decode(stream):
            return make_jpeg(frame, orientation(frame))
    return b""


def _pictures(found: Sequence[Outcome]) -> Iterator[bytes]:
    until_s = time.monotonic() + PICTURES_S

    def picture(outcome: Outcome) -> bytes:
        if time.monotonic() > until_s:
            return b""
        try:
            return small_picture(outcome.item.uri)
        except Exception as error:  # noqa: BLE001 (a report goes without a picture rather than not at all)
            logger.info("no picture uri=%s error=%s", outcome.item.uri, error)
            return b""

    with ThreadPoolExecutor(PICTURE_THREADS) as threads:
        yield from threads.map(picture, found)


def _text(index: ResultIndex, outcome: Outcome) -> str:
    session = Session(outcome.item.stream_id, outcome.item.session)
    lines = (line for result in index.results(session) if (line := line_of(result)))
    text = next(lines, "")
    return text if len(text) <= TEXT_CHARS else f"{text[:TEXT_CHARS]}…"


def _facts(found: Sequence[Outcome], samples: Sequence[RunSample]) -> str:
    states = count_states(found)
    runs = [list(group)[-1] for _, group in groupby(samples, key=lambda sample: sample.run_s)]
    video_s, took_s = sum(run.video_s for run in runs), sum(run.took_s for run in runs)
    facts = [
        (f"{states['done'] + states['damaged']:,}", "videos done"),
        (f"{states['failed']:,}", "failed"),
        (f"{states['waiting']:,}", "still to do"),
        (f"{states['damaged']:,}", "of those done damaged in places"),
        (long_time(video_s), "of video looked at"),
        (long_time(took_s), f"of work in {len(runs):,} run(s)"),
        (f"{video_s / took_s:.1f} ×" if took_s else "–", "real time"),
        (f"{sum(run.answers for run in runs):,}", "captions and answers"),
    ]
    if runs and runs[-1].busy:
        facts.append((escape(bottleneck(runs[-1].busy)), "bottleneck at the end"))
    return '<div class="facts">' + "".join(f"<div><b>{value}</b>{name}</div>" for value, name in facts) + "</div>"


def _chart(samples: Sequence[RunSample]) -> str:
    """Return how many times real time it went, over the time that the runs worked."""
    points: list[tuple[float, float]] = []
    before_s = 0.0
    for _, run in groupby(samples, key=lambda sample: sample.run_s):
        steps = list(run)
        steps.insert(0, RunSample(steps[0].time_s - steps[0].took_s, 0.0, 0.0, 0, 0, 0))
        for a, b in pairwise(steps):
            if b.took_s > a.took_s:
                points.append((before_s + b.took_s, (b.video_s - a.video_s) / (b.took_s - a.took_s)))
        before_s += steps[-1].took_s
    if len(points) < 2:
        return ""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    points = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    top, last_s = max(1.0, *(y for _, y in points)), points[-1][0]
    line = " ".join(f"{50 + 740 * x / last_s:.1f},{170 - 150 * max(0.0, y) / top:.1f}" for x, y in points)
    return (
        "<h2>Speed</h2>"
        '<svg viewBox="0 0 800 200" role="img" aria-label="times real time, over the time of work">'
        f'<text x="4" y="24">{top:.0f} ×</text><text x="4" y="174">0</text><text x="50" y="194">0</text>'
        f'<text x="790" y="194" text-anchor="end">{escape(long_time(last_s))}</text>'
        f'<polyline points="{line}"/></svg><p class="dim">times real time, over the time of work</p>'
    )


def _failures(found: Sequence[Outcome]) -> str:
    failed = [outcome for outcome in found if outcome.state == "failed"]
    if not failed:
        return ""
    reasons = ", ".join(f"{n:,} × {escape(reason)}" for reason, n in Counter(o.reason for o in failed).most_common())
    items = "".join(
        f"<li><b>{escape(o.item.stream_id)}</b> <span class=bad>{escape(o.reason)}</span> "
        f"<span class=dim>{escape(o.detail[:TEXT_CHARS])}</span></li>"
        for o in failed[:MAX_FAILURES]
    )
    more = len(failed) - MAX_FAILURES
    rest = f"<p>and {more:,} more, in archive/videos.parquet</p>" if more > 0 else ""
    return f"<h2>Failed</h2><p>{reasons}</p><ul>{items}</ul>{rest}"


def _sheet(found: Sequence[Outcome], cards: Sequence[Card]) -> str:
    if not cards:
        return ""
    n_done = sum(outcome.state in ("done", "damaged") for outcome in found)
    note = f"<p class=dim>{len(cards):,} of {n_done:,}, evenly chosen</p>" if n_done > len(cards) else ""
    return f'<h2>Videos</h2>{note}<div class="sheet">{"".join(map(_figure, cards))}</div>'


def _figure(card: Card) -> str:
    if card.jpeg:
        data = base64.b64encode(card.jpeg).decode()
        picture = f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{data}">'
    else:
        picture = '<div class="none">no picture</div>'
    damaged = " <span class=bad>damaged in places</span>" if card.outcome.state == "damaged" else ""
    text = escape(card.text) or "<span class=dim>nothing was said of it</span>"
    name = escape(card.outcome.item.stream_id)
    return f"<figure>{picture}<figcaption><b>{name}</b>{text}{damaged}</figcaption></figure>"
