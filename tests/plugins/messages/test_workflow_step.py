"""The workflow step `message` sends exactly one message, as the person who started the run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from tests.plugins.workflows.conftest import PLUGINS, World, step, steps_of, transform

from corral.testing.kit import Kit


async def test_a_run_sends_a_message_once(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    kit = await make_kit(plugins=(*PLUGINS, "messages"))
    world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
    agent = await world.ok("POST", "/agents", {"name": "reader"})
    config = {"recipient_agent_id": agent["id"], "subject": "News", "body": "The answer is {{ steps.a.output }}."}
    run = await world.run(transform("a", 42), step("tell", "message", config, depends_on=["a"]))
    assert run["status"] == "completed", run
    (sent,) = (await world.ok("GET", "/messages"))["items"]
    assert steps_of(run)["tell"]["output"] == {"id": sent["id"]}
    assert (sent["body"], sent["trust"]) == ("The answer is 42.", "trusted")
    assert (sent["sender_user_id"], sent["correlation"]["run_id"]) == (world.member.user["id"], run["id"])
    body = {"body": "x", "recipient_agent_id": agent["id"], "correlation": {"run_id": run["id"]}}
    assert (await world.member.post("/messages/send", body)).status == 201


@pytest.mark.one_engine
async def test_a_step_without_a_recipient_is_refused(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    kit = await make_kit(plugins=(*PLUGINS, "messages"))
    world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
    for config in ({"body": "x"}, {"body": "x", "channel": "news", "recipient_user_id": world.member.user["id"]}):
        body = {"name": "a workflow", "steps": [step("tell", "message", config)]}
        assert (await world.member.post("/workflows", body)).status == 422
