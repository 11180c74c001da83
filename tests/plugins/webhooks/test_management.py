"""Creating, changing, listing, testing and deleting webhooks: what is refused, and who sees what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.limits import stop_refilling
from tests.plugins.webhooks.conftest import ALLOWED, PLUGINS, Hooks
from tests.plugins.webhooks.receivers import Receiver

from corral import clock
from corral.testing.stub_servers import FakeResolver
from corral_plugins.webhooks.service.deliveries import recover_batch

pytestmark = pytest.mark.one_engine


async def test_what_is_refused(hooks: Hooks, receiver: Receiver) -> None:
    good = {"url": receiver.url, "events": ["things.happened", "things.*"]}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"events": ["no.such.event"]}, "unknown_event", "/events/0"),
        ({"events": []}, "validation_error", "/events"),
        ({"url": "http://169.254.169.254/"}, "url_blocked", "/url"),
        ({"url": "ftp://example.org/"}, "url_blocked", "/url"),
        ({"secret": "short"}, "validation_error", "/secret"),
        ({"secret": "whsec_" + "not-base64-of-anything"}, "validation_error", "/secret"),
        ({"secret": "whsec_" + "AAAA" * 4}, "validation_error", "/secret"),
        ({"secret": "*" * 32}, "masked_value_submitted", "/secret"),
        ({"headers": {"webhook-id": "x"}}, "validation_error", "/headers/webhook-id"),
        ({"headers": {"Host": "x"}}, "validation_error", "/headers/Host"),
        ({"headers": {"Content-Type": "x"}}, "validation_error", "/headers/Content-Type"),
        ({"headers": {"X-Mine": "a\r\nb"}}, "validation_error", "/headers/X-Mine"),
        ({"headers": {"X-Mine": "********"}}, "masked_value_submitted", "/headers/X-Mine"),
        ({"headers": {f"X-{n}": "a" for n in range(11)}}, "validation_error", "/headers"),
        ({"filter": {"name": "x"}}, "validation_error", "/filter"),
    ]
    for change, code, pointer in cases:
        answer = await hooks.member.post("/webhooks", {**good, **change})
        assert (answer.status, answer.code) == (422, code), change
        assert pointer in [each["pointer"] for each in answer.json()["errors"]], answer
    assert (await hooks.member.get("/webhooks")).json()["total"] == 0


async def test_warnings(hooks: Hooks) -> None:
    hooks.kit.kernel.egress.resolve = FakeResolver({})
    made = await hooks.create("http://nowhere.example/hook", secret="a" * 16, headers={"X-Mine": "v1"})
    assert made["warnings"] == ["not_redactable", "unresolved_host"]
    assert "warnings" not in await hooks.get(made["id"])


async def test_webhooks_are_private_and_admins_see_where_they_lead(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver, headers={"X-Mine": "a value of mine"}, description="mine")
    path = f"/webhooks/{made['id']}"
    assert (await hooks.stranger.get(path)).status == (await hooks.admin.get(path)).status == 404
    (row,) = (await hooks.ok(hooks.admin.get("/webhooks?all=true")))["items"]
    assert (row["id"], row["user_id"], row["host"]) == (made["id"], hooks.member.user["id"], "127.0.0.1")
    assert {row[name] for name in ("url", "description", "filter")} == {row["events"], row["headers"]} == {None}
    assert (await hooks.stranger.get("/webhooks?all=true")).status == 403
    assert (await hooks.ok(hooks.admin.get("/webhooks")))["items"] == []
    off = await hooks.ok(hooks.admin.post(f"{path}/disable"))
    assert (off["is_active"], off["disabled_reason"], off["url"]) == (False, "admin", None)
    assert (await hooks.get(made["id"]))["disabled_reason"] == "admin"
    assert (await hooks.admin.post(f"{path}/enable")).status == 404
    viewer = await hooks.kit.as_user("viewer")
    assert (await viewer.post("/webhooks", {"url": receiver.url, "events": ["*"]})).status == 403


async def test_versions_and_quota(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver)
    path = f"/webhooks/{made['id']}"
    changed = await hooks.member.put(path, {"description": "new"}, headers={"If-Match": '"1"'})
    assert (changed.status, changed.headers["etag"]) == (200, '"2"')
    stale = await hooks.member.post(f"{path}/disable", headers={"If-Match": '"1"'})
    assert (stale.status, stale.code) == (412, "precondition_failed")
    await hooks.set("webhooks.max_per_user", 1)
    answer = await hooks.member.post("/webhooks", {"url": receiver.url, "events": ["*"]})
    assert (answer.status, answer.code) == (429, "quota_exceeded")


async def test_a_test_message(hooks: Hooks, receiver: Receiver) -> None:
    """Also for a disabled webhook, and with the example of an event."""
    made = await hooks.create(receiver, is_active=False)
    path = f"/webhooks/{made['id']}/test"
    found = await hooks.ok(hooks.member.post(path))
    assert (found["delivered"], found["status_code"], found["response"]) == (True, 200, "OK")
    assert receiver.messages[0].verify(made["secret"])["type"] == "webhook.test"
    await hooks.ok(hooks.member.post(path, {"event": "things.happened"}))
    assert receiver.messages[1].content["data"].keys() == {"thing_id", "status"}
    assert (await hooks.member.post(path, {"event": "no.such"})).code == "unknown_event"
    receiver.status = 500
    assert (await hooks.ok(hooks.member.post(path)))["error"] == "status"
    async with Receiver(hangs=True) as silent:
        await hooks.set("webhooks.timeout_seconds", 1)
        slow = await hooks.create(silent)
        assert (await hooks.ok(hooks.member.post(f"/webhooks/{slow['id']}/test")))["error"] == "timeout"
    hooks.kit.kernel.egress.resolve = FakeResolver({"inside.example": [["10.0.0.1"]]})
    unknown = await hooks.create("http://nowhere.example/hook")
    assert (await hooks.ok(hooks.member.post(f"/webhooks/{unknown['id']}/test")))["error"] == "dns"
    hooks.kit.kernel.egress.resolve = FakeResolver({"nowhere.example": [["10.0.0.1"]]})
    assert (await hooks.ok(hooks.member.post(f"/webhooks/{unknown['id']}/test")))["error"] == "blocked"


async def test_tests_are_limited(make_kit: Callable[..., Any], receiver: Receiver) -> None:
    config = {**ALLOWED, "rate_limits": True}
    hooks = await Hooks().build(await make_kit(plugins=(*PLUGINS, "security"), config=config))
    stop_refilling(hooks.kit)
    made = await hooks.create(receiver)
    statuses = [(await hooks.member.post(f"/webhooks/{made['id']}/test")).status for _ in range(11)]
    assert statuses == [200] * 10 + [429]


async def test_event_types_have_valid_examples(hooks: Hooks) -> None:
    import jsonschema

    items = (await hooks.ok(hooks.member.get("/webhooks/event-types")))["items"]
    for item in items:
        jsonschema.validate(item["example"], item["schema"])
    names = {item["event"] for item in items}
    assert {"things.happened", "webhook.created"} <= names
    assert "system.alert" not in names
    admins = (await hooks.ok(hooks.admin.get("/webhooks/event-types")))["items"]
    assert "system.alert" in {item["event"] for item in admins}


async def test_deleting_cancels(hooks: Hooks, receiver: Receiver) -> None:
    receiver.status = 500
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    assert (await hooks.get(made["id"]))["pending_deliveries"] == 1
    await hooks.ok(hooks.member.delete(f"/webhooks/{made['id']}"), 204)
    assert (await hooks.member.get(f"/webhooks/{made['id']}/deliveries")).status == 404
    await hooks.run(seconds=3600)
    assert len(receiver.messages) == 1


async def test_recovery_is_limited(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver)
    path = f"/webhooks/{made['id']}/recover"
    old = await hooks.member.post(path, {"since": clock.now(-15 * 86_400)})
    assert (old.status, old.json()["errors"][0]["pointer"]) == (422, "/since")
    assert (await hooks.ok(hooks.member.post(path, {"since": clock.now(-3600)}), 202))["queued"] == 0


async def test_many_deliveries_are_cancelled_and_recovered_by_jobs(hooks: Hooks, receiver: Receiver) -> None:
    receiver.status = 500
    made = await hooks.create(receiver)
    path, since = f"/webhooks/{made['id']}", clock.now()
    await hooks.emit(*[f"thing {number}" for number in range(600)])
    await hooks.run()
    await hooks.ok(hooks.member.post(f"{path}/disable"))
    assert (await hooks.get(made["id"]))["pending_deliveries"] == 100
    await hooks.kit.run_jobs()
    assert (await hooks.get(made["id"]))["pending_deliveries"] == 0
    await hooks.ok(hooks.member.post(f"{path}/enable"))
    assert (await hooks.ok(hooks.member.post(f"{path}/recover", {"since": since}), 202))["queued"] == 600
    again = await hooks.member.post(f"{path}/recover", {"since": since})
    assert (again.status, again.code) == (409, "batch_in_progress")
    await hooks.kit.run_jobs()
    assert (await hooks.get(made["id"]))["pending_deliveries"] == 600
    assert (await hooks.ok(hooks.member.post(f"{path}/recover", {"since": since}), 202))["queued"] == 0


async def test_a_recovery_ends_when_its_webhook_is_disabled(hooks: Hooks, receiver: Receiver) -> None:
    """The job that sends the rest may run after the one that cancels everything."""
    receiver.status = 500
    made = await hooks.create(receiver)
    since = clock.now()
    await hooks.emit("one")
    await hooks.run()
    await hooks.ok(hooks.member.post(f"/webhooks/{made['id']}/disable"))
    assert await hooks.kit.work(lambda: recover_batch(made["id"], since, clock.now())) == 0
    assert (await hooks.get(made["id"]))["pending_deliveries"] == 0
