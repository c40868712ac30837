"""What the integration tests share: one real broker for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stormline.infra.broker import EmbeddedBroker


@pytest.fixture(scope="session")
def broker() -> Iterator[str]:
    """Yield the address, ``127.0.0.1:PORT``, of a broker that lives as long as the test session."""
    with EmbeddedBroker() as embedded:
        yield embedded.bootstrap_servers
