"""The world of the generated tests as fixtures, on each engine; `conftest` modules that want them import them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.generated.world import CONFIG, World


@pytest.fixture
async def make_world(make_kit: Callable[..., Any]) -> Callable[..., Awaitable[World]]:
    """`world = await make_world(**options of make_kernel)`."""

    async def make(**options: Any) -> World:
        return await World().build(await make_kit(**{"config": CONFIG, **options}))

    return make


@pytest.fixture
async def world(make_world: Callable[..., Awaitable[World]]) -> World:
    """Every active plugin, people and machines."""
    return await make_world()
