"""A tool with broken code or a broken schema is not allowed by mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from tests.plugins.tools.conftest import TEXT, World

from corral.plugin import Plugin, hookimpl
from corral_plugins.tools.api import Json, Tool, ToolContext

pytestmark = pytest.mark.one_engine


def _raise(*given: Any) -> Any:
    raise RuntimeError("a bug")


def _run(context: ToolContext, arguments: Json) -> Any:
    return "ran"


class OddPlugin(Plugin):
    """Tools with bugs."""

    name = "odd"
    wants = ("tools",)

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        common: dict[str, Any] = {"title": "t", "description": "d", "risk": "write", "schema": TEXT, "run": _run}
        return [
            Tool(name="odd.sees", **common | {"is_visible": _raise}),
            Tool(name="odd.admits", **common | {"admits": _raise}),
            Tool(name="odd.target", **common | {"target": _raise}),
            Tool(name="odd.asks", **common | {"asks": lambda context, arguments: True}),
            Tool(name="odd.doubts", **common | {"asks": _raise}),
            Tool(name="odd.schema", **common | {"schema": {"properties": {"text": {"type": "nothing"}}}}),
            Tool(name="odd.result", **common | {"run": lambda context, arguments: object()}),
            Tool(name="odd.fine", **common),
        ]


@pytest.mark.parametrize(
    ("tool", "status", "reason"),
    [
        ("odd.sees", 403, "requester_lacks_permission"),
        ("odd.admits", 403, "config"),
        ("odd.target", 403, "policy"),
        ("odd.asks", 403, "policy"),
        ("odd.doubts", 403, "policy"),
        ("odd.schema", 422, "invalid_arguments"),
        ("odd.fine", 200, None),
    ],
)
async def test_what_cannot_judge_does_not_allow(
    make_kit: Callable[..., Any], tool: str, status: int, reason: str | None
) -> None:
    world = await World().build(make_kit, more=(OddPlugin,))
    run = await world.run("odd.*")
    assert (await run.say(tool)).status == status
    assert (await run.calls())[0]["reason"] == reason


async def test_a_result_that_is_no_json_is_a_bug_of_the_tool(make_kit: Callable[..., Any]) -> None:
    world = await World().build(make_kit, more=(OddPlugin,))
    run = await world.run("odd.*")
    call = (await run.say("odd.result")).json()
    assert (call["status"], call["error"]["type"]) == ("failed", "internal")
