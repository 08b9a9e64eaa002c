"""What the tests of the disk tier share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tier_folder import Host


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()
