"""A scripted gateway for the client and the command line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kvmesh.fake_gateway import FakeGateway


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    fake = FakeGateway()
    yield fake
    fake.close()
