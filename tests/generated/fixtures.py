"""The world of the generated tests as fixtures, on each engine; `conftest` modules that want them import them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import distribution
from typing import Any

import pytest
import pytest_asyncio
from tests.generated.world import CONFIG, World
from tests.plugins.tools.mcp_servers import InMemoryMcp, described, mcp_plugin

from corral.plugin import Plugin

# Every plugin of Corral's own, and one that reaches an MCP server, without which none could be added.
PLUGINS: list[type[Plugin] | str] = [
    *sorted(each.name for each in distribution("corral").entry_points if each.group == "corral.plugins"),
    mcp_plugin(InMemoryMcp(default=[described("sample")])),
]


@pytest.fixture
async def make_world(make_kit: Callable[..., Any]) -> Callable[..., Awaitable[World]]:
    """`world = await make_world(**options of make_kernel)`."""

    async def make(**options: Any) -> World:
        return await World().build(await make_kit(**{"config": CONFIG, "plugins": PLUGINS, **options}))

    return make


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(make_shared_kit: Callable[..., Any]) -> World:
    """Every active plugin, people and machines, for all tests of the module that do not end what they find."""
    return await World().build(await make_shared_kit(config=CONFIG, plugins=PLUGINS))
