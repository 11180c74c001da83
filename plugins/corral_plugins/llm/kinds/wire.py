"""HTTP to providers: answers as JSON or server-sent events, failures by status. Imported at first use.

Only the time to connect is limited here; the gateway limits the rest and closes what takes too long.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import httpx2
import msgspec

from corral.egress.guard import EgressBlocked
from corral_plugins.llm.api import Connection, ProviderError
from corral_plugins.llm.kinds.clients import Clients, address

MAX_REFUSAL = 64 * 1024
LONGEST_RETRY_AFTER = 24 * 3600
LONGEST_LINE = 16 * 1024 * 1024
DONE: dict[str, Any] = {}
"""The event with which OpenAI's streams end; known by identity."""


async def get(clients: Clients, connection: Connection, url: str, headers: Mapping[str, str]) -> Any:
    """The JSON at a URL."""
    async with _answer(clients, connection, "GET", url, headers) as answer:
        return _json(await answer.aread())


async def post(
    clients: Clients, connection: Connection, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
) -> Any:
    """The JSON that answers a JSON body."""
    async with _answer(clients, connection, "POST", url, headers, body) as answer:
        return _json(await answer.aread())


async def events(
    clients: Clients, connection: Connection, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON of each server-sent event that answers a JSON body, `DONE` for its mark of the end.

    Closing it ends the request.
    """
    async with _answer(clients, connection, "POST", url, headers, body) as answer:
        async for line in _lines(answer.aiter_bytes()):
            data = line[5:].strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                yield DONE
                return
            if data:
                event = _json(data)
                if not isinstance(event, dict):
                    raise ProviderError(502, "A chunk of the stream is no JSON object.")
                yield event


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines end with a line feed and with nothing else: a text may hold other separators."""
    held = bytearray()
    async for part in parts:
        held += part
        if b"\n" in part:
            *whole, rest = bytes(held).split(b"\n")
            for line in whole:
                yield line
            held = bytearray(rest)
        if len(held) > LONGEST_LINE:
            raise ProviderError(502, f"A line of the stream is longer than {LONGEST_LINE} bytes.")
    yield bytes(held)


@contextlib.asynccontextmanager
async def _answer(
    clients: Clients,
    connection: Connection,
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any] | None = None,
) -> AsyncIterator[httpx2.Response]:
    """An answer whose head says 2xx; afterwards, whatever goes wrong, the provider was reached."""
    reached = False
    content = None if body is None else msgspec.json.encode(body)
    sent = dict(headers) if body is None else {"content-type": "application/json", **headers}
    try:
        async with (
            clients.of(connection) as client,
            _failures(connection),
            client.stream(method, url, headers=sent, content=content) as answer,
        ):
            await _refuse(answer)
            reached = True
            yield answer
    except ProviderError as failure:
        failure.reached |= reached
        raise


@contextlib.asynccontextmanager
async def _failures(connection: Connection) -> AsyncIterator[None]:
    """What the client raises, as what a provider answered."""
    where = address(connection.base_url)
    try:
        yield
    except EgressBlocked as blocked:
        detail = f"The address {where} is refused ({blocked.code}): {blocked.reason}"
        raise ProviderError(503, detail, code="dependency_unavailable") from blocked
    except httpx2.TimeoutException as error:
        raise ProviderError(504, f"{where} did not answer in time ({type(error).__name__}).") from error
    except httpx2.HTTPError as error:
        raise ProviderError(502, f"{where} cannot be reached: {type(error).__name__}: {error}") from error


async def _refuse(answer: httpx2.Response) -> None:
    """Raise what an answer other than 2xx says."""
    if answer.is_success:
        return
    text = b""
    async for part in answer.aiter_bytes():
        text += part
        if len(text) > MAX_REFUSAL:
            break
    raise ProviderError(answer.status_code, message_of(text, answer.status_code), retry_after=_retry_after(answer))


def message_of(body: bytes, status: int) -> str:
    """The sentence in a refusal of either API, else its text."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return body.decode(errors="replace").strip() or f"HTTP {status}"
    error = told.get("error", told) if isinstance(told, dict) else told
    if isinstance(error, dict):
        return str(error.get("message") or error.get("detail") or error)
    return str(error)


def _retry_after(answer: httpx2.Response) -> int | None:
    text = answer.headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:  # a date: nobody sends one here
        return None
    return None if math.isnan(seconds) else round(max(0.0, min(seconds, LONGEST_RETRY_AFTER)))


def _json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        raise ProviderError(502, "The answer is not JSON.") from None
