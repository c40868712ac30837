"""Asking: what a stream's length costs, and what asking together gains.

    python benchmarks/ask.py [--rounds 30] [--seconds 40]

Writes two streams of tokens to Parquet, as lanes would: ten hours and one minute. Over the HTTP service, in turns and
with the same budget, it asks about all of each, and takes the time to the first token. Then one questioner asks without
a pause, and eight do: answers a second, same questions, same number of words. At last, the time to the first token
while others ask without a pause, each time about another stretch, whose video has to be read anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import threading
import time
from http import HTTPStatus
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from measuring import free_port, write_result

from stormline.models.loading import load_model
from stormline.models.training.evaluate import stream_clip
from stormline.models.training.shapes import ShapesSpec, ShapesWorld
from stormline.operators.rows import Chunk, Position
from stormline.pipeline.embedded_ray import embedded_ray
from stormline.pipeline.front.address import base_url
from stormline.pipeline.front.stream_urls import make_stream_url
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.recovery import recover
from stormline.pipeline.settings import Settings, load_settings

BEGIN_NS = 1_790_000_000 * 10**9
CHUNK_NS = 2 * 10**9
CHUNKS = {"ten hours": 18_000, "one minute": 30}
CHUNKS_PER_COMMIT = 150  # five minutes in a file
BUDGET_TOKENS = 256
WORDS = 24
TURNS = 8  # of one questioner and of eight
OTHERS = (0, 3, 15)  # who ask at the same time
QUESTION = "Describe what happens."


def write_streams(out: Path) -> None:
    """Commit both streams' tokens: a generated minute as the model encodes it, over and over."""
    identity = {"model": "any"}
    start = recover(out, lanes=1, identity=identity).for_lane(0, (("video", 0),))
    writer = EpochWriter(start, model="shapes-tiny", identity=identity)
    frames = ShapesWorld(ShapesSpec(seed=5, size_px=64)).render_many(np.arange(4 * CHUNKS["one minute"]) / 2)
    seen = [chunk.tokens for chunk in stream_clip(load_model(None, device="cpu"), frames)]
    offset = 0
    for stream, n_chunks in CHUNKS.items():
        for first in range(0, n_chunks, CHUNKS_PER_COMMIT):
            chunks = []
            for index in range(first, min(first + CHUNKS_PER_COMMIT, n_chunks)):
                tokens = seen[index % len(seen)]
                begin_ns = BEGIN_NS + index * CHUNK_NS
                place = ("video", 0, offset, 0)
                chunks.append(
                    Chunk(stream, "s", index, begin_ns, begin_ns + CHUNK_NS, BEGIN_NS, 4, 0.5, *place, tokens)
                )
                offset += 1
            writer.commit(chunks=chunks, results=[], positions=[Position("video", 0, offset)], snapshots={})


class Questioner:
    """Asks over HTTP, on a connection of its own that is kept: of the two cores it takes as little as it can."""

    def __init__(self, settings: Settings):
        url = urlsplit(base_url(settings.serve))
        self._connection = HTTPConnection(str(url.hostname), url.port, timeout=120)

    def first_token_s(self, stream: str, last: str = "10h") -> float:
        """Return the time to an answer's first token; reads the answer to its end."""
        began_s = time.perf_counter()
        first_s = None
        for line in self._ask(stream, last, stream_answer=True):
            event = line.removeprefix(b"data: ").strip()
            if first_s is None and event.startswith(b"{"):
                choices = json.loads(event)["choices"]
                if choices and choices[0]["delta"].get("content"):
                    first_s = time.perf_counter() - began_s
        assert first_s is not None, "an answer without a word"
        return first_s

    def answer(self, stream: str, last: str = "10h") -> None:
        """Wait for a whole answer."""
        told = json.loads(self._ask(stream, last, stream_answer=False).read())
        assert told["choices"][0]["message"]["content"], told

    def _ask(self, stream: str, last: str, *, stream_answer: bool) -> HTTPResponse:
        part = {"type": "video_url", "video_url": {"url": make_stream_url(stream, last=last)}}
        body = {
            "model": "stormline",
            "messages": [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}],
            "max_tokens": WORDS,
            "temperature": 0,
            "stream": stream_answer,
            "token_budget": BUDGET_TOKENS,
        }
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = self._connection.getresponse()
        if response.status != HTTPStatus.OK:
            raise RuntimeError(f"the service answered {response.status}: {response.read()[:500]!r}")
        return response


def answers_per_s(settings: Settings, n_questioners: int, seconds: float) -> float:
    """Return how many answers a second so many questioners get together."""
    until_s = time.monotonic() + seconds
    counts = [0] * n_questioners

    def go_on(k: int) -> None:
        ask = Questioner(settings)
        while time.monotonic() < until_s:
            ask.answer("ten hours")
            counts[k] += 1

    began_s = time.monotonic()
    threads = [threading.Thread(target=go_on, args=(k,)) for k in range(n_questioners)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - began_s)


def first_token_under_load_ms(settings: Settings, n_others: int, rounds: int) -> dict[str, float]:
    """Return the time to the first token while so many others ask, all about stretches that nobody asked about."""
    stretches = itertools.cycle([f"{minutes}m" for minutes in range(30, 600)])
    done = threading.Event()

    def go_on() -> None:
        ask = Questioner(settings)
        while not done.is_set():
            ask.answer("ten hours", next(stretches))

    threads = [threading.Thread(target=go_on) for _ in range(n_others)]
    for thread in threads:
        thread.start()
    ask, took_ms = Questioner(settings), []
    for turn in range(rounds + 2):
        each_s = ask.first_token_s("ten hours", next(stretches))
        if turn >= 2:  # all are at it
            took_ms.append(1e3 * each_s)
    done.set()
    for thread in threads:
        thread.join()
    return {"p50": round(statistics.median(took_ms), 1), "p95": round(float(np.percentile(took_ms, 95)), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each part of the second measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(None, [f"output.path={folder}", "serve.enabled=true", f"serve.port={free_port()}"])
        with embedded_ray(settings, print):
            from stormline.pipeline.serving import services

            with services(settings):
                write_streams(Path(folder))
                ask = Questioner(settings)
                times: dict[str, list[float]] = {stream: [] for stream in CHUNKS}
                for turn in range(options.rounds + 2):
                    for stream in CHUNKS:
                        took_s = ask.first_token_s(stream)
                        if turn >= 2:  # warmed up
                            times[stream].append(took_s)
                medians = {stream: statistics.median(series) for stream, series in times.items()}
                rates: dict[int, list[float]] = {1: [], 8: []}
                for _ in range(TURNS):  # these machines are not quiet
                    for n, series in rates.items():
                        series.append(answers_per_s(settings, n, options.seconds / TURNS))
                under_load = {f"{n} others": first_token_under_load_ms(settings, n, options.rounds) for n in OTHERS}
    one, eight = (statistics.mean(rates[n]) for n in (1, 8))
    report = {
        "budget_tokens": BUDGET_TOKENS,
        "first_token_ms": {stream: round(s * 1e3, 1) for stream, s in medians.items()},
        "ten_hours_over_one_minute": round(medians["ten hours"] / medians["one minute"], 3),
        "goal_ten_hours_over_one_minute": 1.2,
        "answers_per_s": {"one questioner": round(one, 2), "eight questioners": round(eight, 2)},
        "eight_over_one": round(eight / one, 2),
        "eight_over_one_by_turn": sorted(round(b / a, 2) for a, b in zip(rates[1], rates[8], strict=True)),
        "goal_eight_over_one": 4.0,
        "first_token_under_load_ms": under_load,
    }
    write_result("ask", report, ["ray"])


if __name__ == "__main__":
    main()
