"""What the tests of agents share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from corral.testing.kit import Client, Kit


@pytest.fixture
async def kit(make_kit: Callable[..., Awaitable[Kit]]) -> Kit:
    """A kernel with agents alone: whoever they want is absent."""
    return await make_kit(plugins=["agents"])


@pytest.fixture
async def alice(kit: Kit) -> Client:
    """A member."""
    return await kit.as_user("member")


@pytest.fixture
async def admin(kit: Kit) -> Client:
    """An admin."""
    return await kit.as_user("admin")
