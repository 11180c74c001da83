"""HTTP/1.1 on a connection that serves one request at a time, implemented with h11.

The connections of `httpcore2` would take twice the processor time, because of locks, traces and timeouts that are not
needed here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

import h11
import httpcore2

MAX_HEAD_BYTES = 100 * 1024
READ_BYTES = 64 * 1024

Headers = list[tuple[bytes, bytes]]


class Http1Connection:
    """A connection to a provider. Its methods raise the errors of `httpcore2` and of h11."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._idle_since = 0.0

    async def send(self, method: str, path: bytes, headers: Headers, content: bytes | None) -> h11.Response:
        """Send a request with a single write, and return the status and the headers of the response.

        Afterwards, `chunks` yields the body of the response.
        """
        send = self._http.send
        parts = [send(h11.Request(method=method, target=path, headers=headers))]
        if content:
            parts.append(send(h11.Data(content)))
        parts.append(send(h11.EndOfMessage()))
        with contextlib.suppress(httpcore2.WriteError):  # a server may refuse a request before it has read all of it
            await self._stream.write(b"".join(part for part in parts if part))
        while not isinstance(event := await self._next_event(), h11.Response):
            pass  # an informational response
        return event

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body of the response."""
        while isinstance(event := await self._next_event(), h11.Data):
            yield bytes(event.data)

    async def _next_event(self) -> h11.Event | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self._stream.read(READ_BYTES)
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                raise h11.RemoteProtocolError("The server closed the connection without a response.")
            self._http.receive_data(data)
        return event  # type: ignore[return-value]  # mypy does not narrow the type

    def finish(self) -> bool:
        """End the request. Return whether the connection can serve another request."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        self._idle_since = time.monotonic()
        return True

    def is_usable(self, idle_seconds: float) -> bool:
        """Return whether the idle connection is still open and has not been idle for longer than `idle_seconds`."""
        is_recent = time.monotonic() - self._idle_since <= idle_seconds
        return is_recent and not self._stream.get_extra_info("is_readable")

    async def close(self) -> None:
        """Close the connection, even in the middle of a request."""
        await self._stream.aclose()
