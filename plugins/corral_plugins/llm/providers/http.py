"""HTTP client for providers: pooled connections behind the egress guard, JSON, server-sent events and HTTP errors.

Only the connection timeout is applied here. The gateway applies the other timeouts and cancels slow requests.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked
from corral.errors import Unavailable
from corral_plugins.llm.api import ProviderConnection, ProviderError

if TYPE_CHECKING:
    import httpx2

SINK = "llm"
MAX_IDLE_CLIENTS, IDLE_SECONDS = 1000, 15.0  # calls are limited by concurrency slots
MAX_RESPONSE_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_RETRY_AFTER = 24 * 3600
DONE: dict[str, Any] = {}
"""The `[DONE]` event, which ends OpenAI's streams. Compare it by identity."""


class ProviderHttp:
    """Keeps HTTP clients for each provider. When the configuration of a provider changes, its clients are replaced."""

    def __init__(self) -> None:
        self._egress: Egress | None = None
        self._clients: dict[str, _ProviderClients] = {}

    def start(self, egress: Egress) -> None:
        """Set the egress guard for all connections. Must be called before the first request."""
        self._egress = egress

    async def close(self) -> None:
        """Close all HTTP clients."""
        while self._clients:
            _, clients = self._clients.popitem()
            await clients.close()

    async def get_json(self, connection: ProviderConnection, url: str, headers: Mapping[str, str]) -> Any:
        """Send a GET request and return the decoded JSON response."""
        async with self._send_request(connection, "GET", url, headers) as response:
            return _decode_json(await response.aread())

    async def post_json(
        self, connection: ProviderConnection, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
    ) -> Any:
        """Send a POST request with a JSON body and return the decoded JSON response."""
        async with self._send_request(connection, "POST", url, headers, body) as response:
            return _decode_json(await response.aread())

    async def post_for_events(
        self, connection: ProviderConnection, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Send a POST request with a JSON body and yield the JSON of each server-sent event, then `DONE`.

        Closing the iterator ends the request.
        """
        async with self._send_request(connection, "POST", url, headers, body) as response:
            async for line in _stream_lines(response.aiter_bytes()):
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
    ) -> AsyncIterator[httpx2.Response]:
        """Send a request and yield the successful response.

        An error that occurs after the response headers were received is billable, because the provider has begun to
        respond.
        """
        billable = False
        content = None if body is None else msgspec.json.encode(body)
        sent = dict(headers) if body is None else {"content-type": "application/json", **headers}
        try:
            async with (
                self._client_of(connection) as client,
                _converted_errors(connection),
                client.stream(method, url, headers=sent, content=content) as response,
            ):
                await _raise_for_status(response)
                billable = True
                yield response
        except ProviderError as error:
            error.billable |= billable
            raise

    @contextlib.asynccontextmanager
    async def _client_of(self, connection: ProviderConnection) -> AsyncIterator[httpx2.AsyncClient]:
        key = (connection.version, connection.base_url, connection.timeouts.connect_seconds)
        clients = self._clients.get(connection.name)
        if clients is None or clients.key != key:
            replaced = clients
            clients = _ProviderClients(key, lambda: self._new_client(connection))
            self._clients[connection.name] = clients
            if replaced is not None:
                await replaced.close()
        client = clients.take()
        try:
            yield client
        finally:
            await clients.give_back(client)

    def _new_client(self, connection: ProviderConnection) -> httpx2.AsyncClient:
        if self._egress is None:
            raise Unavailable("The gateway is still starting; try again.")
        return self._egress.client(
            SINK,
            operator=(host_and_port(connection.base_url),) if connection.operator else (),
            connect_seconds=connection.timeouts.connect_seconds,
            total_seconds=None,
            max_bytes=MAX_RESPONSE_BYTES,
            per_host=1,
        )


class _ProviderClients:
    """The HTTP clients of one provider. Each client serves one request at a time, on a connection that it keeps.

    A client that served all requests would examine each of its connections, with a system call, whenever a request
    begins or ends.
    """

    def __init__(self, key: tuple[Any, ...], make: Callable[[], httpx2.AsyncClient]) -> None:
        self.key, self._make = key, make
        self._idle: deque[tuple[float, httpx2.AsyncClient]] = deque()  # with the time since when, the latest last
        self._is_closed = False

    def take(self) -> httpx2.AsyncClient:
        """Return the client that was used last, whose connection is most likely still open, or else a new client."""
        return self._idle.pop()[1] if self._idle else self._make()

    async def give_back(self, client: httpx2.AsyncClient) -> None:
        """Keep the client for further requests, and close a client that has been idle for too long."""
        if self._is_closed or len(self._idle) >= MAX_IDLE_CLIENTS:
            await client.aclose()
            return
        now = time.monotonic()
        self._idle.append((now, client))
        if now - self._idle[0][0] > IDLE_SECONDS:
            await self._idle.popleft()[1].aclose()

    async def close(self) -> None:
        """Close the idle clients. The others are closed when they are given back."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop()[1].aclose()


async def _stream_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines of a stream.

    Only line feeds separate lines, because the text of a model may contain other line separators.
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


@contextlib.asynccontextmanager
async def _converted_errors(connection: ProviderConnection) -> AsyncIterator[None]:
    """Convert errors of the HTTP client to `ProviderError`."""
    import httpx2

    address = host_and_port(connection.base_url)
    try:
        yield
    except EgressBlocked as error:
        detail = f"The address {address} is blocked ({error.code}): {error.reason}"
        raise ProviderError(503, detail, code="dependency_unavailable") from error
    except httpx2.TimeoutException as error:
        raise ProviderError(504, f"{address} did not respond in time ({type(error).__name__}).") from error
    except httpx2.HTTPError as error:
        raise ProviderError(502, f"{address} cannot be reached: {type(error).__name__}: {error}") from error


async def _raise_for_status(response: httpx2.Response) -> None:
    if response.is_success:
        return
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    raise _error_of(body, response.status_code, _retry_after(response))


def _error_of(body: bytes, status: int, retry_after: int | None) -> ProviderError:
    """Read an error response in OpenAI's or Anthropic's format. The message of any other response is its text."""
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
    """Return the error that an error object in OpenAI's format describes."""
    message = str(error.get("message") or error.get("detail") or error)
    code, param = (value if isinstance(value := error.get(name), str) else None for name in ("code", "param"))
    return ProviderError(status, message, retry_after=retry_after, reported_code=code, param=param)


def _retry_after(response: httpx2.Response) -> int | None:
    try:
        seconds = float(response.headers.get("retry-after", "").strip())
    except ValueError:  # absent, or a date, which no provider sends
        return None
    return None if math.isnan(seconds) else round(max(0.0, min(seconds, MAX_RETRY_AFTER)))


def _decode_json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        raise ProviderError(502, "The response is not JSON.") from None


def host_and_port(url: str | None) -> str:
    """Return `host:port` of a URL."""
    parts = urlsplit(url or "")
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def positive_or_none(value: Any) -> int | None:
    """Return the value if it is a positive integer, or else None. Used for model sizes that a server reports."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
