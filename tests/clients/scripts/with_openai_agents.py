# /// script
# dependencies = ["openai-agents==0.24.0"]
# ///
"""The OpenAI Agents SDK."""

from __future__ import annotations

import asyncio
import os
from importlib.metadata import version

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI, NotFoundError

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=os.environ["CORRAL_URL"], api_key=os.environ["CORRAL_KEY"])


@function_tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"rain in {city}"


def agent(model: str) -> Agent:
    tools = [weather] if model.endswith("weather") else []
    return Agent(name="A", model=OpenAIChatCompletionsModel(model=model, openai_client=client), tools=tools)


async def main() -> None:
    assert (await Runner.run(agent("scripted/echo"), "Hello")).final_output == "Hello"
    streamed = Runner.run_streamed(agent("scripted/echo"), "Hello")
    kinds = [event.type async for event in streamed.stream_events()]
    assert "raw_response_event" in kinds
    assert streamed.final_output == "Hello"
    called = await Runner.run(agent("scripted/weather"), "How is the weather?")
    assert called.final_output == "It rains."
    assert "rain in Bern" in str(called.to_input_list())
    assert "scripted/echo" in [model.id async for model in client.models.list()]
    try:
        await Runner.run(agent("nobody/nothing"), "Hello")
    except NotFoundError as error:
        assert error.code == "model_not_found"
    else:
        raise AssertionError("an unknown model was accepted")


asyncio.run(main())
print("openai-agents", version("openai-agents"))
