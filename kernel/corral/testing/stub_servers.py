"""Replacements for external servers in tests: loopback servers that count connections, and a fake resolver."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping, Sequence
from typing import Self

from corral.egress.resolver import Unresolved, resolve

PUBLIC = "93.184.216.34"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
_LITERAL = re.compile(r"localhost|(?=.*\d)[0-9a-fx.:]+")


def http_response_bytes(status: int, body: bytes = b"", **headers: str) -> bytes:
    """Return an HTTP response as bytes. Keyword arguments are headers: `content_type=` becomes `Content-Type:`."""
    lines = [f"HTTP/1.1 {status} As-Told", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class StubServer:
    """A server at `host`:`port` that sends the same response to every request. Use it with `async with`.

    `heads` contains the request line and the headers of each received request. The response consists of the byte
    sequences in `answers`. The server waits `delay` seconds before it sends each of them.
    """

    def __init__(self, *answers: bytes, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None, delay: float = 0.0):
        self.answers, self.host, self.delay = answers or (OK,), host, delay
        self.connections = 0
        self.open = self.most_open = 0
        self.heads: list[bytes] = []
        self.port = 0
        self._tls = tls
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """The URL of the server."""
        return f"{'https' if self._tls else 'http'}://{self.host}:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self.host, 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            for piece in self.answers:
                await asyncio.sleep(self.delay)
                writer.write(piece)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()


class FakeResolver:
    """A fake resolver for `Egress.resolve`. Each name has a list of results; the last result is repeated.

    The system resolves `localhost` and IP addresses in any notation. Any other name cannot be resolved. `asked`
    contains all requested names.
    """

    def __init__(self, names: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._names = {name: list(answers) for name, answers in names.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = self._names.get(host)
        if answers is not None:
            return list(answers.pop(0) if len(answers) > 1 else answers[0])
        if _LITERAL.fullmatch(host):
            return await resolve(host, port)
        raise Unresolved(f"{host} does not resolve")
