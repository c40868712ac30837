"""Facts asked over the API about a generated feed: right answers about its last minute, and about one an hour back.

    python benchmarks/answers.py [--streams 2]

Publishes held-out worlds of shapes of a bit more than an hour, as fast as they can be drawn, to an embedded broker;
runs the lanes and the service on them; and asks the official OpenAI client's way, about ranges of eight seconds inside
each minute and about each minute whole. The truth follows from the worlds. The last minute comes out of the token
store's memory, the one an hour back out of Parquet.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
from measuring import free_port

from stormline.infra.broker import EmbeddedBroker
from stormline.models.training.clips import HELD_OUT_SEED
from stormline.models.training.questions import KINDS, NEEDLE_KINDS, Question, WindowView, ask, exact
from stormline.models.training.shapes import ShapesSpec, ShapesWorld
from stormline.pipeline.front.address import base_url
from stormline.pipeline.front.stream_urls import make_stream_url
from stormline.pipeline.settings import Settings
from stormline.pipeline.supervisor import RunStatus, Supervisor

RESULT = Path(__file__).parent / "results" / "answers.json"
LENGTH_S = 3720  # of a feed: two minutes more than an hour
MINUTES = {"last minute": LENGTH_S - 60, "an hour back": LENGTH_S - 3660}  # where each starts
SHORT_S, STEP_S = 8, 4  # ranges inside a minute, in whole chunks
SIZE_PX = 128
SEED = HELD_OUT_SEED + (255 << 32)  # a stream of worlds that neither training nor evaluation draws from
FACTS = [kind for kind in KINDS if kind not in (*NEEDLE_KINDS, "caption", "actions", "after")]
ASKERS = 8


@dataclass(frozen=True)
class Fact:
    """A question about [start_s, stop_s) of a feed."""

    stream: int
    minute: str
    start_s: int
    stop_s: int
    question: Question

    @property
    def span(self) -> str:
        return "whole minute" if self.stop_s - self.start_s == 60 else f"{SHORT_S} s"


def draw_facts(stream: int, per_range: int) -> Iterator[Fact]:
    """Draw questions about both minutes of a feed, as many for each."""
    world = ShapesWorld(ShapesSpec(seed=SEED + stream, size_px=SIZE_PX))
    for minute, begin_s in MINUTES.items():
        ranges = [(begin_s + k, begin_s + k + SHORT_S) for k in range(0, 60 - SHORT_S + 1, STEP_S)]
        for start_s, stop_s in [*ranges, (begin_s, begin_s + 60)]:
            rng = np.random.default_rng([stream, start_s, stop_s])
            n = per_range if stop_s - start_s == SHORT_S else 5 * per_range
            for question in ask(WindowView(world, start_s, stop_s), rng, n, dict.fromkeys(FACTS, 1.0)):
                yield Fact(stream, minute, start_s, stop_s, question)


def publish(bootstrap: str, streams: int) -> None:
    """Publish all feeds at once, each from its own process."""
    command = [sys.executable, "-m", "stormline.pipeline", "publish", "--bootstrap", bootstrap, "--topic", "video"]
    running = [
        subprocess.Popen(
            [
                *command,
                f"shapes:?seed={SEED + k}&size={SIZE_PX}&duration={LENGTH_S}",
                *("--stream-id", f"feed-{k}", "--speed", "0", "--segment-s", "2"),
            ],
            stdout=subprocess.DEVNULL,
        )
        for k in range(streams)
    ]
    for process in running:
        if process.wait() != 0:
            raise RuntimeError(f"a publisher ended with {process.returncode}")


def ask_all(url: str, facts: list[Fact]) -> list[tuple[Fact, str]]:
    """Ask over the API, several at a time."""
    with openai.OpenAI(base_url=url, api_key="none", timeout=120) as client:
        listed: Any = client.get("/streams", cast_to=object)
        began = {stream["id"]: np.datetime64(stream["first_time"].removesuffix("Z"), "ms") for stream in listed["data"]}

        def answer(fact: Fact) -> tuple[Fact, str]:
            name = f"feed-{fact.stream}"
            start, end = (f"{began[name] + np.timedelta64(s, 's')}Z" for s in (fact.start_s, fact.stop_s))
            part: Any = {"type": "video_url", "video_url": {"url": make_stream_url(name, start=start, end=end)}}
            content = [part, {"type": "text", "text": fact.question.prompt}]
            reply = client.chat.completions.create(
                model="stormline", messages=[{"role": "user", "content": content}], max_tokens=16, temperature=0
            )
            return fact, reply.choices[0].message.content or ""

        with ThreadPoolExecutor(ASKERS) as pool:
            return list(pool.map(answer, facts))


def tally(answers: list[tuple[Fact, str]], name: Callable[[Fact], str]) -> dict[str, dict[str, Any]]:
    """Return asked and right by what `name` says of a fact, in each minute."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for fact, text in answers:
        count = counts[name(fact), fact.minute]
        count[0] += 1
        count[1] += exact(text, fact.question.answer)
    told: dict[str, dict[str, Any]] = defaultdict(dict)
    for (what, minute), (asked, right) in sorted(counts.items()):
        told[what][minute] = {"asked": asked, "right": right, "share": round(right / asked, 3)}
    return dict(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--per-range", type=int, default=6, help="questions about each range of eight seconds")
    options = parser.parse_args()
    facts = [fact for k in range(options.streams) for fact in draw_facts(k, options.per_range)]
    answers: list[tuple[Fact, str]] = []
    failed: list[BaseException] = []
    with EmbeddedBroker() as broker, tempfile.TemporaryDirectory() as folder:
        broker.create_topic("video", partitions=options.streams)
        began_s = time.monotonic()
        publish(broker.bootstrap_servers, options.streams)
        print(f"published {options.streams} feeds of {LENGTH_S} s in {time.monotonic() - began_s:.0f} s", flush=True)
        settings = Settings.model_validate(
            {
                "kafka": {"bootstrap_servers": broker.bootstrap_servers, "topics": ["video"], "start": "earliest"},
                "output": {"path": folder},
                "serve": {"enabled": True, "port": free_port()},
                "store": {"max_bytes": 2 << 20},  # some minutes of each feed
                "queries": [],
            }
        )
        supervisor = Supervisor(settings, print)
        asking: list[threading.Thread] = []

        def ask_and_stop() -> None:
            try:
                answers.extend(ask_all(base_url(settings.serve), facts))
            except BaseException as error:  # noqa: BLE001 (told below, in the main thread)
                failed.append(error)
            supervisor.request_stop()

        def on_status(status: RunStatus) -> None:
            if not asking and status.lag_records == 0 and status.segments and status.idle_s > 3:
                print(f"{status.segments} segments encoded; asking {len(facts)} questions", flush=True)
                asking.append(threading.Thread(target=ask_and_stop))
                asking[0].start()

        supervisor.run(on_status=on_status)
    if failed:
        raise failed[0]
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "model": "shapes-tiny",
        "streams": options.streams,
        "right": tally(answers, lambda fact: "all"),
        "by_span": tally(answers, lambda fact: fact.span),
        "by_kind": tally([a for a in answers if a[0].span != "whole minute"], lambda fact: fact.question.kind),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
