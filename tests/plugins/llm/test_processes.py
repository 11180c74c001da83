"""Two servers on one database share the slots of a provider; killing one ends its upstream requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.plugins.llm import conftest as up

from corral.testing.server import ServerProcess

pytestmark = pytest.mark.postgres

BODY = {"model": "up/m1", "messages": [{"role": "user", "content": "hi"}]}
CONFIG = """
[plugins.llm.providers.up]
kind = "openai"
base_url = "{url}"
api_key = "{key}"
models = [{{ id = "m1" }}]
max_concurrency = 2
max_retries = 0
"""


@pytest.fixture
def servers(tmp_path: Path, postgres_server: Any, upstream: Any) -> Iterator[list[ServerProcess]]:
    database_url = postgres_server.create_database()
    file = tmp_path / "corral.toml"
    file.write_text(CONFIG.format(url=upstream.url, key=up.KEY))
    environ = {"CORRAL_CONFIG": str(file), "CORRAL_DATA_DIR": str(tmp_path / "data")}
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(ServerProcess(tmp_path / name, database_url=database_url, environ=environ))
    yield made
    for server in made:
        server.kill()
    postgres_server.drop_database(database_url)


async def test_two_servers_share_the_slots_of_a_provider(servers: list[ServerProcess], upstream: Any) -> None:
    tokens = []
    for server in servers:  # one after the other: the first migrates
        await asyncio.to_thread(server.start)
        with server.sign_in() as client:
            tokens.append(client.headers["authorization"])
    running = most = 0

    async def slow(exchange: up.Exchange) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.1)
        running -= 1
        await up.says("ok")(exchange)

    upstream.otherwise = slow
    async with httpx2.AsyncClient(trust_env=False, timeout=60) as http:

        def ask(n: int) -> Any:
            url = f"{servers[n % 2].address}/api/v1/llm/chat/completions"
            return http.post(url, json=BODY, headers={"authorization": tokens[n % 2]})

        answers = await asyncio.gather(*[ask(n) for n in range(16)])
        assert {answer.status_code for answer in answers} == {200}
        assert most == 2
        upstream.otherwise = up.hangs
        asked = len(upstream.exchanges)
        hanging = asyncio.ensure_future(ask(0))
        await asyncio.wait_for(upstream.asked(asked + 1), 20)
        await asyncio.to_thread(servers[0].kill)
        await asyncio.wait_for(upstream.exchanges[-1].gone.wait(), 5)
        with pytest.raises(httpx2.HTTPError):
            await hanging
        upstream.otherwise = up.says("ok")
        assert (await ask(1)).status_code == 200  # one of two places is the dead server's for a while
