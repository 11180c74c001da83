"""What the tests of agents share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from corral.events.log import EventRow
from corral.testing.kit import Client, Kit

Payloads = Callable[..., Awaitable[list[dict[str, Any]]]]


async def payloads_of(kit: Kit, *types: str) -> list[dict[str, Any]]:
    """The payloads of all events of these types in the order of their writing, numbered or not."""

    def read() -> list[dict[str, Any]]:
        rows = EventRow.select(EventRow.data).where(EventRow.type.in_(types)).order_by(EventRow.ins)
        return [msgspec.json.decode(row.data) for row in rows]

    return await kit.kernel.database.work(read, read=True)


@pytest.fixture
def payloads() -> Payloads:
    """`await payloads(kit, "agent.status")`."""
    return payloads_of


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
