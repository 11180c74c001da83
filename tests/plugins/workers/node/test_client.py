"""How workers connect to their server."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from corral.cli.api_client import ApiClient, ApiClientError
from corral.testing.certificates import CertificateAuthority
from corral_plugins.workers.node.client import ServerUnreachable, WorkerApiClient
from corral_plugins.workers.node.leased_task import TaskLease


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def using(url: str, work: Callable[[WorkerApiClient], Any]) -> Any:
    async def run() -> Any:
        client = WorkerApiClient(url, "token")
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


async def watches(client: WorkerApiClient) -> bool:
    """Whether the system detects a dead connection."""
    async with client.http.stream("GET", client.url) as answer:
        opened: socket.socket = answer.extensions["network_stream"].get_extra_info("socket")
        return bool(opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # the second is this machine, and not known as loopback
def test_a_connection_that_died_silently_is_noticed(port: int, host: str) -> None:
    assert using(f"http://{host}:{port}", watches)


def test_the_certificate_of_a_server_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a worker and by a command: without an authority who vouches for the certificate, nothing is sent."""
    authority = CertificateAuthority(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = authority.server("localhost").wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"https://localhost:{server.server_port}"
    with pytest.raises(ServerUnreachable):
        using(url, lambda client: client.send_request("GET", "/x"))
    with pytest.raises(ApiClientError, match="its TLS certificate was refused"):
        ApiClient(url).get("/x")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    using(url, lambda client: client.send_request("GET", "/x"))
    server.shutdown()


def test_a_proxy_of_the_environment_is_used_where_it_is_to_be(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(ServerUnreachable):
        using(f"http://0.0.0.0:{port}", lambda client: client.send_request("GET", "/x"))
    assert using(f"http://127.0.0.1:{port}", watches)
    monkeypatch.setenv("no_proxy", "0.0.0.0")
    assert using(f"http://0.0.0.0:{port}", watches)


def test_a_lease_that_became_shorter_ends_sooner() -> None:
    async def run() -> None:
        client, sent = WorkerApiClient("http://127.0.0.1:1", "token"), time.monotonic()
        lease = TaskLease(client, {"task": {"id": "t"}, "lease_id": "l"}, sent=sent, seconds=60)
        lease.record_renewal(sent)
        assert lease.deadline == sent + 60
        lease.record_renewal(sent + 1, 10)
        assert lease.deadline == sent + 11
        await client.close()

    asyncio.run(run())
