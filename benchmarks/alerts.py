"""A standing alert on live generated feeds: from the event's frame to the alert, and how many are right.

    python benchmarks/alerts.py [--minutes 5] [--streams 2] [--window 4] [--model FOLDER]

Publishes feeds of moving shapes at their own speed, each from its own process, to an embedded broker; runs one lane
with one alert ("Does anything appear?") that goes to a webhook on this machine; and compares what the webhook got with
what the feeds really showed. Truth is told by windows, as the alert is asked: an occurrence is a run of windows in each
of which it happens. Windows that cut through an event, so that frames may or may not show it, count neither way.

Latency is by the clock of this machine: from when the frame was due in the feed to when the webhook had the alert. Of
it, the event waits for its window to end (half a window on average), the window for its answer, the answer for the
next commit (every `barrier_interval_s`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow.dataset as ds
from measuring import write_result

from stormline.infra.broker import EmbeddedBroker
from stormline.models.training.clips import FEEDS_SEED
from stormline.models.training.questions import WindowView
from stormline.models.training.shapes import ShapesWorld, parse_shapes_url
from stormline.pipeline.settings import Settings
from stormline.pipeline.supervisor import RunStatus, Supervisor

PROMPT, KIND = "Does anything appear?", "appears"
FEED = "shapes:?seed={seed}&size=256&fps=10&edges=leave"
FIRST_SEED = FEEDS_SEED + 9_000
BARRIER_S = 1.0
CHUNK_S = 2.0


class Receiver:
    """A webhook's other end, which notes when what came."""

    def __init__(self) -> None:
        self.got: dict[str, tuple[float, dict[str, Any]]] = {}
        self.posts = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                now_s = time.time()
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.posts += 1
                receiver.got.setdefault(message["id"], (now_s, message["data"]))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, daemon=True).start()


def seconds_of(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def start_publishers(bootstrap: str, feeds: dict[str, str]) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "stormline.pipeline", "publish"]
    options = ["--bootstrap", bootstrap, "--topic", "video", "--speed", "1", "--segment-s", "1"]
    return [
        subprocess.Popen(
            [*command, feed, *options, "--stream-id", name], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        for name, feed in feeds.items()
    ]


def windows_seen(folder: str, stream: str, window_s: float) -> tuple[float, int]:
    """Return when a stream's session began, and how many whole windows of it were committed."""
    rows = ds.dataset(f"{folder}/tokens", format="parquet").to_table(
        columns=["start_time", "end_time"], filter=ds.field("stream_id") == stream
    )
    start_s = min(t.timestamp() for t in rows["start_time"].to_pylist())
    end_s = max(t.timestamp() for t in rows["end_time"].to_pylist())
    return start_s, int((end_s - start_s) // window_s)


def runs(flags: list[bool | None]) -> list[range]:
    """Return the runs of windows in which it happens; one that cannot be told ends none."""
    found, start = [], None
    for i, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = i
        if flag is False and start is not None:
            found.append(range(start, i))
            start = None
    return found


def judge(world: ShapesWorld, start_s: float, n_windows: int, window_s: float, alerts: list[tuple[float, dict]]):
    """Return counts of a stream, and the latencies of its right alerts."""
    told = [WindowView(world, i * window_s, (i + 1) * window_s).happens(KIND) for i in range(n_windows)]
    occurrences = runs(told)
    found: set[int] = set()
    right = wrong = unclear = 0
    latencies = []
    for arrived_s, row in alerts:
        i = int((seconds_of(row["start_time"]) - start_s + 1e-6) // window_s)
        if i >= n_windows:
            continue
        hit = next((k for k, run in enumerate(occurrences) if i in run), None)
        if hit is not None:
            right += 1
            found.add(hit)
            events = [e.t_s for e in world.events(i * window_s, (i + 1) * window_s) if e.kind == KIND]
            latencies += [arrived_s - (start_s + events[0])] if events else []
        elif told[i] is None:
            unclear += 1
        else:
            wrong += 1
    counts = {
        "windows": n_windows,
        "windows_with_event": sum(flag is True for flag in told),
        "windows_unclear": sum(flag is None for flag in told),
        "occurrences": len(occurrences),
        "occurrences_found": len(found),
        "alerts_right": right,
        "alerts_wrong": wrong,
        "alerts_unclear": unclear,
    }
    return counts, latencies


def run(minutes: float, n_streams: int, window_s: float, model: str | None) -> dict[str, Any]:
    receiver = Receiver()
    feeds = {f"shapes-{i}": FEED.format(seed=FIRST_SEED + i) for i in range(n_streams)}
    publishers: list[subprocess.Popen] = []
    began_s = 0.0
    with EmbeddedBroker() as broker, tempfile.TemporaryDirectory() as folder:
        broker.create_topic("video", partitions=1)
        alert = {"id": KIND, "kind": "alert", "prompt": PROMPT, "window_s": window_s, "max_new_tokens": 4}
        settings = Settings.model_validate(
            {
                "kafka": {"bootstrap_servers": broker.bootstrap_servers, "topics": ["video"]},
                "output": {"path": folder},
                "model": {"path": model},
                "lanes": {"barrier_interval_s": BARRIER_S},
                "delivery": {"allow_private": True},
                "queries": [{**alert, "sinks": {"webhook": {"url": receiver.url}}}],
            }
        )
        supervisor = Supervisor(settings, print)

        def on_ready() -> None:
            nonlocal began_s
            began_s = time.monotonic()
            publishers.extend(start_publishers(broker.bootstrap_servers, feeds))

        def on_status(status: RunStatus) -> None:
            if publishers and time.monotonic() - began_s > minutes * 60:
                supervisor.request_stop()

        try:
            status = supervisor.run(on_status=on_status, on_ready=on_ready)
        finally:
            for publisher in publishers:
                publisher.terminate()
            for publisher in publishers:
                publisher.wait(20)
        total: dict[str, int] = {}
        latencies: list[float] = []
        for name, feed in feeds.items():
            start_s, n_windows = windows_seen(folder, name, window_s)
            mine = [(arrived_s, row) for arrived_s, row in receiver.got.values() if row["stream_id"] == name]
            counts, mine_s = judge(ShapesWorld(parse_shapes_url(feed)[0]), start_s, n_windows, window_s, mine)
            total = {key: total.get(key, 0) + n for key, n in counts.items()}
            latencies += mine_s
    cuts = statistics.quantiles(latencies, n=20) if len(latencies) > 1 else [0.0] * 19
    judged = total["alerts_right"] + total["alerts_wrong"]
    return {
        "model": status.model_name,
        "model_trained": status.model_trained,
        "prompt": PROMPT,
        "minutes": minutes,
        "streams": n_streams,
        "window_s": window_s,
        "chunk_s": CHUNK_S,
        "barrier_interval_s": BARRIER_S,
        "event_to_webhook_p50_s": round(cuts[9], 2),
        "event_to_webhook_p95_s": round(cuts[18], 2),
        "latencies_measured": len(latencies),
        "precision": round(total["alerts_right"] / judged, 3) if judged else None,
        "recall": round(total["occurrences_found"] / total["occurrences"], 3) if total["occurrences"] else None,
        **total,
        "posts_repeated": receiver.posts - len(receiver.got),
        "restarts": status.restarts,
        "committed_p50_ms": round(status.commit_p50_ms),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--window", type=float, default=4.0, help="seconds")
    parser.add_argument("--model", help="checkpoint folder; nothing: the built-in model")
    args = parser.parse_args()
    write_result("alerts", run(args.minutes, args.streams, args.window, args.model), ["ray"])


if __name__ == "__main__":
    main()
