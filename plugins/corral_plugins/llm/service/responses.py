"""Normalises provider responses to OpenAI's format, and maps provider errors to problems.

Only OpenAI's fields and the two fields in which servers return a model's reasoning are kept. Text in other fields would
be missing from the token estimate, and a credential in such text would not be redacted if it is split across chunks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec

from corral.errors import CODES, FieldError, Invalid, Problem, TooMany
from corral.http.answers import Request
from corral.redact.redactor import Redactor
from corral.schema.strict_json import replace_bad_characters
from corral_plugins.cost.api import MAX_TOKENS
from corral_plugins.llm.api import ProviderError

log = logging.getLogger("corral.llm")

HEAD_FIELDS = ("id", "object", "created", "model")
TEXT_FIELDS = ("content", "refusal", "reasoning_content", "reasoning")
OTHER_MESSAGE_FIELDS = ("role", "annotations", "audio")
REQUIRED_USAGE = ("prompt_tokens", "completion_tokens", "cost")  # usage without any of these fields is ignored


# -- responses


def normalize_completion(response: Any) -> dict[str, Any]:
    """Normalise a chat completion or a chunk. Raise `ProviderError` if the response is neither."""
    usage = response.get("usage") if isinstance(response, dict) else None
    choices = response.get("choices") or [] if isinstance(response, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ProviderError(502, "The response is not a chat completion.", billable=True, usage=usage)
    return {
        **{name: response[name] for name in HEAD_FIELDS if name in response},
        "choices": [_normalize_choice(choice, position, usage) for position, choice in enumerate(choices)],
        "usage": normalize_usage(usage),
    }


def normalize_embeddings(response: Any) -> dict[str, Any]:
    """Normalise a list of embeddings. Raise `ProviderError` if the response is not a list of embeddings."""
    usage = response.get("usage") if isinstance(response, dict) else None
    try:
        for item in response["data"]:
            msgspec.convert(item["embedding"], list[float])
    except (KeyError, TypeError, msgspec.ValidationError):
        raise ProviderError(502, "The response is not a list of embeddings.", billable=True, usage=usage) from None
    return {**response, "usage": normalize_usage(usage)}


def normalize_usage(usage: Any) -> dict[str, Any] | None:
    """Return the numbers in a usage object, or None if it contains no usable number."""
    if not isinstance(usage, dict):
        return None
    numbers = _parse_usage_numbers(usage)
    details = {name: _parse_usage_numbers(value) for name, value in usage.items() if isinstance(value, dict)}
    return {**numbers, **details} if any(name in numbers for name in REQUIRED_USAGE) else None


def _parse_usage_numbers(values: dict[str, Any]) -> dict[str, Any]:
    numbers = {
        name: _parse_count(value) if name.endswith("_tokens") else _parse_amount(value)
        for name, value in values.items()
    }
    return {name: number for name, number in numbers.items() if number is not None}


def _parse_amount(value: Any) -> float | None:
    """Parse an amount of money, which some servers send as text. Return None if the amount is invalid."""
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value if isinstance(value, (int, float)) else None
    return None


def _parse_count(value: Any) -> int | None:
    """Return a token count, or None if the value is not an integer. Some servers send counts as floats."""
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count and not (isinstance(value, float) and value.is_integer()):
        return None
    return max(0, min(int(value), MAX_TOKENS))


def _normalize_choice(choice: dict[str, Any], position: int, usage: Any) -> dict[str, Any]:
    normalized: dict[str, Any] = {"index": _index_of(choice, position)}
    for name in ("message", "delta"):
        if name in choice:
            normalized[name] = _normalize_message(choice[name] or {}, usage, in_chunk=name == "delta")
    if isinstance(choice.get("logprobs"), dict):
        normalized["logprobs"] = choice["logprobs"]
    finish = choice.get("finish_reason")
    if finish:
        finish = replace_bad_characters(finish) if isinstance(finish, str) else "stop"
    return {**normalized, "finish_reason": finish or None}


def _normalize_message(message: Any, usage: Any, *, in_chunk: bool) -> dict[str, Any]:
    """Normalise a message or a delta.

    Content parts are joined into one text, and reasoning parts into a separate text.
    """
    content = message.get("content") if isinstance(message, dict) else message
    if not isinstance(message, dict) or not isinstance(content, (str, list, type(None))):
        raise ProviderError(502, "The response is not a message.", billable=True, usage=usage)
    normalized = {name: message[name] for name in OTHER_MESSAGE_FIELDS if message.get(name) is not None}
    normalized |= {name: message[name] for name in TEXT_FIELDS if isinstance(message.get(name), str)}
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        normalized["content"] = _join_texts(parts)
        if reasoning := "".join(_reasoning_text(part.get("thinking")) for part in parts):
            normalized["reasoning_content"] = normalized.get("reasoning_content", "") + reasoning
    elif content is None and "content" in message:
        normalized["content"] = None
    if isinstance(message.get("tool_calls"), list):
        calls = [call for call in message["tool_calls"] if isinstance(call, dict)]
        normalized["tool_calls"] = [_normalize_tool_call(call, n if in_chunk else None) for n, call in enumerate(calls)]
    return normalized


def _reasoning_text(thinking: Any) -> str:
    return _join_texts(thinking if isinstance(thinking, list) else [{"type": "text", "text": thinking}])


def _join_texts(parts: list[Any]) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _normalize_tool_call(call: dict[str, Any], position: int | None) -> dict[str, Any]:
    """Normalise a tool call. `position` replaces a missing index.

    `position` is None for tool calls in whole messages, which contain no index.
    """
    function = call["function"] if isinstance(call.get("function"), dict) else {}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):  # some servers send a JSON value instead of its text
        arguments = "" if arguments is None else json.dumps(arguments)
    normalized: dict[str, Any] = {name: call[name] for name in ("id", "type") if isinstance(call.get(name), str)}
    if position is not None:
        normalized["index"] = _index_of(call, position)
    name = {"name": function["name"]} if isinstance(function.get("name"), str) else {}
    return {**normalized, "function": {**name, "arguments": arguments}}


def _index_of(item: dict[str, Any], position: int) -> int:
    index = item.get("index")
    return index if isinstance(index, int) and not isinstance(index, bool) else position


# -- errors

TIMEOUTS = (408, 504)
RETRYABLE = (408, 409, 429)
INVALID_REQUEST = (400, 413, 422)
MAX_MESSAGE_BYTES = 1024
MAX_SHOWN_ERRORS = 5
MAX_NAME = 200  # characters of a provider's error code or field name
CREDENTIALS, MODEL = "credentials", "model"
_PROVIDER_ERROR_KINDS = {401: CREDENTIALS, 402: CREDENTIALS, 403: CREDENTIALS, 404: MODEL}
CONFIGURATION_CODES = ("llm.provider_not_configured", "url_blocked")
TEMPORARY = (408, 429)
NEEDS_PEOPLE = ("kill_switch", "plugin_disabled", "plugin_failed", "quota_exceeded", "vault_sealed")
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@contextlib.contextmanager
def convert_provider_errors(provider: str) -> Iterator[None]:
    """Convert unexpected exceptions raised by a provider to `ProviderError`.

    The error is billable, because the provider may already have processed the request.
    """
    try:
        yield
    except (ProviderError, Problem):
        raise
    except Exception as error:
        log.error("provider raised an unexpected error", exc_info=error, extra={"provider": provider})
        raise ProviderError(502, "failed with an internal error; see the server's log.", billable=True) from error


def timeout_error(name: str, seconds: float, what: str) -> ProviderError:
    """Return the error for a call that exceeded one of the gateway's timeouts.

    `name` is the model or the provider, and `what` says what did not arrive in time, such as "no first token". The call
    is not retried, because a retry would probably take just as long.
    """
    return ProviderError(504, f"{name}: {what} within {seconds:g} seconds.", code="upstream_timeout", billable=True)


@contextlib.asynccontextmanager
async def time_limit(name: str, seconds: float, what: str) -> AsyncIterator[None]:
    """Raise the error from `timeout_error` if the `with` block takes longer than `seconds`."""
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise timeout_error(name, seconds, what) from None


def is_retryable(error: ProviderError) -> bool:
    """Return whether a call that failed with this error may be retried with the same provider.

    A retry is allowed if it could succeed and the provider cannot charge for the failed request.
    """
    is_temporary = error.status in RETRYABLE or error.status >= 500
    return is_temporary and error.code is None and not error.billable


def allows_fallback(error: ProviderError) -> bool:
    """Return whether a call that failed with this error may fall back to another model.

    A fallback is not allowed if the request itself caused the error or the provider had begun to respond.
    """
    return error.code is not None or not (error.billable or error.status in INVALID_REQUEST)


def problem_of(error: ProviderError, provider: str, redactor: Redactor) -> Problem:
    """Convert a provider error to the problem for the caller.

    The problem contains the provider's own message, redacted and limited to 1 KiB.
    """
    message = redactor.redact(error.message[: 4 * MAX_MESSAGE_BYTES])
    detail = f"{provider}: {message.encode()[:MAX_MESSAGE_BYTES].decode(errors='ignore')}"
    if error.code is not None:
        headers = {"Retry-After": str(error.retry_after or 1)} if CODES[error.code][0] == 503 else None
        return Problem(detail, code=error.code, headers=headers, provider=provider)
    if error.status in INVALID_REQUEST:
        return _invalid_request_problem(error, detail, provider, redactor)
    if error.status == 429:
        return TooMany(detail, retry_after=error.retry_after or 1, provider=provider)
    if error.status in TIMEOUTS:
        return Problem(detail, code="upstream_timeout", provider=provider)
    kind = _PROVIDER_ERROR_KINDS.get(error.status, "provider")
    return Problem(detail, code="provider_error", kind=kind, provider=provider)


def _invalid_request_problem(error: ProviderError, detail: str, provider: str, redactor: Redactor) -> Invalid:
    """Return the problem for a request that the provider rejected, with the provider's own code and field name."""
    reported = {"provider_code": error.reported_code, "provider_param": error.param}
    kept = {name: redactor.redact(value[:MAX_NAME]) for name, value in reported.items() if value}
    pointer = f"/{kept['provider_param'].replace('.', '/')}" if "provider_param" in kept else ""
    members: dict[str, Any] = {"provider": provider, **kept}
    return Invalid(detail, errors=[FieldError(pointer, "not_allowed", detail)], **members)


def is_about_credentials(problem: Problem) -> bool:
    """Return whether the problem is that the provider rejected its API key."""
    return problem.members.get("kind") == CREDENTIALS


def adapt_for_openai_clients(problem: Problem, request: Request | None = None) -> None:
    """Convert a problem to the form that OpenAI's clients expect.

    OpenAI's error object is added to the problem, and the status becomes 400 if the request is invalid. The status 422
    is kept for valid requests that the configuration of this installation does not allow. Clients retry requests that
    failed with 408, 409, 429 or 5xx. The `x-should-retry` header stops clients from retrying when a retry is useless.
    """
    if problem.status == 422 and problem.code not in CONFIGURATION_CODES:
        problem.status = 400
    problem.members["error"] = openai_error(problem)
    if not _may_succeed_later(problem):
        problem.headers["x-should-retry"] = "false"


def _may_succeed_later(problem: Problem) -> bool:
    """Return whether the same request could succeed if it is sent again soon."""
    is_temporary = problem.status in TEMPORARY or problem.status >= 500 or problem.code == "idempotency_in_progress"
    return is_temporary and problem.code not in NEEDS_PEOPLE and problem.members.get("kind") not in (CREDENTIALS, MODEL)


def openai_error(problem: Problem) -> dict[str, Any]:
    """Convert a problem to OpenAI's error object.

    OpenAI's clients show only the message, so the message includes the list of errors. If a provider rejected the
    request, the provider's own code and field name are kept.
    """
    shown = [error for error in problem.errors[:MAX_SHOWN_ERRORS] if error.detail != problem.detail]
    errors = "; ".join(f"{error.pointer}: {error.detail}" for error in shown)
    param = problem.errors[0].pointer if problem.errors else None
    return {
        "message": f"{problem.detail.removesuffix('.')}: {errors}" if errors else problem.detail,
        "type": _OPENAI_TYPES.get(problem.status, "server_error" if problem.status >= 500 else "invalid_request_error"),
        "code": problem.members.get("provider_code", problem.code),
        "param": problem.members.get("provider_param") or (param.lstrip("/").replace("/", ".") if param else None),
    }
