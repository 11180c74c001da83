"""Settings 3: what is changed in one process rules in the others within 2 s, however they hear of it.

What is watched is an effect, not a row: the header that a listed origin is answered with.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterable
from pathlib import Path

import httpx2
import pytest

from corral.testing.database_servers import PostgresServer, ValkeyServer
from corral.testing.server import ServerProcess

FIGURE = 2.0
TLS = ssl.create_default_context()  # one for all: each client would read the certificates of the system anew
CALM = 6  # connections in a row that are answered alike: several processes share one address


def heard(address: str, origin: str) -> bool:
    """Whether whoever answers a new connection knows the origin."""
    with httpx2.Client(base_url=address, trust_env=False, timeout=60, verify=TLS) as fresh:
        answer = fresh.get("/health", headers={"Origin": origin})
    return answer.headers.get("access-control-allow-origin") == origin


def wait_until_all_know(addresses: Iterable[str], origin: str) -> float:
    """Seconds until the last of them knew; a crowded machine is slow by itself."""
    began = last = time.monotonic()
    for address in addresses:
        calm = 0
        while calm < CALM:
            if heard(address, origin):
                calm += 1
            else:
                calm, last = 0, time.monotonic()
                assert last - began < 60, f"{address} does not hear of it"
                time.sleep(0.01)
    return last - began


def allowance() -> float:
    return FIGURE + os.getloadavg()[0]


def change(client: httpx2.Client, origin: str) -> None:
    client.put("/settings/http/cors_origins", json={"value": [origin]}).raise_for_status()


@pytest.mark.sqlite
def test_settings_3_several_processes_on_sqlite(tmp_path: Path) -> None:
    several = ("--processes", "3", "--no-embedded-worker")
    with ServerProcess(tmp_path, arguments=several) as server, server.sign_in() as admin:
        for number in range(3):
            origin = f"https://app{number}.example.org"
            change(admin, origin)
            assert wait_until_all_know([server.address], origin) < allowance()


@pytest.mark.postgres
@pytest.mark.redis
@pytest.mark.parametrize("with_redis", [True, False])
def test_settings_3_servers_with_and_without_redis(
    tmp_path: Path, postgres_server: PostgresServer, valkey_server: ValkeyServer, with_redis: bool
) -> None:
    url = postgres_server.create_database()
    environ = {"CORRAL_DATA_DIR": str(tmp_path / "data")}
    if with_redis:
        environ["CORRAL_REDIS_URL"] = valkey_server.url()
    servers = []
    try:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            servers.append(ServerProcess(tmp_path / name, database_url=url, environ=environ).start())
        with servers[0].sign_in() as admin:
            for number in range(3):
                origin = f"https://app{number}.example.org"
                change(admin, origin)
                assert wait_until_all_know([server.address for server in servers], origin) < allowance()
    finally:
        for server in servers:
            server.kill()
        postgres_server.drop_database(url)
