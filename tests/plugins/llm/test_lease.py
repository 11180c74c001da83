"""The gateway for agents: lease checks, the agent's models, fallback. Tasks and agents are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import msgspec
import pytest
from tests.limits import within

from corral.auth.principal import Authenticator, Principal
from corral.errors import Conflict, Forbidden, Problem
from corral.events.event import Event
from corral.plugin import Plugin, Provide, hookimpl
from corral.testing.kit import Client
from corral_plugins.agents.api import AgentDeleted, AgentFacts, Agents
from corral_plugins.cost.models import CostEvent
from corral_plugins.llm.models import LlmCall, LlmSlot
from corral_plugins.llm.service.calls import CallRecord
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.tasks.api import (
    LeaseFacts,
    LeaseRef,
    LeaseState,
    LiveAttempt,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskRetried,
    Tasks,
)

SCRIPTS = {
    "mine": {"turns": [{"text": "served"}]},
    "hangs": {"turns": [{"text": "never", "delay_seconds": 60}]},
    "slow": {"turns": [{"text": "late", "delay_seconds": 1}]},
    "broken": {"turns": [{"error": {"status": 500, "message": "down"}}]},
    "long": {"turns": [{"text": "x" * 100}]},
    "picky": {"turns": [{"error": {"status": 400, "message": "bad"}}]},
}
TASK, LEASE, AGENT, USER, ATTEMPT = (f"0190aaaa-0000-7000-8000-00000000000{n}" for n in range(5))


class World:
    """What the fakes return."""

    live = True
    state = "ok"
    renewed = 0
    spent: ClassVar[list[tuple[int, int]]] = []
    provider: str | None = "scripted"
    model: str | None = "mine"
    fallbacks: ClassVar[list[str]] = []
    max_tokens: int | None = None


class FakeTasks:
    def live_attempt(self, task_id: str, lease_id: str) -> LiveAttempt | None:
        assert (task_id, lease_id) == (TASK, LEASE)
        return LiveAttempt(attempt_id=ATTEMPT, lease_until="", cost_left_micro=None) if World.live else None

    def lease_states(self, leases: list[LeaseRef]) -> list[LeaseState]:
        state = World.state if World.live else "lost"
        return [
            LeaseState(task_id=each.task_id, lease_id=each.lease_id, state=state, expires_at=None) for each in leases
        ]

    def lease_facts(self, task_id: str, lease_id: str) -> LeaseFacts | None:
        return LeaseFacts(
            task_id=TASK,
            lease_id=LEASE,
            attempt_id=ATTEMPT,
            agent_id=AGENT,
            worker_id=ATTEMPT,
            requester_id=USER,
            is_live=World.live,
        )

    def renew_lease(self, task_id: str, lease_id: str) -> None:
        World.renewed += 1

    def record_usage(
        self, task_id: str, lease_id: str, *, input_tokens: int, output_tokens: int, cost_usd: float | None = None
    ) -> None:
        assert (task_id, lease_id, cost_usd) == (TASK, LEASE, 0)
        World.spent.append((input_tokens, output_tokens))


class FakeAgents:
    def find(self, agent_id: str) -> AgentFacts | None:
        empty: dict[str, Any] = dict.fromkeys(AgentFacts.__struct_fields__)
        known = {"id": AGENT, "config": {"fallback_models": World.fallbacks, "max_tokens": World.max_tokens}}
        return AgentFacts(**{**empty, **known, "llm_provider": World.provider, "llm_model": World.model})


class TasksPlugin(Plugin):
    """A fake service."""

    name = "tasks"

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(Tasks, FakeTasks)]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [TaskCompleted, TaskFailed, TaskCancelled, TaskRetried]


class AgentsPlugin(Plugin):
    """A fake service."""

    name = "agents"

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(Agents, FakeAgents)]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [AgentDeleted]


class Attempts:
    """Authenticates `fake_<n>` as the token of attempt n."""

    def recognises(self, credential: str) -> bool:
        return credential.startswith("fake_")

    def authenticate(self, credential: str) -> Principal:
        return msgspec.structs.replace(BY, id=credential)


class AttemptsPlugin(Plugin):
    """A fake service."""

    name = "attempts"

    @hookimpl
    def corral_authenticators(self) -> Iterable[type[Authenticator]]:
        return [Attempts]


@pytest.fixture
async def kit(make_kit: Callable[..., Any]) -> Any:
    World.live, World.state, World.renewed, World.provider, World.model, World.fallbacks = (
        True,
        "ok",
        0,
        "scripted",
        "mine",
        [],
    )
    World.spent.clear()
    World.max_tokens = None
    return await make_kit(
        plugins=["cost", "llm", TasksPlugin, AgentsPlugin, AttemptsPlugin], config={"plugins.llm": {"scripts": SCRIPTS}}
    )


BY = Principal(
    kind="agent",
    id=AGENT,
    agent_id=AGENT,
    user_id=USER,
    role="member",
    task_id=TASK,
    lease_id=LEASE,
    permissions=frozenset({"llm.use"}),
)


async def ask(kit: Any, model: str = "agent", by: Principal = BY, **more: Any) -> dict[str, Any]:
    request = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    answer: dict[str, Any] = await kit.kernel.container.get(Gateway).complete(request, by=by)
    return answer


async def rows(kit: Any) -> list[Any]:
    found: list[Any] = await kit.kernel.database.work(
        lambda: list(LlmCall.select().order_by(LlmCall.created_at)), read=True
    )
    return found


@pytest.mark.one_engine
async def test_agent_means_the_agents_model_and_the_lease_is_renewed(kit: Any) -> None:
    assert (await ask(kit))["model"] == "scripted/mine"
    assert World.renewed == 2
    (row,) = await rows(kit)
    assert (row.task_id, row.agent_id, row.user_id, row.requested_model) == (TASK, AGENT, USER, "agent")


@pytest.mark.one_engine
async def test_the_agents_token_limit_holds_unless_the_request_has_one(kit: Any) -> None:
    World.model, World.max_tokens = "long", 2
    assert (await ask(kit))["choices"][0]["message"]["content"] == "x" * 8
    assert (await ask(kit, max_tokens=3))["choices"][0]["message"]["content"] == "x" * 12


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("provider", "model", "expected"),
    [
        (None, None, "scripted/echo"),
        ("scripted", None, "scripted/echo"),
        (None, "mine", "scripted/mine"),
        (None, "scripted/mine", "scripted/mine"),
    ],
)
async def test_defaults_of_agents_without_a_model(
    kit: Any, provider: str | None, model: str | None, expected: str
) -> None:
    World.provider, World.model = provider, model
    assert (await ask(kit))["model"] == expected


async def test_llm_10_other_models_are_forbidden(kit: Any) -> None:
    for model in ("scripted/slow", "slow", "default"):
        with pytest.raises(Forbidden):
            await ask(kit, model)
    assert (await ask(kit, "mine"))["model"] == "scripted/mine"


async def begun(kit: Any) -> None:
    """Return when the call of the model runs."""
    while not await rows(kit):  # noqa: ASYNC110  (nothing tells)
        await asyncio.sleep(0.01)


async def test_a_lost_lease_is_reported_before_and_after_the_call(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral_plugins.llm.service.task_leases.CHECK_SECONDS", 60.0)  # not during the call
    World.live = False
    with pytest.raises(Conflict) as before:
        await ask(kit)
    assert before.value.code == "lease_lost"
    assert await rows(kit) == []
    World.live, World.model = True, "slow"
    asking = asyncio.create_task(ask(kit))
    await begun(kit)
    World.live = False
    with pytest.raises(Conflict) as after:
        await asking
    assert after.value.code == "lease_lost"
    (row,) = await rows(kit)
    assert (row.status, row.output_tokens) == ("completed", 1)


@pytest.mark.one_engine
@pytest.mark.parametrize("how", ["lost", "cancel_requested"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_lease_that_ends_ends_its_call_within_a_second(kit: Any, how: str, stream: bool) -> None:
    World.model = "hangs"
    request = {"model": "agent", "messages": [{"role": "user", "content": "hi " * 100}]}
    gateway = kit.kernel.container.get(Gateway)

    async def ask() -> None:
        if stream:
            async for _ in gateway.stream(request, by=BY):
                pass
        else:
            await gateway.complete(request, by=BY)

    asking = asyncio.create_task(ask())
    await begun(kit)
    World.state = how
    with pytest.raises(Conflict) as ended:
        async with within(3):
            await asking
    assert ended.value.code == "lease_lost"
    (row,) = await rows(kit)
    assert (row.status, row.error["code"], row.estimated) == ("failed", "lease_lost", True)
    assert World.spent[-1][0] > 50  # the input was sent


@pytest.mark.one_engine
async def test_a_failing_model_falls_back_but_a_bad_request_does_not(kit: Any) -> None:
    World.model, World.fallbacks = "broken", ["scripted/broken", "scripted/mine"]
    assert (await ask(kit))["model"] == "scripted/mine"
    (row,) = await rows(kit)
    assert (row.model, row.attempts, row.status) == ("mine", 2, "completed")
    World.model = "picky"
    with pytest.raises(Problem) as refused:
        await ask(kit)
    assert refused.value.code == "validation_error"
    World.model, World.fallbacks = "broken", []
    with pytest.raises(Problem) as broken:
        await ask(kit)
    assert broken.value.code == "provider_error"


@pytest.mark.one_engine
async def test_a_stream_checks_the_lease_at_its_end(kit: Any) -> None:
    World.model = "slow"
    request = {"model": "agent", "messages": [{"role": "user", "content": "hi"}]}
    chunks = kit.kernel.container.get(Gateway).stream(request, by=BY)
    assert (await anext(chunks))["choices"][0]["delta"]["role"] == "assistant"
    World.live = False
    with pytest.raises(Conflict):
        async for _ in chunks:
            pass


@pytest.mark.one_engine
async def test_a_stream_that_is_closed_ends_the_call(kit: Any) -> None:
    World.model = "slow"
    request = {"model": "agent", "messages": [{"role": "user", "content": "hi"}]}
    gateway = kit.kernel.container.get(Gateway)
    chunks = gateway.stream(request, by=BY)
    await anext(chunks)
    await chunks.aclose()
    await gateway.stop()
    (row,) = await rows(kit)
    assert row.status == "cancelled"


@pytest.mark.parametrize("method", ["complete", "begin_stream"])
async def test_a_call_whose_caller_leaves_while_it_is_admitted_is_settled(
    kit: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    gateway = kit.kernel.container.get(Gateway)
    admitted, proceed, work = asyncio.Event(), asyncio.Event(), kit.kernel.database.work

    async def stop_after_admission(fn: Any, **options: Any) -> Any:
        result = await work(fn, **options)
        if isinstance(result, CallRecord):
            admitted.set()
            await proceed.wait()
        return result

    monkeypatch.setattr(gateway, "_work", stop_after_admission)
    request = {"model": "agent", "messages": [{"role": "user", "content": "hi"}]}
    asking = asyncio.ensure_future(getattr(gateway, method)(request, by=BY))
    await admitted.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    proceed.set()
    await gateway.stop()
    (row,) = await rows(kit)
    assert (row.status, row.attempts) == ("cancelled", 0)
    assert await kit.kernel.database.work(LlmSlot.select().count, read=True) == 0


async def test_llm_7_a_second_attempt_gets_the_stored_answer(kit: Any) -> None:
    body = {"model": "agent", "messages": [{"role": "user", "content": "hi"}]}
    headers = {"Idempotency-Key": f"{TASK}:1"}
    first = await Client(kit.application.app, "fake_1").post("/llm/chat/completions", body, headers=headers)
    assert first.status == 200, first
    second = await Client(kit.application.app, "fake_2").post("/llm/chat/completions", body, headers=headers)
    assert second.json() == first.json()
    assert second.headers["idempotency-replayed"] == "true"
    assert len(await rows(kit)) == 1
    assert len(World.spent) == 1  # and one cost event, whose key is the call's id
    assert await kit.kernel.database.work(CostEvent.select().count, read=True) == 1


async def test_llm_7_a_second_attempt_gets_the_stored_stream(kit: Any) -> None:
    body = {"model": "agent", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    headers = {"Idempotency-Key": f"{TASK}:2"}
    first = await Client(kit.application.app, "fake_1").post("/llm/chat/completions", body, headers=headers)
    assert first.body.endswith(b"data: [DONE]\n\n")
    second = await Client(kit.application.app, "fake_2").post("/llm/chat/completions", body, headers=headers)
    assert (second.body, second.headers["content-type"]) == (first.body, "text/event-stream")
    assert second.headers["idempotency-replayed"] == "true"
    assert len(await rows(kit)) == 1


async def test_a_failed_stream_is_not_stored(kit: Any) -> None:
    World.model = "slow"
    body = {"model": "agent", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    headers = {"Idempotency-Key": f"{TASK}:3"}

    async def end() -> None:
        await begun(kit)
        World.live = False

    ending = asyncio.create_task(end())
    first = await Client(kit.application.app, "fake_1").post("/llm/chat/completions", body, headers=headers)
    await ending
    assert b'"code":"lease_lost"' in first.body
    World.live = True
    second = await Client(kit.application.app, "fake_2").post("/llm/chat/completions", body, headers=headers)
    assert "idempotency-replayed" not in second.headers
    assert second.body.endswith(b"data: [DONE]\n\n")
