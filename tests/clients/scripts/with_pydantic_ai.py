# /// script
# dependencies = ["pydantic-ai-slim[openai]==2.68.0"]
# ///
"""Pydantic AI."""

from __future__ import annotations

import os
from importlib.metadata import version

from openai import AsyncOpenAI
from pydantic_ai import Agent, ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

client = AsyncOpenAI(base_url=os.environ["CORRAL_URL"], api_key=os.environ["CORRAL_KEY"])


def agent(model: str) -> Agent:
    return Agent(OpenAIChatModel(model, provider=OpenAIProvider(openai_client=client)))


asking = agent("scripted/weather")


@asking.tool_plain
def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"rain in {city}"


async def main() -> None:
    whole = await agent("scripted/echo").run("Hello")
    assert whole.output == "Hello"
    async with agent("scripted/echo").run_stream("Hello there, how are you?") as streamed:
        assert "".join([part async for part in streamed.stream_text(delta=True)]) == "Hello there, how are you?"
    called = await asking.run("How is the weather?")
    assert called.output == "It rains."
    assert "rain in Bern" in str(called.all_messages())
    assert "scripted/echo" in [model.id async for model in client.models.list()]
    try:
        await agent("nobody/nothing").run("Hello")
    except ModelHTTPError as error:
        assert error.status_code == 404
        assert "There is no model nobody/nothing" in str(error)
    else:
        raise AssertionError("an unknown model was accepted")


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
    print("pydantic-ai-slim", version("pydantic-ai-slim"))
