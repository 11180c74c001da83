"""Kinds and actions that another plugin contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from tests.plugins.triggers.conftest import PLUGINS, Alarm

from corral.errors import Unavailable
from corral.plugin import Plugin, hookimpl
from corral_plugins.triggers.api import FireContext, TimeRule, TriggerAction, TriggerKind
from corral_plugins.triggers.service import scheduler

FULL_MOON = {"type": "object", "properties": {"phase": {"type": "integer"}}, "additionalProperties": False}
started: list[dict[str, Any]] = []
breaks: list[bool] = []


def every_minute(rule: TimeRule, after: float) -> float | None:
    if breaks:
        raise ValueError("The moon is hidden.")
    return after + 60


def start(context: FireContext, fields: dict[str, Any]) -> dict[str, Any]:
    if fields["word"] == "later" and not started:
        started.append({})
        raise Unavailable("Not yet.")
    return {"said": fields["word"], "by": context.owner.id}


class MoonPlugin(Plugin):
    """Moon."""

    name = "moon"
    wants = ("triggers",)

    @hookimpl(optionalhook=True)
    def corral_trigger_kinds(self) -> Iterable[TriggerKind]:
        return [TriggerKind(type="moon", title="Moon", schema=FULL_MOON, example={}, next_time=every_minute)]

    @hookimpl(optionalhook=True)
    def corral_trigger_actions(self) -> Iterable[TriggerAction]:
        schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
        return [TriggerAction(type="say", title="Say", schema=schema, example={}, permission="tasks.read", run=start)]


async def world(make_kit: Callable[..., Any]) -> Alarm:
    alarm = Alarm()
    started.clear()
    breaks.clear()
    await alarm.build(await make_kit(plugins=(*PLUGINS, MoonPlugin)))
    return alarm


@pytest.mark.one_engine
async def test_corral_trigger_kinds(make_kit: Callable[..., Any]) -> None:
    alarm = await world(make_kit)
    made = await alarm.create("moon", {"phase": 1})
    assert made["overlap"] == "skip"
    await alarm.run(seconds=61)
    assert await alarm.statuses(made["id"]) == ["fired"]
    types = (await alarm.member.get("/triggers/types")).json()
    assert {"type": "moon", "title": "Moon", "plugin": "moon", "schema": FULL_MOON, "example": {}} in types["kinds"]


async def test_a_trigger_whose_plugin_is_out_of_service_fires_when_it_is_back(make_kit: Callable[..., Any]) -> None:
    alarm = await world(make_kit)
    made = await alarm.create("moon", {"phase": 1}, overlap="allow")
    alarm.kit.kernel.registry.change_state("moon", "disabled", "for a test")
    changed = await alarm.member.put(f"/triggers/{made['id']}", {"description": "Wait for the moon."})
    assert changed.status == 200, changed
    await alarm.run(seconds=600)
    assert await alarm.statuses(made["id"]) == []
    alarm.kit.kernel.registry.change_state("moon", "active", None)
    await alarm.run()
    assert (await alarm.statuses(made["id"]))[-1] == "fired"
    await alarm.run(seconds=61)
    assert (await alarm.statuses(made["id"])).count("fired") == 2


async def test_a_kind_that_fails_stops_no_other_trigger(
    make_kit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "BATCH_SIZE", 1)
    alarm = await world(make_kit)
    broken = await alarm.create("moon", {"phase": 1})
    sound = await alarm.create("interval", {"seconds": 60})
    breaks.append(True)
    await alarm.run(seconds=62)
    assert (await alarm.statuses(broken["id"]), await alarm.statuses(sound["id"])) == ([], ["fired"])
    breaks.clear()
    await alarm.run(seconds=62)
    assert (await alarm.statuses(broken["id"]))[-1] == "fired"


@pytest.mark.one_engine
async def test_corral_trigger_actions(make_kit: Callable[..., Any]) -> None:
    """An action that fails for a moment is tried again in the same slot, 10 s later."""
    alarm = await world(make_kit)
    made = await alarm.create(action={"type": "say", "word": "later"})
    await alarm.member.post(f"/triggers/{made['id']}/fire", {})
    await alarm.run()
    (row,) = await alarm.history(made["id"])
    assert (row["status"], row["attempt"]) == ("pending", 1)
    assert "Not yet" in row["error"]
    await alarm.run(seconds=9)
    assert await alarm.statuses(made["id"]) == ["pending"]
    await alarm.run(seconds=2)
    (row,) = await alarm.history(made["id"])
    assert (row["status"], row["attempt"]) == ("fired", 2)
    assert row["result"] == {"said": "later", "by": alarm.member.user["id"]}
    alarm.kit.kernel.registry.change_state("moon", "disabled", "for a test")
    await alarm.member.post(f"/triggers/{made['id']}/fire", {})
    await alarm.run()
    assert (await alarm.history(made["id"]))[-1]["status"] == "failed"


@pytest.mark.one_engine
async def test_the_actions_of_the_built_in_plugins(make_kit: Callable[..., Any]) -> None:
    """Of agents: start and stop; of messages: send. `tasks` is in every other test."""
    alarm = Alarm()
    await alarm.build(await make_kit(plugins=(*PLUGINS, "messages")))
    agent = await alarm.agent("sleeper", start=False)
    actions = (
        {"type": "start_agent", "agent_id": agent},
        {"type": "stop_agent", "agent_id": agent, "mode": "immediate"},
        {"type": "send_message", "recipient_agent_id": agent, "subject": "{{ trigger.name }}", "body": "Wake up"},
    )
    found = []
    for action in actions:
        made = await alarm.create(action=action)
        assert (await alarm.member.post(f"/triggers/{made['id']}/fire", {})).status == 202
        await alarm.run()
        (row,) = await alarm.history(made["id"])
        assert row["status"] == "fired", row
        found.append(((await alarm.member.get(f"/agents/{agent}")).json()["status"], set(row["result"])))
    assert found == [("idle", {"agent_id"}), ("offline", {"agent_id"}), ("offline", {"message_id"})]
    (message,) = (await alarm.member.get("/messages")).json()["items"]
    assert message["subject"] == "alarm"
    stranger = await alarm.kit.as_user("member")
    body = {"name": "x", "type": "manual", "config": {}, "action": actions[0]}
    assert (await stranger.post("/triggers", body)).status == 403
