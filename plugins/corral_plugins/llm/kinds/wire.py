"""HTTP to providers: answers as JSON or server-sent events, failures by status. Imported at first use.

Only the time to connect is limited here; the gateway limits the rest and closes what takes too long.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import httpx2
import msgspec

from corral.egress.guard import EgressBlocked
from corral_plugins.llm.api import Connection, ProviderError
from corral_plugins.llm.kinds.clients import Clients, address

MAX_REFUSAL = 64 * 1024
LONGEST_RETRY_AFTER = 24 * 3600


async def get(clients: Clients, connection: Connection, url: str, headers: Mapping[str, str]) -> Any:
    """The JSON at a URL."""
    async with (
        clients.of(connection) as client,
        _failures(connection),
        client.stream("GET", url, headers=headers) as answer,
    ):
        await _refuse(answer)
        return _json(await answer.aread())


async def post(
    clients: Clients, connection: Connection, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
) -> Any:
    """The JSON that answers a JSON body."""
    async with clients.of(connection) as client, _failures(connection), _post(client, url, headers, body) as answer:
        await _refuse(answer)
        return _json(await answer.aread())


async def events(
    clients: Clients, connection: Connection, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON of each server-sent event that answers a JSON body; closing it ends the request."""
    async with clients.of(connection) as client, _failures(connection), _post(client, url, headers, body) as answer:
        await _refuse(answer)
        async for line in answer.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                return
            if data:
                event = _json(data)
                if not isinstance(event, dict):
                    raise ProviderError(502, "A chunk of the stream is no JSON object.")
                yield event


def _post(
    client: httpx2.AsyncClient, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
) -> contextlib.AbstractAsyncContextManager[httpx2.Response]:
    sent = {"content-type": "application/json", **headers}
    return client.stream("POST", url, headers=sent, content=msgspec.json.encode(body))


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
    except ValueError:
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
    return max(0, min(round(seconds), LONGEST_RETRY_AFTER)) if seconds == seconds else None


def _json(data: bytes | str) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        raise ProviderError(502, "The answer is not JSON.") from None
