"""The stock OpenAI client with the gateway's `base_url` and a Corral token as its key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest

pytestmark = pytest.mark.one_engine

CALL = {"name": "weather", "arguments": {"city": "Bern"}}
SCRIPTS = {"tools": {"turns": [{"tool_calls": [CALL]}, {"text": "It rains."}]}, "broken": {"turns": [{"error": {}}]}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASK: list[Any] = [{"role": "user", "content": "How is the weather?"}]


@pytest.fixture(scope="module")
def openai() -> Any:
    """Imported by the process that runs these tests, not by all that collect them: it takes more than a second."""
    return pytest.importorskip("openai")


@pytest.fixture
async def client(openai: Any, make_kit: Callable[..., Any], serve: Any) -> AsyncIterator[Any]:
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"scripts": SCRIPTS}})
    alice = await kit.as_user("member")
    async with httpx2.AsyncClient(trust_env=False) as http:
        yield openai.AsyncOpenAI(
            base_url=f"{await serve(kit)}/api/v1/llm", api_key=alice.token, http_client=http, max_retries=0
        )


async def test_llm_1_models_are_listed(client: Any) -> None:
    models = [model.id async for model in client.models.list()]
    assert "scripted/echo" in models
    assert (await client.models.retrieve("scripted/echo")).owned_by == "scripted"


async def test_llm_1_a_completion_and_a_stream(client: Any) -> None:
    whole = await client.chat.completions.create(model="scripted/echo", messages=ASK)
    assert (whole.choices[0].message.content, whole.model) == ("How is the weather?", "scripted/echo")
    assert whole.usage.total_tokens > 0
    asked = {"model": "scripted/echo", "messages": ASK, "stream": True}
    bare = [chunk async for chunk in await client.chat.completions.create(**asked)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in bare) == "How is the weather?"
    stream = await client.chat.completions.create(**asked, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "How is the weather?"
    assert chunks[-1].usage.completion_tokens > 0


async def test_llm_1_a_tool_is_called(client: Any) -> None:
    first = await client.chat.completions.create(model="scripted/tools", messages=ASK, tools=[TOOL])
    (call,) = first.choices[0].message.tool_calls
    assert (first.choices[0].finish_reason, call.function.name) == ("tool_calls", "weather")
    told = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    talk = [*ASK, first.choices[0].message.model_dump(), told]
    second = await client.chat.completions.create(model="scripted/tools", messages=talk, tools=[TOOL])
    assert second.choices[0].message.content == "It rains."


@pytest.mark.parametrize("dumped", [False, True])
async def test_a_message_assembled_by_the_client_is_accepted(client: Any, dumped: bool) -> None:
    async with client.chat.completions.stream(model="scripted/tools", messages=ASK, tools=[TOOL]) as stream:
        message = (await stream.get_final_completion()).choices[0].message
    told = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    talk = [*ASK, message.model_dump() if dumped else message, told]
    second = await client.chat.completions.create(model="scripted/tools", messages=talk, tools=[TOOL])
    assert second.choices[0].message.content == "It rains."


async def test_llm_1_embeddings(client: Any) -> None:
    found = await client.embeddings.create(model="scripted/words", input=["red", "blue"])
    assert [len(item.embedding) for item in found.data] == [256, 256]


async def test_llm_1_errors_are_shown(client: Any, openai: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="best_of"):
        await client.chat.completions.create(model="scripted/echo", messages=ASK, extra_body={"best_of": 2})
    with pytest.raises(openai.NotFoundError, match="There is no model") as missing:
        await client.chat.completions.create(model="nobody/nothing", messages=ASK)
    assert (missing.value.code, missing.value.type) == ("model_not_found", "invalid_request_error")
    patient = client.with_options(max_retries=5)  # each repetition would take a minute
    with pytest.raises(openai.UnprocessableEntityError, match="not configured"):
        await patient.chat.completions.create(model="openai/gpt-5", messages=ASK)
    with pytest.raises(openai.InternalServerError, match="The script specifies this error"):
        await client.chat.completions.create(model="scripted/broken", messages=ASK)
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="nonsense").models.list()
