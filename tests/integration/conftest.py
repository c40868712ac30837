"""What the integration tests share: one real broker, one local Ray and one Serve application for the session."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from free_port import free_port

from stormline.infra.broker import EmbeddedBroker
from stormline.pipeline.embedded_ray import SERVE_ENVIRONMENT

HOLD_S = 30  # of an answer that is held back
PLUGINS = Path(__file__).parents[1] / "plugins"
RAY_CPUS = 7  # logical: two lanes and the services


@pytest.fixture(scope="session")
def broker() -> Iterator[str]:
    """Yield the address, ``127.0.0.1:PORT``, of a broker that lives as long as the test session."""
    with EmbeddedBroker() as embedded:
        yield embedded.bootstrap_servers


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """Yield the address of a local Ray that lives as long as the test session."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SERVE_ENVIRONMENT.items():
            patch.setenv(name, value)
        for folder in (PLUGINS.parent, PLUGINS):  # what tests share, and what its processes die of
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        context = ray.init(
            address="local",
            num_cpus=RAY_CPUS,
            object_store_memory=300 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="WARNING",
        )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@dataclass(frozen=True)
class Services:
    """Where the services of the session are."""

    url: str  # of the HTTP front, http://127.0.0.1:PORT
    out: Path  # the output folder that it answers from
    key: str  # what it wants to see


@pytest.fixture(scope="session")
def services(ray_session: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Keep the LLM, the token store and the HTTP front up for the session, so that lanes start quickly."""
    from stormline.pipeline.front.access import new_key
    from stormline.pipeline.serving import services as running
    from stormline.pipeline.settings import load_settings

    out = tmp_path_factory.mktemp("served")
    key, digest = new_key()
    port = free_port()
    options = ["serve.enabled=true", f"serve.port={port}", f"serve.keys=[{digest}]", "serve.token_budget=64"]
    with running(load_settings(None, [f"output.path={out}", *options])):
        yield Services(f"http://127.0.0.1:{port}", out, key)


@pytest.fixture(scope="session")
def queries() -> str:
    """Return a lane's standing queries: captions, an alert with a caption of each of its windows, and scenes."""
    ask = "prompt: 'Does anything appear?', window_s: 2, max_new_tokens: 4"
    return (
        "queries=[{id: caption, window_s: 4, max_new_tokens: 8}, {id: scene, scenes: true, max_new_tokens: 8}, "
        f"{{id: appears, kind: alert, {ask}}}, {{id: watched, {ask}}}]"
    )


@pytest.fixture
def make_settings(broker: str, tmp_path: Path, queries: str) -> Callable[..., Any]:
    """Return a function that makes settings for a topic, quick enough for a test."""
    from stormline.pipeline.settings import load_settings

    def make(topic: str, out: str = "out", *overrides: str) -> Any:
        return load_settings(
            None,
            [
                f"kafka.bootstrap_servers={broker}",
                f"kafka.topics=[{topic}]",
                f"output.path={tmp_path / out}",
                "lanes.barrier_interval_s=0.3",
                queries,
                *overrides,
            ],
        )

    return make


class Receiver:
    """A webhook's other end: notes what comes, and answers as it is told to, then with 204."""

    def __init__(self, answers: Sequence[int | None] = ()):
        self.got = []
        self.answers = list(answers)
        self.hold_after = None  # received and not answered, from then on
        self.released = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((dict(self.headers), body))
                if receiver.hold_after is not None and len(receiver.got) > receiver.hold_after:
                    receiver.released.wait(HOLD_S)
                answer = receiver.answers.pop(0) if receiver.answers else 204
                if answer is None:
                    self.connection.close()  # hangs up
                    return
                self.send_response(answer)
                self.send_header("Content-Length", "0")
                self.send_header("Location", f"{receiver.url}/elsewhere")
                self.end_headers()

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def ids(self):
        return [{k.lower(): v for k, v in headers.items()}["webhook-id"] for headers, _ in self.got]

    @property
    def answers_told(self):
        return [json.loads(body)["data"]["answer"] for _, body in self.got]

    def close(self):
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Yield a webhook's other end, on this machine."""
    made = Receiver()
    yield made
    made.close()
