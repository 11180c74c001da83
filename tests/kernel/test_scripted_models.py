"""The kit's scripted model: a plugin's tool is tested through a task, without a provider."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Kit
from corral_plugins.tools.api import Tool, ToolContext, ToolFailure

pytestmark = pytest.mark.one_engine
MakeKit = Callable[..., Awaitable[Kit]]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def forecast(context: ToolContext, arguments: dict[str, Any]) -> dict[str, str]:
    if arguments["city"] == "Atlantis":
        raise ToolFailure("unknown_city", "There is no such city.")
    return {"weather": f"rain in {arguments['city']}"}


class WeatherPlugin(Plugin):
    """Weather."""

    name = "weather"
    wants = ("tools",)

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        return [
            Tool(
                name="weather.forecast",
                title="Forecast",
                description="Return the weather of tomorrow.",
                risk="read",
                schema=CITY,
                run=forecast,
                permission="tasks.read",
            )
        ]


def asks(city: str) -> dict[str, Any]:
    return {"tool_calls": [{"name": "weather__forecast", "arguments": {"city": city}}]}


MODELS: dict[str, Any] = {
    "helper": [asks("Oslo"), asks("Atlantis"), {"text": "It rains.", "usage": {"prompt_tokens": 30}}],
    "offline": [{"error": {"status": 400, "message": "No luck."}}],
}


async def test_a_tool_is_tested_through_a_task(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[WeatherPlugin], models=MODELS)
    done = await kit.run_task("How is the weather?", model="helper", tools=["weather.forecast"])
    assert (done["status"], done["result"]) == ("completed", {"text": "It rains."})
    oslo, atlantis = done["tool_calls"]
    assert (oslo["tool"], oslo["status"], oslo["result"]) == (
        "weather.forecast",
        "succeeded",
        {"weather": "rain in Oslo"},
    )
    assert (atlantis["status"], atlantis["error"]["type"]) == ("failed", "unknown_city")
    assert done["cost"]["input_tokens"] >= 30
    failed = await kit.run_task("Fail.", model="offline", retry_policy={"max_attempts": 1})
    assert (failed["status"], failed["tool_calls"]) == ("failed", [])
    assert "No luck." in failed["error"]["message"]
