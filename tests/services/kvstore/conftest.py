"""The store that most tests of the wire use."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.services.kvstore.served_store import Service, served_store


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with served_store() as service:
        yield service
