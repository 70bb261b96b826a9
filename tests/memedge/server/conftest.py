"""One server for the tests that only ask."""

from collections.abc import Iterator

import httpx
import pytest
from servers import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """A server of the embedded engine that several tests ask."""
    with serving(tmp_path_factory.mktemp("server"), "--provider", "cpu") as server:
        yield server


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client:
        yield client
