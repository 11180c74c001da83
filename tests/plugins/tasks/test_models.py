"""The model of an agent: what attempts are labelled with, and that tasks wait while nobody can serve it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.tasks.conftest import World

pytestmark = pytest.mark.one_engine

MINE = {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "models": [{"id": "m1"}]}
NOT_READY, UNKNOWN = "provider_not_configured", "model_not_found"
UNSERVED: list[tuple[dict[str, Any], str]] = [
    ({"llm_model": "openai/gpt-4o-mini"}, NOT_READY),  # a preset without a key
    ({"llm_provider": "openai"}, NOT_READY),
    ({"llm_provider": "mine", "llm_model": "m2"}, UNKNOWN),  # the list of models is known, and m2 is not in it
    ({"llm_model": "gpt-4o-mini"}, UNKNOWN),  # a model of the default provider, which has no such model
    ({"llm_model": "scripted/no-such-script"}, UNKNOWN),
    ({"llm_provider": "mine", "llm_model": "m2", "config": {"fallback_models": ["openai/gpt", "no/m"]}}, UNKNOWN),
]
SERVED: list[tuple[dict[str, Any], str]] = [
    ({}, "scripted/echo"),
    ({"llm_model": "mine/m1"}, "mine/m1"),
    ({"llm_provider": "mine"}, "mine/m1"),
    ({"llm_provider": "mine", "llm_model": "m1"}, "mine/m1"),
    ({"llm_model": "openai/gpt-4o-mini", "config": {"fallback_models": ["scripted/echo"]}}, "openai/gpt-4o-mini"),
]


@pytest.fixture
async def world(make_kit: Callable[..., Any]) -> World:
    plugins, config = ("agents", "cost", "llm", "tasks", "workers"), {"plugins.llm": {"providers": {"mine": MINE}}}
    return await World().build(await make_kit(plugins=plugins, config=config))


async def unmet(world: World, task_id: str) -> list[str]:
    told = (await world.member.get(f"/tasks/{task_id}/explain")).json()
    codes = [each["code"] for each in told["conditions"] if not each["ok"]]
    assert told["claimable"] == (not codes)
    return codes


async def test_a_task_waits_while_nobody_can_serve_the_model_of_its_agent(world: World) -> None:
    for n, (fields, warning) in enumerate(UNSERVED):
        agent = await world.agent(f"unserved {n}", role=f"unserved-{n}", **fields)
        warned = (await world.member.get(f"/agents/{agent}")).json()["warnings"]
        started = (await world.member.post(f"/agents/{agent}/start")).json()["warnings"]
        assert warned == started == [warning], fields
        ways: list[dict[str, Any]] = [{"agent_id": agent}, {"agent_role": f"unserved-{n}"}]
        for wanted in ways:
            assert await unmet(world, await world.task(**wanted)) == ["provider_configured"], (fields, wanted)
    assert await world.worker.claim_all(max_tasks=50) == []
    claimable = await world.worker.client.get(f"/workers/{world.worker.id}/tasks")
    assert claimable.json()["items"] == []
    await world.member.post(f"/agents/{world.agent_id}/stop")
    anybody = await world.task()
    assert await unmet(world, anybody) == ["provider_configured"]
    await world.member.post(f"/agents/{world.agent_id}/start")
    assert await unmet(world, anybody) == []
    assert (await world.worker.claim()).task_id == anybody


async def test_explain_names_the_command_that_chooses_another_model(world: World) -> None:
    agent = await world.agent("typo", llm_model="scripted/no-such-script")
    told = (await world.member.get(f"/tasks/{await world.task(agent_id=agent)}/explain")).json()
    (condition,) = [each for each in told["conditions"] if not each["ok"]]
    offered = "Configured providers: mine, scripted."
    assert condition["detail"] == f"The provider scripted does not offer the model no-such-script. {offered}"
    assert condition["unblock"].startswith("Choose another model: corral agents edit typo --model")


async def test_explain_names_a_provider_that_does_not_exist(world: World) -> None:
    agent = await world.agent("early", llm_model="acme/large")
    assert (await world.member.get(f"/agents/{agent}")).json()["warnings"] == [NOT_READY]
    told = (await world.member.get(f"/tasks/{await world.task(agent_id=agent)}/explain")).json()
    (condition,) = [each for each in told["conditions"] if not each["ok"]]
    assert condition["detail"] == (
        "There is no provider acme for the model acme/large, and the provider scripted does not offer a model of that "
        "name. Configured providers: mine, scripted."
    )
    assert "corral api POST /llm/providers -f name=acme -f kind=openai -f base_url=URL" in condition["unblock"]
    preset = await world.agent("keyless", llm_model="openai/gpt-4o-mini")
    told = (await world.member.get(f"/tasks/{await world.task(agent_id=preset)}/explain")).json()
    (condition,) = [each for each in told["conditions"] if not each["ok"]]
    assert condition["detail"] == "The provider openai is not configured. Configured providers: mine, scripted."
    assert condition["unblock"].startswith("Configure it: corral api POST /llm/providers -f name=openai -f api_key=@")


async def test_an_attempt_names_the_true_model(world: World) -> None:
    for n, (fields, name) in enumerate(SERVED):
        agent = await world.agent(f"served {n}", **fields)
        task_id = await world.task(agent_id=agent)
        assert await unmet(world, task_id) == []
        lease = await world.worker.run()
        assert (lease.task_id, lease.claim["agent"]["model"]) == (task_id, name)
        (attempt,) = (await world.member.get(f"/tasks/{task_id}/attempts")).json()["items"]
        assert attempt["model"] == name
        warnings = (await world.member.get(f"/agents/{agent}")).json()["warnings"]
        assert warnings == (["provider_not_configured"] if name.startswith("openai/") else [])


async def test_a_waiting_claim_is_woken_when_somebody_can_serve_the_model(world: World) -> None:
    agent = await world.agent("early", llm_model="late/m")
    task_id = await world.task(agent_id=agent)
    claiming = asyncio.create_task(world.worker.claim_all(wait_seconds=20))
    await asyncio.sleep(0.1)
    provider = {"name": "late", "kind": "openai", "base_url": "https://93.184.216.34/v1", "models": [{"id": "m"}]}
    made = await world.admin.post("/llm/providers", provider)
    assert made.status == 201, made
    (lease,) = await asyncio.wait_for(claiming, 60)
    assert (lease.task_id, lease.claim["agent"]["model"]) == (task_id, "late/m")
