"""R9: a model provider is down: nothing else fails, its breaker opens soon and closes soon after it has recovered.

Tasks run in the embedded worker meanwhile, and none loses an attempt without a call to the provider. Short form: the
provider is down for 6 s; long form (`--long`): for 5 minutes. The object store and mail have no test yet.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.limits import Stopwatch
from tests.plugins.llm import conftest as up
from tests.plugins.llm.conftest import upstream  # noqa: F401  (a fixture)

from corral.testing.server import ServerProcess

pytestmark = pytest.mark.one_engine

MINIMUM_CALLS, WAIT_OPEN, TASKS = 10, 2, 15
BREAKER = "/circuit-breakers/llm:up"
CONFIG = """
[plugins.llm.providers.up]
kind = "openai"
base_url = "{url}"
api_key = "{key}"
models = [{{ id = "m1" }}]
max_retries = 0
"""


async def within(seconds: float, what: str, condition: Callable[[], Awaitable[Any]]) -> float:
    """Wait until a condition is met; the seconds that this took."""
    with Stopwatch() as watch:
        while not await condition():
            assert watch.seconds < seconds, f"not within {seconds:g} s: {what}"
            await asyncio.sleep(0.05)
    return round(watch.seconds, 2)


async def keep_using(http: httpx2.AsyncClient, answers: Counter[str], end: asyncio.Event) -> None:
    """Use what has nothing to do with the provider, until `end`."""
    while not end.is_set():
        for path in ("/tasks", "/agents", "/llm/models"):
            answers[f"{path} {(await http.get(path)).status_code}"] += 1
        answers[f"post {(await http.post('/tasks', json={'title': 'x', 'agent_role': 'none'})).status_code}"] += 1
        await asyncio.sleep(0.2)


async def test_r09_a_model_provider_is_down(
    tmp_path: Path,
    database_url: str,
    upstream: Any,  # noqa: F811
    long_form: bool,
    figure: Callable[[str, dict[str, Any]], None],
) -> None:
    file = tmp_path / "corral.toml"
    file.write_text(CONFIG.format(url=upstream.url, key=up.KEY))
    server = ServerProcess(tmp_path, database_url=database_url, arguments=(), environ={"CORRAL_CONFIG": str(file)})
    await asyncio.to_thread(server.start)
    try:
        with server.sign_in() as signed_in:
            headers = {"authorization": signed_in.headers["authorization"]}
        base = f"{server.address}/api/v1"
        async with httpx2.AsyncClient(base_url=base, headers=headers, trust_env=False, timeout=30) as http:
            figure("R9", await take_the_provider_down(http, upstream, 300 if long_form else 6))
    finally:
        server.kill()


async def take_the_provider_down(http: httpx2.AsyncClient, upstream: Any, seconds: float) -> dict[str, Any]:  # noqa: F811
    async def send(method: str, path: str, body: Any = None) -> Any:
        answer = await http.request(method, path, json=body)
        return answer.raise_for_status().json() if answer.content else None

    async def state() -> str:
        return str((await send("GET", BREAKER))["state"])

    async def is_open() -> bool:
        return await state() == "open"

    async def is_closed() -> bool:
        return await state() == "closed"

    await send("POST", "/circuit-breakers", {"name": "llm:up", "wait_open_seconds": WAIT_OPEN})
    agent = {
        "name": "worker",
        "llm_provider": "up",
        "llm_model": "m1",
        "max_concurrent_tasks": 4,
        "retry_policy": {"max_attempts": 20, "initial_seconds": 0, "backoff": "fixed"},
    }
    agent_id = (await send("POST", "/agents", agent))["id"]
    await send("POST", f"/agents/{agent_id}/start")
    upstream.otherwise = up.refuses(500)
    answers, end = Counter[str](), asyncio.Event()
    user = asyncio.ensure_future(keep_using(http, answers, end))
    try:
        ids = [(await send("POST", "/tasks", {"title": "t", "agent_id": agent_id}))["id"] for _ in range(TASKS)]
        opened = await within(30, "the breaker is open", is_open)
        reached = len(upstream.requests)
        assert reached <= MINIMUM_CALLS + 5, f"{reached} calls reached the provider"
        began = time.monotonic()
        await asyncio.sleep(seconds)
        probes, seconds = len(upstream.requests) - reached, time.monotonic() - began
        assert probes <= 3 * (seconds / WAIT_OPEN + 1), f"{probes} calls reached the provider while it was down"
        upstream.otherwise = up.says("done")
        recovered = await within(WAIT_OPEN + 5, "the breaker is closed", is_closed)
    finally:
        end.set()
        await asyncio.wait({user})
    await user

    async def are_done() -> bool:
        return all([(await send("GET", f"/tasks/{task_id}"))["status"] == "completed" for task_id in ids])

    await within(120, "all tasks are completed", are_done)
    attempts = sum([(await send("GET", f"/tasks/{task_id}"))["attempt"] for task_id in ids])
    assert attempts <= len(upstream.requests), "an attempt was used without a call to the provider"
    assert {answer for answer in answers if not answer.endswith((" 200", " 201"))} == set()
    return {
        "down_seconds": round(seconds),
        "calls_until_open": reached,
        "open_after_seconds": opened,
        "calls_while_down": probes,
        "recovered_after_seconds": recovered,
        "attempts": attempts,
        "other_requests": answers.total(),
    }
