"""What providers answer, brought into OpenAI's shape once: whatever is read of it later has the type it is read as.

Only fields of OpenAI's (and the two in which servers tell what a model thinks) go on: what nobody knows is neither
counted nor redacted over chunks.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import msgspec

from corral.errors import Problem
from corral.schema.strict_json import replace_bad_characters
from corral_plugins.cost.api import MAX_TOKENS
from corral_plugins.llm.api import ProviderError

log = logging.getLogger("corral.llm")

HEAD = ("id", "object", "created", "model")
TEXTS = ("content", "refusal", "reasoning_content", "reasoning")
OTHERS = ("role", "annotations", "audio")
FINISH_LENGTH = 40
TOLD = ("prompt_tokens", "completion_tokens", "cost")  # usage without any of these tells nothing


@contextlib.contextmanager
def failures_of(provider: str) -> Iterator[None]:
    """Whatever a kind raises besides `ProviderError`, or its answer makes others raise, is a failure of the provider.

    It may have worked for money by then.
    """
    try:
        yield
    except (ProviderError, Problem):
        raise
    except Exception as error:
        log.error("a provider raised", exc_info=error, extra={"provider": provider})
        raise ProviderError(502, "failed with a bug; see the server's log.", reached=True) from error


def completion(answer: Any) -> dict[str, Any]:
    """A chat completion, or a chunk of one."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    choices = answer.get("choices") or [] if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ProviderError(502, "The answer is no chat completion.", reached=True, usage=usage)
    made = [_choice(choice, place, usage) for place, choice in enumerate(choices)]
    head = {name: answer[name] for name in HEAD if name in answer}
    return {**head, "choices": made, "usage": usage_of(usage)}


def embeddings(answer: Any) -> dict[str, Any]:
    """A list of embeddings."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    try:
        for item in answer["data"]:
            msgspec.convert(item["embedding"], list[float])
    except (KeyError, TypeError, msgspec.ValidationError):
        raise ProviderError(502, "The answer is no list of embeddings.", reached=True, usage=usage) from None
    return {**answer, "usage": usage_of(usage)}


def usage_of(told: Any) -> dict[str, Any] | None:
    """The numbers of a usage; None: it tells none."""
    if not isinstance(told, dict):
        return None
    numbers = _numbers(told)
    details = {name: _numbers(value) for name, value in told.items() if isinstance(value, dict)}
    return {**numbers, **details} if any(name in numbers for name in TOLD) else None


def _numbers(told: dict[str, Any]) -> dict[str, Any]:
    found = {name: _count(value) if name.endswith("_tokens") else _amount(value) for name, value in told.items()}
    return {name: number for name, number in found.items() if number is not None}


def _amount(value: Any) -> float | None:
    """A number, also one that is told as a text (money is)."""
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value if isinstance(value, (int, float)) else None
    return None


def _count(value: Any) -> int | None:
    """Some servers count in floats; None: it is no count."""
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count and not (isinstance(value, float) and value.is_integer()):
        return None
    return max(0, min(int(value), MAX_TOKENS))


def _choice(choice: dict[str, Any], place: int, usage: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"index": choice["index"] if _is_index(choice.get("index")) else place}
    for name in ("message", "delta"):
        if name in choice:
            made[name] = _said(choice[name] or {}, usage, in_chunk=name == "delta")
    if isinstance(choice.get("logprobs"), dict):
        made["logprobs"] = choice["logprobs"]
    told = choice.get("finish_reason")
    finish = replace_bad_characters(told)[:FINISH_LENGTH] if isinstance(told, str) else "stop"
    return {**made, "finish_reason": finish if told else None}


def _said(said: Any, usage: Any, *, in_chunk: bool) -> dict[str, Any]:
    """A message, or what a chunk adds to one. Content in parts becomes a text, and what it thinks one of its own."""
    content = said.get("content") if isinstance(said, dict) else said
    if not isinstance(said, dict) or not isinstance(content, (str, list, type(None))):
        raise ProviderError(502, "The answer is no message.", reached=True, usage=usage)
    made = {name: said[name] for name in OTHERS if said.get(name) is not None}
    made |= {name: said[name] for name in TEXTS if isinstance(said.get(name), str)}
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        made["content"] = _joined(parts)
        if thought := "".join(_joined(_thoughts(part.get("thinking"))) for part in parts):
            made["reasoning_content"] = made.get("reasoning_content", "") + thought
    elif content is None and "content" in said:
        made["content"] = None
    if isinstance(said.get("tool_calls"), list):
        calls = [call for call in said["tool_calls"] if isinstance(call, dict)]
        made["tool_calls"] = [_tool_call(call, place if in_chunk else None) for place, call in enumerate(calls)]
    return made


def _thoughts(told: Any) -> list[Any]:
    return told if isinstance(told, list) else [{"type": "text", "text": told}]


def _joined(parts: list[Any]) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _tool_call(call: dict[str, Any], place: int | None) -> dict[str, Any]:
    """`place`: the index where none is told; None: calls of a whole message have no index."""
    function = call["function"] if isinstance(call.get("function"), dict) else {}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):  # some servers tell the value itself
        arguments = "" if arguments is None else json.dumps(arguments)
    made: dict[str, Any] = {name: call[name] for name in ("id", "type") if isinstance(call.get(name), str)}
    if place is not None:
        made["index"] = call["index"] if _is_index(call.get("index")) else place
    name = {"name": function["name"]} if isinstance(function.get("name"), str) else {}
    return {**made, "function": {**name, "arguments": arguments}}


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
