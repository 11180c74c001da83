"""The kind `scripted`, without a kernel: the same input gives the same output."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.limits import within

from corral_plugins.llm.api import ProviderConnection, ProviderError
from corral_plugins.llm.providers.scripted import ScriptedProvider, embed_text, load_scripts

CONNECTION = ProviderConnection(name="scripted")


def provider(**scripts: Any) -> ScriptedProvider:
    return ScriptedProvider(load_scripts(scripts))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def said(kind: ScriptedProvider, model: str, messages: list[dict[str, Any]], **more: Any) -> str:
    answer = await kind.complete({"model": model, "messages": messages, **more}, CONNECTION)
    text: str = answer["choices"][0]["message"]["content"]
    return text


async def test_echo_answers_the_last_user_message() -> None:
    talk = [user("first"), {"role": "assistant", "content": "ok"}, user("second")]
    assert await said(provider(), "echo", talk) == "second"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert await said(provider(), "echo", parts) == "ab"


async def test_turns_follow_the_number_of_assistant_messages_and_the_last_repeats() -> None:
    kind = provider(three={"turns": [{"text": "one"}, {"text": "two"}, {"text": "three"}]})
    talk = [user("go")]
    for expected in ("one", "two", "three", "three"):
        assert await said(kind, "three", talk) == expected
        assert await said(kind, "three", talk) == expected
        talk += [{"role": "assistant", "content": expected}, user("on")]


async def test_a_match_takes_precedence_over_the_order() -> None:
    kind = provider(m={"turns": [{"text": "first"}, {"match": "weather", "text": "rain"}]})
    assert await said(kind, "m", [user("how is the weather?")]) == "rain"
    assert await said(kind, "m", [user("hello")]) == "first"


async def test_ids_of_tool_calls_depend_on_their_position() -> None:
    kind = provider(t={"turns": [{"tool_calls": [{"name": "a__b", "arguments": {"x": 1}}, {"name": "c"}]}]})
    answer = await kind.complete({"model": "t", "messages": [user("go")]}, CONNECTION)
    message = answer["choices"][0]["message"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert [call["id"] for call in message["tool_calls"]] == ["call_0_0", "call_0_1"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"x": 1}


async def test_errors_and_unknown_scripts_are_failures_of_the_provider() -> None:
    kind = provider(e={"turns": [{"error": {"status": 429, "message": "slow down", "retry_after": 7}}]})
    with pytest.raises(ProviderError) as failure:
        await said(kind, "e", [user("go")])
    assert (failure.value.status, failure.value.retry_after) == (429, 7)
    with pytest.raises(ProviderError) as unknown:
        await said(kind, "nobody", [user("go")])
    assert unknown.value.status == 404


async def test_a_script_in_the_request_and_a_delay_that_does_not_block() -> None:
    script = json.dumps({"turns": [{"text": "slow", "delay_seconds": 0.2}]})
    async with within(2):
        answers = await asyncio.gather(
            *[said(provider(), "any", [user("go")], metadata={"script": script}) for _ in range(20)]
        )
    assert set(answers) == {"slow"}


async def test_usage_is_estimated_or_taken_from_the_script() -> None:
    kind = provider(u={"turns": [{"text": "x", "usage": {"prompt_tokens": 5, "completion_tokens": 6}}]})
    answer = await kind.complete({"model": "u", "messages": [user("go")]}, CONNECTION)
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    answer = await kind.complete({"model": "echo", "messages": [user("12345678")]}, CONNECTION)
    assert answer["usage"]["completion_tokens"] == 2


async def test_a_token_limit_truncates_the_text() -> None:
    answer = await provider().complete({"model": "echo", "messages": [user("x" * 40)], "max_tokens": 5}, CONNECTION)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == "x" * 20


async def test_a_stream_gives_the_same_text_and_usage_last() -> None:
    kind = provider(s={"turns": [{"text": "hello world", "chunk": 3}]})
    chunks = [chunk async for chunk in kind.stream({"model": "s", "messages": [user("go")]}, CONNECTION)]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == "hello world"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3


def test_scripts_are_loaded_from_files_and_invalid_ones_are_named(tmp_path: Any) -> None:
    path = tmp_path / "demo.json"
    path.write_text(json.dumps({"turns": [{"text": "from a file"}]}))
    assert load_scripts({"demo": str(path)})["demo"].turns[0].text == "from a file"
    with pytest.raises(ValueError, match=r"llm\.scripts\.bad"):
        load_scripts({"bad": {"turns": []}})
    with pytest.raises(ValueError, match=r"llm\.scripts\.gone"):
        load_scripts({"gone": str(tmp_path / "nothing.json")})


def test_texts_with_common_words_have_similar_vectors() -> None:
    def near(a: str, b: str) -> float:
        return sum(x * y for x, y in zip(embed_text(a, 256), embed_text(b, 256), strict=True))

    assert near("the red fox", "The RED fox!") == pytest.approx(1)
    assert near("the red fox", "a red fox runs") > near("the red fox", "quarterly figures")


async def test_embedding_long_texts_does_not_block() -> None:
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.001)
            beats += 1

    beating = asyncio.create_task(beat())
    request = {"model": "words", "input": ["red green blue " * 100_000]}
    answer = await provider().embed(request, CONNECTION)
    beating.cancel()
    assert beats > 5
    assert len(answer["data"][0]["embedding"]) == 256
