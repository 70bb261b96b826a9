"""A client of the server for the tests that only ask."""

from collections.abc import Iterator

import httpx
import pytest


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client:
        yield client
