"""The `corral_tools` hook."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from corral.plugin import Plugin, hookimpl
from corral_plugins.tools.api import Json, Tool, ToolContext


def _shout(context: ToolContext, arguments: Json) -> str:
    return str(arguments["text"]).upper()


class ShoutPlugin(Plugin):
    """A plugin with a good tool, and tools whose names are taken."""

    name = "shout"
    wants = ("tools",)

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        common: dict[str, Any] = {"title": "Shout", "description": "Louder.", "risk": "read", "schema": {}}
        return [Tool(name=name, run=_shout, **common) for name in ("shout.text", "shout.text", "http.fetch")]


@pytest.mark.one_engine
async def test_corral_tools(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=["tools", ShoutPlugin])
    assert kit.loaded("tools").active, kit.loaded("tools").reason
    reader = await kit.as_user("viewer")
    found = {tool["name"]: tool["source"] for tool in (await reader.get("/tools")).json()["items"]}
    assert found == {"http.fetch": "plugin:tools", "http.request": "plugin:tools", "shout.text": "plugin:shout"}


class DotlessPlugin(Plugin):
    """A plugin with a tool whose name has no dot."""

    name = "dotless"
    wants = ("tools",)

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        return [Tool(name="dotless", title="Dotless", description="Has no dot.", risk="read", schema={}, run=_shout)]


@pytest.mark.one_engine
async def test_a_tool_without_a_dot_makes_its_plugin_failed(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=["tools", DotlessPlugin])
    failed = kit.loaded("dotless")
    assert failed.state == "failed"
    assert "corral_tools contains an invalid item: Expected `str` matching regex" in str(failed.reason)
    assert kit.loaded("tools").active


@pytest.mark.one_engine
async def test_a_plugin_out_of_service_takes_its_tools_along(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=["tools", ShoutPlugin])
    reader = await kit.as_user("viewer")
    assert (await reader.get("/tools/shout.text")).status == 200
    kit.kernel.registry.change_state("shout", "disabled", "for a test")
    assert (await reader.get("/tools/shout.text")).status == 404
