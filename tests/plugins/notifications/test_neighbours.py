"""Notifications together with triggers, workflows, the marketplace, and plugins that contribute types of channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from tests.kernel.mail.conftest import MailServer
from tests.plugins.marketplace.conftest import MANIFEST, Market, manifest, objects
from tests.plugins.marketplace.conftest import PLUGINS as MARKET_PLUGINS
from tests.plugins.notifications.conftest import ALLOWED, PLUGINS, Notified
from tests.plugins.notifications.services import Service
from tests.plugins.ssh.conftest import Fleet, Machine
from tests.plugins.workflows.conftest import PLUGINS as WORKFLOW_PLUGINS
from tests.plugins.workflows.conftest import World, step, steps_of, transform

from corral.plugin import Plugin, hookimpl
from corral_plugins.notifications.api import ChannelType, OutgoingNotification, SendResult

sent: list[tuple[Mapping[str, Any], OutgoingNotification]] = []


async def _send(config: Mapping[str, Any], notification: OutgoingNotification) -> SendResult:
    sent.append((config, notification))
    return SendResult()


class PigeonsPlugin(Plugin):
    """Pigeons: contributes a type of channel."""

    name = "pigeons"
    wants = ("notifications",)

    @hookimpl(optionalhook=True)
    def corral_notification_channels(self) -> Iterable[ChannelType]:
        text = {"type": "string", "minLength": 8}
        schema = {"type": "object", "properties": {"loft": text, "ring": text}, "additionalProperties": False}
        return [ChannelType(type="pigeon", title="Pigeon", schema=schema, secrets=("ring",), send=_send)]


@pytest.mark.one_engine
async def test_corral_notification_channels(make_kit: Callable[..., Any]) -> None:
    sent.clear()
    world = await Notified().build(await make_kit(plugins=(*PLUGINS, PigeonsPlugin), config=ALLOWED))
    types = await world.ok(world.admin.get("/notifications/channel-types"))
    names = [each["type"] for each in types["items"]]
    assert names == sorted(names)
    assert {"email", "pigeon", "slack", "telegram", "webhook"} <= {*names}
    made = await world.channel("pigeon", {"loft": "on the roof", "ring": "a secret ring"})
    assert made["config"] == {"loft": "on the roof", "ring": "********"}
    await world.rule(made)
    await world.fail_task("one")
    await world.run()
    [(config, notification)] = sent
    assert config == {"loft": "on the roof", "ring": "a secret ring"}
    assert (notification.title, notification.url) == (
        "Task failed: task one",
        "https://corral.example/api/v1/tasks/one",
    )


async def fire(world: Notified, client: Any, action: Any, status: int = 201) -> Any:
    body = {"name": "tells", "type": "manual", "config": {}, "action": {"type": "notify", **action}}
    made = await world.ok(client.post("/triggers", body), status)
    if status == 201:
        await world.ok(client.post(f"/triggers/{made['id']}/fire", {"payload": {"name": "Ada"}}), 202)
        await world.kit.run_jobs()
        await world.run()
    return made


async def test_a_trigger_notifies_its_owner_others_and_channels(world: Notified, slack: Service) -> None:
    made = await world.channel("slack", {"webhook_url": slack.url + "services/x"})
    await fire(world, world.member, {"title": "Hello {{ payload.name }}", "severity": "warning"})
    [row] = await world.inbox(world.member)
    assert (row["title"], row["severity"], row["type"]) == ("Hello Ada", "warning", "notification.sent")
    action = {"title": "To all", "user_ids": [world.stranger.user["id"]], "channel_ids": [made["id"]]}
    refused = await fire(world, world.member, action, 403)
    assert "notifications.manage" in refused["detail"]
    body = {"name": "all", "type": "manual", "config": {}, "action": {"type": "notify", **action}}
    trigger = await world.ok(world.admin.post("/triggers", body), 201)
    await world.ok(world.admin.post(f"/triggers/{trigger['id']}/fire", {"payload": {}}), 202)
    await world.kit.run_jobs()
    await world.run()
    assert [row["title"] for row in await world.inbox(world.stranger)] == ["To all"]
    assert len(slack.texts) == 1
    unknown = {**body, "name": "no", "action": {"type": "notify", "title": "x", "user_ids": [trigger["id"]]}}
    answer = await world.admin.post("/triggers", unknown)
    assert (answer.status, answer.code) == (422, "unknown_reference")
    assert answer.json()["errors"][0]["pointer"] == "/action/user_ids/0"


@pytest.mark.one_engine
async def test_a_trigger_sends_mail_to_each_person_it_names(mailing: Notified, smtp: MailServer) -> None:
    made = await mailing.channel("email", {"to_recipients": True})
    people = [mailing.member, mailing.stranger]
    await mailing.ok(mailing.stranger.put("/notifications/preferences", {"email": "off"}))
    ids = [person.user["id"] for person in people]
    await fire(mailing, mailing.admin, {"title": "Hello", "user_ids": ids, "channel_ids": [made["id"]]})
    assert [mail["To"] for mail in smtp.box.mails] == [mailing.member.user["email"]]
    assert [row["title"] for row in await mailing.inbox(mailing.stranger)] == ["Hello"]


async def test_a_workflow_step_notifies_once(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=(*WORKFLOW_PLUGINS, "notifications", "secrets"))
    world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
    run = await world.run(transform("a", 42), step("tell", "notify", {"title": "It is {{ steps.a.output }}"}))
    assert run["status"] == "completed", run
    (row,) = (await world.ok("GET", "/notifications"))["items"]
    assert (row["title"], row["object"]) == ("It is 42", {"type": "workflow_run", "id": run["id"]})
    channels = {"title": "x", "channel_ids": [row["id"]]}
    refused = await world.run(step("tell", "notify", channels), name="other")
    assert refused["status"] == "failed"
    assert "notifications.manage" in steps_of(refused)["tell"]["error"]["message"]


@pytest.mark.one_engine
async def test_without_neighbours_notifications_work(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=("notifications", "secrets", "admin", "tasks", "agents", "workers"), config=ALLOWED)
    world = await Notified().build(kit)
    await world.fail_task("one")
    await world.run()
    assert len(await world.inbox(world.member)) == 1
    body = {"url": "https://example.org/x", "secret": "a secret of sixteen"}
    answer = await world.admin.post("/notifications/channels", {"name": "x", "type": "webhook", "config": body})
    assert answer.status == 422
    assert answer.json()["errors"][0]["pointer"] == "/config/secret"


@pytest.mark.one_engine
async def test_a_template_installs_a_rule(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=(*MARKET_PLUGINS, "notifications"))
    market = Market(kit, await kit.as_user("member"), await kit.as_user("admin"))
    spec = {"name": "Failures", "events": ["task.failed"], "group_by": ["agent_id"], "recipients": {"roles": ["admin"]}}
    rule = {"kind": "notification_rule", "key": "rule", "spec": spec}
    requires = {"corral": ">=0.1", "plugins": ["agents", "notifications"]}
    wrong = {**rule, "spec": {**spec, "events": ["no.event"]}}
    agent = MANIFEST["resources"][0]
    refused = await market.admin.post("/marketplace/templates", manifest(requires=requires, resources=[agent, wrong]))
    assert (refused.status, refused.json()["errors"][0]["pointer"]) == (422, "/resources/1/spec/events/0")
    await market.upload(requires=requires, resources=[agent, rule])
    assert (await market.refused()).status == 403
    made = await market.install(by=market.admin)
    installed = objects(made)["rule"]["id"]
    found = await market.ok("GET", f"/notifications/rules/{installed}", by=market.admin)
    assert (found["name"], found["group_by"], found["enabled"]) == ("Failures", ["agent_id"], False)
    path = f"/marketplace/installations/{made['id']}/uninstall"
    removed = await market.ok("POST", path, {}, by=market.admin)
    assert "rule" in [each["key"] for each in removed["removed"]]
    assert (await market.admin.get(f"/notifications/rules/{installed}")).status == 404


@pytest.mark.one_engine
async def test_a_changed_host_key_is_told_once_and_names_the_machine(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=("secrets", "notifications", "ssh"), config=ALLOWED)
    world, machine = await Notified().build(kit), Machine()
    await machine.start()
    fleet = await Fleet().build(kit, machine)
    connection = await fleet.trusted(name="build box")
    old = machine.fingerprint
    await machine.renew_key()
    assert (await fleet.post(f"{connection}/test")).status == 409
    await machine.stop()
    await world.run()
    [row] = await world.inbox(world.admin)
    assert (row["title"], row["severity"]) == ("The host key of build box has changed", "critical")
    assert f"127.0.0.1:{machine.port} shows {machine.fingerprint} instead of {old}." in row["body"]
    assert (
        f"corral ssh accept-key 'build box' {machine.fingerprint}\nSee it: corral ssh show {connection}" in row["body"]
    )
    assert row["type"] == "ssh.host_key_mismatch"  # what mutes it
