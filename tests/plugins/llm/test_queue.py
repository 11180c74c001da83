"""Concurrency slots of a provider: limited over all processes, first come, first served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.llm import conftest as up

from corral import clock
from corral.auth.principal import SYSTEM_PRINCIPAL
from corral.errors import TooMany
from corral.ids import new_id
from corral.testing.kit import Answer, Client
from corral_plugins.llm.models import LlmCall, LlmSlot
from corral_plugins.llm.service import slots as queue
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.llm.service.registry import ProviderRegistry
from corral_plugins.llm.service.slots import ConcurrencySlot, ConcurrencySlots


@pytest.fixture
async def kit(make_kit: Callable[..., Any], providers: dict[str, Any]) -> Any:
    providers["up"]["max_concurrency"] = 2
    providers["minute"] = {**providers["up"], "max_concurrency": 100, "requests_per_minute": 3}
    config = {"plugins.llm": {"providers": providers}, "settings.llm.queue_timeout_seconds": 1}
    return await make_kit(plugins=["cost", "llm"], config=config)


async def chat(client: Client, model: str = "up/m1") -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    return await client.post("/llm/chat/completions", body)


async def places(kit: Any) -> list[tuple[str, str]]:
    found = LlmSlot.select(LlmSlot.call_id, LlmSlot.state).order_by(LlmSlot.id)
    rows: list[tuple[str, str]] = await kit.kernel.database.work(lambda: list(found.tuples()), read=True)
    return rows


async def test_concurrent_calls_are_limited(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")
    running = most = 0

    async def slow(exchange: up.Exchange) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        await up.says("ok")(exchange)

    upstream.otherwise = slow
    answers = await asyncio.gather(*[chat(alice) for _ in range(10)])
    assert {answer.status for answer in answers} == {200}
    assert most == 2
    assert await places(kit) == []


@pytest.mark.one_engine
async def test_waiting_for_a_slot_times_out(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")
    upstream.otherwise = up.hangs
    busy = [asyncio.ensure_future(chat(alice)) for _ in range(2)]
    await upstream.asked(2)
    answer = await chat(alice)
    assert (answer.status, answer.code) == (429, "concurrency_limit")
    assert int(answer.headers["retry-after"]) > 0
    assert len(await places(kit)) == 2  # its number in the queue is gone
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)


async def test_calls_per_minute_are_limited(kit: Any) -> None:
    clock.travel(60 - clock.time_s() % 60)  # a minute begins
    alice = await kit.as_user("member")
    answers = await asyncio.gather(*[chat(alice, "minute/m1") for _ in range(4)])
    assert sorted(answer.status for answer in answers) == [200, 200, 200, 429]
    clock.travel(60)
    assert (await chat(await kit.as_user("member"), "minute/m1")).status == 200


@pytest.mark.parametrize("steps", range(8))
async def test_a_caller_that_leaves_at_once_leaves_no_slot(kit: Any, upstream: Any, steps: int) -> None:
    upstream.otherwise = up.hangs
    gateway = kit.kernel.container.get(Gateway)
    request = {"model": "up/m1", "messages": [{"role": "user", "content": "hi"}]}
    asking = asyncio.ensure_future(gateway.complete(request, by=SYSTEM_PRINCIPAL))
    for _ in range(steps):
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await gateway.stop()
    assert await places(kit) == []
    in_flight = LlmCall.select().where(LlmCall.status == "in_flight").count
    assert await kit.kernel.database.work(in_flight, read=True) == 0


class Process:
    """Another process that uses the same queue."""

    def __init__(self, kit: Any) -> None:
        self.work = kit.kernel.database.work
        self.slots = ConcurrencySlots(self.work)
        self.provider = kit.kernel.container.get(ProviderRegistry).get_provider("up")
        self.keeping = asyncio.ensure_future(self.slots.renew_and_detect_assigned())

    async def enter(self) -> ConcurrencySlot:
        slot: ConcurrencySlot = await self.work(lambda: self.slots.enter_queue(new_id(), self.provider))
        return slot

    async def leave(self, slot: ConcurrencySlot) -> None:
        await self.work(lambda: self.slots.leave_queue(slot))

    def die(self) -> None:
        self.keeping.cancel()


async def test_processes_share_slots_and_the_longest_waiting_is_next(kit: Any) -> None:
    one, two = Process(kit), Process(kit)
    first, second = await one.enter(), await two.enter()
    assert first.held
    assert second.held
    order: list[str] = []

    async def wait(process: Process, name: str) -> ConcurrencySlot:
        slot = await process.enter()
        assert not slot.held
        await process.slots.wait_for_slot(slot, 20)
        order.append(name)
        return slot

    waiting = []
    for process, name in ((two, "a"), (one, "b"), (two, "c")):
        waiting.append(asyncio.ensure_future(wait(process, name)))
        await asyncio.sleep(0.1)
    await one.leave(first)
    await two.leave(await waiting[0])
    await two.leave(await waiting[1])
    await one.leave(await waiting[2])
    assert order == ["a", "b", "c"]
    one.die()
    two.die()


async def test_slots_of_a_dead_process_are_released(kit: Any) -> None:
    dead, alive = Process(kit), Process(kit)
    held = [await dead.enter(), await dead.enter()]
    dead.die()
    slot = await alive.enter()
    with pytest.raises(TooMany):
        await alive.slots.wait_for_slot(slot, 0.3)
    assert all(each.held for each in held)
    clock.travel(queue.HELD_SECONDS + 1)
    slot = await alive.enter()
    await alive.slots.wait_for_slot(slot, 10)
    clock.travel(120)
    alive.die()
    assert await kit.kernel.database.work(queue.delete_expired) > 0
