"""Newer price tables, which one process fetches daily and all processes use."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tests.plugins.cost.conftest import Books

from corral.errors import ExpectedFailure
from corral_plugins.cost.service import price_table, price_updates
from corral_plugins.cost.service.price_updates import PriceUpdates

MODEL = {"id": "gpt-4o", "match": {"equals": "gpt-4o"}, "prices": {"input_mtok": 1000, "output_mtok": 2000}}
TABLE = [{"id": "openai", "name": "OpenAI", "api_pattern": "https://api\\.openai\\.com", "models": [MODEL]}]


class Server(BaseHTTPRequestHandler):
    """Serves the table of prices."""

    content = b""
    calls = 0

    def do_GET(self) -> None:
        type(self).calls += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server, from which the table is fetched."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as found:
        threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
        address = f"127.0.0.1:{found.server_port}"
        monkeypatch.setattr(price_table, "update_url", lambda: f"http://{address}/data.json")
        Server.content, Server.calls = json.dumps(TABLE).encode(), 0
        yield address
        found.shutdown()


@pytest.fixture
async def books(make_kit: Callable[..., Any], server: str) -> AsyncIterator[Books]:
    await asyncio.to_thread(price_table.load_price_table)  # under load, its import takes longer than a unit may
    yield await Books().build(await make_kit(plugins=["cost", "settings"], config={"egress.allow": [server]}))
    price_table.use_providers(None, None)


async def switch(books: Books, on: bool) -> None:
    answer = await books.admin.put("/settings/cost/update_prices", {"value": on})
    assert answer.status == 200, answer


async def price(books: Books) -> Any:
    return (await books.read("prices/lookup?provider=openai&model=gpt-4o"))["input_usd"]


async def test_a_newer_table_is_fetched_daily_and_used(books: Books) -> None:
    updates, before = books.kit.service(PriceUpdates), await price(books)
    assert (await books.read("prices?source=builtin"))["total"] > 100
    await updates.fetch()
    assert Server.calls == 0  # the setting is off
    await switch(books, True)
    await updates.fetch()
    await updates.fetch()
    assert (Server.calls, await price(books)) == (1, before)
    await updates.refresh()  # as every process does within seconds
    assert (await price(books), before) == (1000, pytest.approx(2.5, abs=2.5))
    (listed,) = (await books.read("prices?source=builtin&model=gpt-4o"))["items"]
    assert (listed["input_usd"], listed["output_usd"]) == (1000, 2000)
    charged = await books.settle(provider="openai", model="gpt-4o", input_tokens=1_000_000)
    assert charged.cost_micro_usd == 1_000_000_000
    assert charged.price_version is not None
    assert charged.price_version.startswith("genai-prices of 20")
    await books.pass_days(1.01)
    await updates.fetch()
    assert Server.calls == 2
    await switch(books, False)
    await updates.refresh()
    assert await price(books) == before


@pytest.mark.one_engine
@pytest.mark.parametrize("content", [b"[]", b"{}", b"no JSON", b'[{"id": 5}]'])
async def test_a_table_that_cannot_be_read_changes_nothing(books: Books, content: bytes) -> None:
    Server.content, before = content, await price(books)
    await switch(books, True)
    updates = books.kit.service(PriceUpdates)
    with pytest.raises(ExpectedFailure, match="cannot be read"):
        await updates.fetch()
    await updates.refresh()
    assert await price(books) == before


@pytest.mark.one_engine
@pytest.mark.parametrize(
    "data", ["no base64", base64.b64encode(zlib.compress(b'[{"id": 5}]')).decode()], ids=["broken", "other-form"]
)
async def test_a_stored_table_that_cannot_be_read_is_left_alone(books: Books, data: str) -> None:
    """Another version of genai-prices may have stored it."""
    updates, before = books.kit.service(PriceUpdates), await price(books)
    await switch(books, True)
    await books.kit.work(lambda: price_updates._store(data))
    await updates.refresh()
    await updates.refresh()
    assert await price(books) == before
    await books.pass_days(1.01)
    await updates.fetch()
    await updates.refresh()
    assert await price(books) == 1000


@pytest.mark.one_engine
async def test_the_table_is_fetched_through_the_egress_guard(make_kit: Callable[..., Any], server: str) -> None:
    books = await Books().build(await make_kit(plugins=["cost", "settings"]))
    await switch(books, True)
    with pytest.raises(ExpectedFailure, match="address"):
        await books.kit.service(PriceUpdates).fetch()
    assert Server.calls == 0
