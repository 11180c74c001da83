"""TLS to providers, straight and through the operator's proxy, on both event loops that serve Corral."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from tests.plugins.llm.test_provider_connections import KeepAliveServer

from corral.config.reader import load
from corral.egress.client import Egress
from corral.testing.certificates import CertificateAuthority
from corral.testing.stub_servers import FakeResolver
from corral_plugins.llm.api import ProviderConnection, ProviderError
from corral_plugins.llm.providers.http import ProviderHttp

PUBLIC = "93.184.216.34"
LARGE = "a text " * 700_000

pytestmark = pytest.mark.one_engine


@contextlib.asynccontextmanager
async def listening(serve: Callable[..., Any], tls: Any = None) -> AsyncIterator[int]:
    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    yield listener.sockets[0].getsockname()[1]
    listener.close()


class Proxy:
    """Opens tunnels, all of them to the port `target` of this machine."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.tunnels = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one tunnel."""
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(f"CONNECT {PUBLIC}:8443 ".encode())
        self.tunnels += 1
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(_copy(reader, back), _copy(there, writer))


async def _copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        to.write(data)
    to.close()


async def answers(egress: Egress, url: str, *, operator: bool = False) -> list[Any]:
    client = ProviderHttp()
    client.start(egress)
    connection = ProviderConnection(name="up", base_url=url, operator=operator)
    try:
        async with asyncio.timeout(120):
            return [await client.post_json(connection, f"{url}/chat", {}, {"text": LARGE}) for _ in range(2)]
    finally:
        await client.close()


async def directly(authority: CertificateAuthority) -> None:
    server, names = KeepAliveServer(), {name: [["127.0.0.1"]] for name in ("good.example", "other.example")}
    server.proceed.set()
    server.text = LARGE
    async with listening(server.serve, authority.server("good.example")) as port:
        egress = Egress(load({}, path=Path(os.devnull)), resolve=FakeResolver(names))
        received = await answers(egress, f"https://good.example:{port}/v1", operator=True)
        assert [each["choices"][0]["message"]["content"] == LARGE for each in received] == [True, True]
        assert server.opened == 1
        with pytest.raises(
            ProviderError, match=r"cannot be reached: the TLS certificate was refused: Hostname mismatch"
        ):
            await answers(egress, f"https://other.example:{port}/v1", operator=True)


async def through_a_proxy(authority: CertificateAuthority, scheme: str) -> None:
    server = KeepAliveServer()
    server.proceed.set()
    server.text = LARGE
    async with listening(server.serve, authority.server("good.example")) as port:
        proxy = Proxy(port)
        tls = authority.server("localhost") if scheme == "https" else None
        async with listening(proxy.serve, tls) as proxy_port:
            overrides = {"egress.proxy": f"{scheme}://localhost:{proxy_port}"}
            config = load({}, path=Path(os.devnull), overrides=overrides)
            egress = Egress(config, resolve=FakeResolver({"good.example": [[PUBLIC]]}))
            assert len(await answers(egress, "https://good.example:8443/v1")) == 2
        assert (server.opened, proxy.tunnels) == (1, 1)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("way", ["directly", "http", "https"])
def test_tls_is_verified_for_the_name_of_the_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_loop: Callable[[], asyncio.AbstractEventLoop], way: str
) -> None:
    authority = CertificateAuthority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(directly(authority) if way == "directly" else through_a_proxy(authority, way))
