"""The HTTP client for requests to providers: sends JSON, reads JSON and server-sent events, and converts HTTP errors.

All connections are checked by the egress guard.

Only the connection timeout is applied here. The gateway applies the other timeouts and cancels slow requests.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import msgspec

from corral.egress.client import Egress
from corral.errors import Unavailable
from corral_plugins.llm.api import ProviderConnection, ProviderError
from corral_plugins.llm.providers.connections import ProviderConnections, ProviderResponse

MAX_ERROR_BYTES = 64 * 1024
MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_RETRY_AFTER = 24 * 3600
DONE: dict[str, Any] = {}
"""The value that stands for the `[DONE]` event at the end of OpenAI's streams. Compare it by identity."""


class ProviderHttp:
    """Keeps the connections to each provider, and replaces them when the provider's configuration changes."""

    def __init__(self) -> None:
        self._egress: Egress | None = None
        self._connections: dict[str, ProviderConnections] = {}

    def start(self, egress: Egress) -> None:
        """Set the egress guard for all connections. Must be called before the first request."""
        self._egress = egress

    async def close(self) -> None:
        """Close all connections."""
        while self._connections:
            _, connections = self._connections.popitem()
            await connections.close()

    async def get_json(self, connection: ProviderConnection, url: str, headers: Mapping[str, str]) -> Any:
        """Send a GET request and return the decoded JSON response."""
        async with self._send_request(connection, "GET", url, headers) as response:
            return _decode_json(b"".join([chunk async for chunk in response.body()]))

    async def post_json(
        self, connection: ProviderConnection, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
    ) -> Any:
        """Send a POST request with a JSON body and return the decoded JSON response."""
        async with self._send_request(connection, "POST", url, headers, body) as response:
            return _decode_json(b"".join([chunk async for chunk in response.body()]))

    async def post_for_events(
        self, connection: ProviderConnection, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Send a POST request with a JSON body.

        Yield the JSON of each server-sent event, and `DONE` for the final event.

        Closing the iterator ends the request. Raise `ProviderError` if the request fails, or if the data of an event is
        not a JSON object.
        """
        async with self._send_request(connection, "POST", url, headers, body) as response:
            async for line in _stream_lines(response.body()):
                data = line[5:].strip() if line.startswith(b"data:") else b""
                if data == b"[DONE]":
                    yield DONE
                    return
                if data:
                    event = _decode_json(data)
                    if not isinstance(event, dict):
                        raise ProviderError(502, "A chunk of the stream is not a JSON object.")
                    yield event

    @contextlib.asynccontextmanager
    async def _send_request(
        self,
        connection: ProviderConnection,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[ProviderResponse]:
        """Send a request and yield the successful response.

        An error that occurs after the response headers were received is billable, because the provider has begun to
        respond.
        """
        billable = False
        content = None if body is None else msgspec.json.encode(body)
        sent = headers if body is None else {"content-type": "application/json", **headers}
        connections = await self._connections_of(connection)
        try:
            async with connections.send(method, url, sent, content) as response:
                await _raise_for_status(response)
                billable = True
                yield response
        except ProviderError as error:
            error.billable |= billable
            raise

    async def _connections_of(self, provider: ProviderConnection) -> ProviderConnections:
        if self._egress is None:
            raise Unavailable("The gateway is still starting; try again.")
        connections = self._connections.get(provider.name)
        if connections is None or not connections.match(provider):
            replaced = connections
            connections = self._connections[provider.name] = ProviderConnections(self._egress, provider)
            if replaced is not None:
                await replaced.close()
        return connections


async def _stream_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines of a stream.

    Only line feeds separate lines, because text generated by a model may contain other line separators.
    """
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        if b"\n" in chunk:
            *lines, rest = bytes(buffer).split(b"\n")
            for line in lines:
                yield line
            buffer = bytearray(rest)
        if len(buffer) > MAX_LINE_BYTES:
            raise ProviderError(502, f"A line of the stream is longer than {MAX_LINE_BYTES} bytes.")
    yield bytes(buffer)


async def _raise_for_status(response: ProviderResponse) -> None:
    if 200 <= response.status < 300:
        return
    body = b""
    async for chunk in response.body():
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    raise _error_of(body, response.status, _retry_after(response))


def _error_of(body: bytes, status: int, retry_after: int | None) -> ProviderError:
    """Read an error response in OpenAI's or Anthropic's format.

    If the body has another format, it becomes the error message.
    """
    try:
        response = json.loads(body)
    except (ValueError, RecursionError):
        text = body.decode(errors="replace").strip() or f"HTTP {status}"
        return ProviderError(status, text, retry_after=retry_after)
    error = response.get("error", response) if isinstance(response, dict) else response
    if not isinstance(error, dict):
        return ProviderError(status, str(error), retry_after=retry_after)
    return error_from_object(status, error, retry_after=retry_after)


def error_from_object(status: int, error: Mapping[str, Any], *, retry_after: int | None = None) -> ProviderError:
    """Convert an error object in OpenAI's format to a `ProviderError`."""
    message = str(error.get("message") or error.get("detail") or error)
    code, param = (value if isinstance(value := error.get(name), str) else None for name in ("code", "param"))
    return ProviderError(status, message, retry_after=retry_after, reported_code=code, param=param)


def _retry_after(response: ProviderResponse) -> int | None:
    try:
        seconds = float(response.headers.get(b"retry-after", ""))
    except ValueError:  # absent, or a date, which no provider sends
        return None
    return None if math.isnan(seconds) else round(max(0.0, min(seconds, MAX_RETRY_AFTER)))


def _decode_json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        raise ProviderError(502, "The response is not JSON.") from None


def positive_or_none(value: Any) -> int | None:
    """Return the value if it is a positive integer, or else None. Used for model limits that a server reports."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
