"""TCP connections for `httpcore2` that use asyncio directly.

The connections that `httpcore2` provides use anyio, which takes a third of the processor time of a request. They also
ask the operating system whether a connection was closed, although asyncio already knows this.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Iterator
from typing import Any

import httpcore2

READ_BUFFER = 256 * 1024
EXTRA_INFO = {"server_addr": "peername", "client_addr": "sockname"}  # httpcore2's names


class AsyncioNetwork(httpcore2.AsyncNetworkBackend):
    """Opens connections to addresses that the egress guard has checked."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  (httpcore2's name)
        *_: Any,
        **__: Any,
    ) -> httpcore2.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        reader, protocol = _new_protocol(loop)
        with _convert_errors(httpcore2.ConnectTimeout, httpcore2.ConnectError):
            async with asyncio.timeout(timeout):
                transport, _protocol = await loop.create_connection(lambda: protocol, host, port)
        return _Stream(reader, asyncio.StreamWriter(transport, protocol, reader, loop))


class _Reader(asyncio.StreamReader):
    """A stream reader that counts, in `unread`, the bytes that have arrived but have not been read yet."""

    unread = 0

    def feed_data(self, data: Any) -> None:
        self.unread += len(data)
        super().feed_data(data)


class _Stream(httpcore2.AsyncNetworkStream):
    """A connection. Only one task at a time may read from it, and only one at a time may write to it."""

    def __init__(self, reader: _Reader, writer: asyncio.StreamWriter, beneath: _Stream | None = None) -> None:
        self._reader, self._writer = reader, writer
        self._beneath = beneath  # a writer that is collected closes its transport

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  (httpcore2's name)
        with _convert_errors(httpcore2.ReadTimeout, httpcore2.ReadError):
            async with _time_limit(timeout):
                data = await self._reader.read(max_bytes)
        self._reader.unread -= len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        with _convert_errors(httpcore2.WriteTimeout, httpcore2.WriteError):
            async with _time_limit(timeout):
                self._writer.write(buffer)
                await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.transport.abort()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore2.AsyncNetworkStream:
        """Start TLS on the connection, and return the encrypted stream.

        `StreamWriter.start_tls` is not used, because it would leave the reader on the old transport.
        """
        loop = asyncio.get_running_loop()
        reader, protocol = _new_protocol(loop)
        try:
            with _convert_errors(httpcore2.ConnectTimeout, httpcore2.ConnectError):
                async with asyncio.timeout(timeout):
                    transport = await loop.start_tls(
                        self._writer.transport, protocol, ssl_context, server_hostname=server_hostname
                    )
            if transport is None:
                raise httpcore2.ConnectError("the connection was closed during the TLS handshake")
        except BaseException:
            await self.aclose()
            raise
        protocol.connection_made(transport)
        return _Stream(reader, asyncio.StreamWriter(transport, protocol, reader, loop), self)

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # httpcore2 asks this of idle connections: have they been closed, or sent something?
            return bool(self._reader.unread) or self._reader.at_eof() or self._writer.is_closing()
        return self._writer.get_extra_info(EXTRA_INFO.get(info, info))


def _new_protocol(loop: asyncio.AbstractEventLoop) -> tuple[_Reader, asyncio.StreamReaderProtocol]:
    reader = _Reader(limit=READ_BUFFER, loop=loop)
    return reader, asyncio.StreamReaderProtocol(reader, loop=loop)


def _time_limit(seconds: float | None) -> contextlib.AbstractAsyncContextManager[Any]:
    return contextlib.nullcontext() if seconds is None else asyncio.timeout(seconds)


@contextlib.contextmanager
def _convert_errors(on_timeout: type[Exception], otherwise: type[Exception]) -> Iterator[None]:
    """Convert network errors in the `with` block to errors of `httpcore2`.

    A timeout becomes `on_timeout`, and any other `OSError` becomes `otherwise`.
    """
    try:
        yield
    except TimeoutError as error:  # also that of the operating system
        raise on_timeout(str(error)) from error
    except OSError as error:  # also those of TLS
        raise otherwise(_reason(error)) from error


def _reason(error: OSError) -> str:
    """Say why a connection failed, without the numbers and constants that Python adds."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the TLS certificate was refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        cause = (error.reason or "unknown cause").replace("_", " ").lower()
        return f"the TLS handshake failed ({cause}); check whether the server speaks TLS on this port"
    return os.strerror(error.errno) if error.errno else str(error) or "the connection was closed"
