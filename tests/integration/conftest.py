"""What the integration tests share: one real broker, one local Ray and one Serve application for the session."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stormline.infra.broker import EmbeddedBroker
from stormline.pipeline.supervisor import PROXY_START_S

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

    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(PROXY_START_S))
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["serve.enabled=true", f"serve.port={port}", f"serve.keys=[{digest}]", "serve.token_budget=64"]
    with running(load_settings(None, [f"output.path={out}", *options])):
        yield Services(f"http://127.0.0.1:{port}", out, key)


@pytest.fixture
def make_settings(broker: str, tmp_path: Path) -> Callable[..., Any]:
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
                "queries=[{id: caption, window_s: 4, max_new_tokens: 8}]",
                *overrides,
            ],
        )

    return make
