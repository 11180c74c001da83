"""Circuit breakers over several server processes on one database: shared states, shared permits, lost probes.

Short form: two processes and 60 callers; long form (`--long`): four processes and 200 callers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import pytest
from tests.limits import Stopwatch
from tests.plugins.llm import conftest as up

from corral.testing.server import ServerProcess, free_port

BODY = {"model": "up/m1", "messages": [{"role": "user", "content": "hi"}]}
BREAKER, WAIT_OPEN = "/circuit-breakers/llm:up", 2
TRIES = 5
OTHER = {"ok": "circuit_open", "circuit_open": "ok"}
CONFIG = """
[plugins.llm.providers.up]
kind = "openai"
base_url = "{url}"
api_key = "{key}"
models = [{{ id = "m1" }}]
max_concurrency = 1000
max_retries = 0
"""


class Fleet:
    """Server processes on one database, the provider that they call, and an admin."""

    def __init__(self, servers: list[ServerProcess], token: str, upstream: up.Upstream) -> None:
        self.servers, self.token, self.upstream = servers, token, upstream
        self.http = httpx2.AsyncClient(trust_env=False, timeout=60, limits=httpx2.Limits(max_connections=None))

    async def send(self, method: str, path: str, body: Any = None, *, by: int = 0) -> Any:
        url, headers = f"{self.servers[by].address}/api/v1{path}", {"authorization": self.token}
        return await self.http.request(method, url, json=body, headers=headers)

    async def ask(self, by: int = 0) -> str:
        """Call the model; the code of the problem, or `ok`."""
        answer = await self.send("POST", "/llm/chat/completions", BODY, by=by)
        return "ok" if answer.status_code == 200 else answer.json()["code"]

    async def act(self, action: str, *, by: int = 0) -> None:
        answer = await self.send("POST", f"{BREAKER}/{action}", None if action == "reset" else {}, by=by)
        assert answer.status_code == 200, answer.text

    async def state(self, *, by: int = 0) -> str:
        return str((await self.send("GET", BREAKER, by=by)).json()["state"])

    async def open(self) -> None:
        """Let calls of the first process fail until the breaker is open, and is half open at the next call."""

        async def is_rejected() -> bool:
            return await self.ask() == "circuit_open"

        await wait_until(is_rejected)
        await wait_until(lambda: self.is_in("open"))
        await asyncio.sleep(WAIT_OPEN + 0.1)

    async def reaches_the_others_in_time(
        self, action: str, expected: str, *, by: int = 0, before: str | None = None
    ) -> None:
        """Act in one process, and check that the others follow within a second.

        A machine that is busy makes any process late. Then the action is repeated, after its opposite, or the one given
        in `before`: of some times, the best one counts.
        """
        opposites = {"force-open": "force-close", "force-close": "force-open"}
        for _ in range(TRIES):
            took = await self._reaches_the_others(action, expected, by=by)
            if took <= 1.0:
                return
            await self._reaches_the_others(before or opposites[action], OTHER[expected], by=by)
        raise AssertionError(f"the others followed {action} only after {took:.1f} s")

    async def _reaches_the_others(self, action: str, expected: str, *, by: int) -> float:
        """Act in one process. Return when the last call began that did not follow, in seconds since the action."""
        other, last = 1 - by, 0.0
        await self.act(action, by=by)
        with Stopwatch() as watch:
            while True:
                began = watch.seconds
                if await self.ask(other) == expected:
                    return last
                assert began < 60, "not in time"
                last = began
                await asyncio.sleep(0.05)

    async def is_served_by_all(self) -> bool:
        return {await self.ask(by) for by in range(len(self.servers))} == {"ok"}

    async def is_in(self, state: str) -> bool:
        return await self.state() == state


async def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> float:
    """Wait until a condition is met; the seconds that this took."""
    with Stopwatch() as watch:
        while not await condition():
            assert watch.seconds < seconds, "not in time"
            await asyncio.sleep(0.05)
    return watch.seconds


@pytest.fixture(
    scope="module",
    params=[pytest.param("sqlite", marks=pytest.mark.sqlite), pytest.param("postgres", marks=pytest.mark.postgres)],
)
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[ServerProcess], str, int]]:
    """The servers, the token of an admin, and the port of the provider."""
    folder, port = tmp_path_factory.mktemp("breakers"), free_port()
    file, postgres = folder / "corral.toml", None
    file.write_text(CONFIG.format(url=f"http://127.0.0.1:{port}/v1", key=up.KEY))
    database_url = f"sqlite:///{folder}/corral.db"
    if request.param == "postgres":
        postgres = request.getfixturevalue("postgres_server")
        database_url = postgres.create_database()
    environ = {"CORRAL_CONFIG": str(file), "CORRAL_DATA_DIR": str(folder / "data")}
    servers = []
    try:
        for name in "abcd" if request.config.getoption("--long") else "ab":
            (folder / name).mkdir()
            servers.append(ServerProcess(folder / name, database_url=database_url, environ=environ))
            servers[-1].start()
        with servers[0].sign_in() as client:
            body = {"name": "llm:up", "wait_open_seconds": WAIT_OPEN}
            client.post("/circuit-breakers", json=body).raise_for_status()
            yield servers, client.headers["authorization"], port
    finally:
        for server in servers:
            server.kill()
        if postgres is not None:
            postgres.drop_database(database_url)


@pytest.fixture
async def fleet(started: tuple[list[ServerProcess], str, int]) -> AsyncIterator[Fleet]:
    servers, token, port = started
    upstream = up.Upstream()
    await upstream.start(port)
    made = Fleet(servers, token, upstream)
    await made.act("reset")
    await wait_until(made.is_served_by_all)
    try:
        yield made
    finally:
        await made.http.aclose()
        await upstream.stop()


async def test_circuit_breakers_5_forced_states_hold_in_all_processes_and_after_a_restart(fleet: Fleet) -> None:
    assert [await fleet.ask(0), await fleet.ask(1)] == ["ok", "ok"]
    for action, expected in (("force-open", "circuit_open"), ("force-close", "ok"), ("force-open", "circuit_open")):
        await fleet.reaches_the_others_in_time(action, expected)
        assert await fleet.ask(0) == expected
    await asyncio.to_thread(fleet.servers[1].kill)
    await asyncio.to_thread(fleet.servers[1].start)
    assert await fleet.ask(1) == "circuit_open"
    await fleet.reaches_the_others_in_time("reset", "ok", by=1, before="force-open")


async def test_circuit_breakers_2_all_processes_together_send_at_most_three_probes(
    fleet: Fleet, long_form: bool
) -> None:
    callers, upstream = 200 if long_form else 60, fleet.upstream
    upstream.otherwise = up.refuses(500)
    await fleet.open()
    running = most = 0
    gate = asyncio.Event()

    async def hold(exchange: up.Exchange) -> None:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await gate.wait()
        running -= 1
        await up.says("back")(exchange)

    upstream.otherwise = hold
    calls = [asyncio.ensure_future(fleet.ask(n % len(fleet.servers))) for n in range(callers)]

    async def are_decided() -> bool:
        return sum(call.done() for call in calls) == callers - 3 and running == 3

    await wait_until(are_decided, 60)
    assert most == 3
    gate.set()
    assert sorted(await asyncio.gather(*calls)) == ["circuit_open"] * (callers - 3) + ["ok"] * 3
    assert await fleet.state() == "closed"
    await wait_until(fleet.is_served_by_all, 2)


async def test_circuit_breakers_3_a_killed_process_does_not_wedge_the_breaker(fleet: Fleet) -> None:
    upstream = fleet.upstream
    upstream.otherwise = up.refuses(500)
    await fleet.open()
    upstream.otherwise = up.hangs
    reached = len(upstream.exchanges)
    probe = asyncio.ensure_future(fleet.ask(1))
    await asyncio.wait_for(upstream.asked(reached + 1), 60)
    assert await fleet.state() == "half_open"
    await asyncio.to_thread(fleet.servers[1].kill)
    with contextlib.suppress(httpx2.HTTPError):
        await probe
    upstream.otherwise = up.says("back")
    assert await wait_until(lambda: fleet.is_in("open")) <= WAIT_OPEN + 5
    await asyncio.sleep(WAIT_OPEN)

    async def is_closed() -> bool:
        return await fleet.ask() == "ok"

    assert await wait_until(is_closed) <= 5
    assert await fleet.state() == "closed"
    await asyncio.to_thread(fleet.servers[1].start)
