"""Deliveries of events: signatures, retries, probes, recovery, and what the owner sees of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from peewee import SQL
from tests.plugins.webhooks.conftest import Hooks
from tests.plugins.webhooks.receivers import Receiver

from corral import clock
from corral.events.consumers import ConsumerRow
from corral.events.log import LoggedEvent
from corral_core.accounts.api import Accounts
from corral_plugins.webhooks.models import Delivery, Webhook
from corral_plugins.webhooks.service import claims, fan_out
from corral_plugins.webhooks.service.claims import DeliveryClaims
from corral_plugins.webhooks.service.disabling import cancel_batch
from corral_plugins.webhooks.service.fan_out import WebhookFanOut
from corral_plugins.webhooks.service.outcomes import DeliveryOutcomes
from corral_plugins.webhooks.service.payloads import body_of_event
from corral_plugins.webhooks.service.redactor_values import WebhookRedactorValues
from corral_plugins.webhooks.service.sender import AttemptResult, WebhookSender


@pytest.mark.one_engine
async def test_an_event_arrives_signed(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver, headers={"X-Mine": "a value of mine"})
    (event_id,) = await hooks.emit("one")
    await hooks.run()
    (message,) = receiver.messages
    content = message.verify(made["secret"])
    assert (content["type"], content["id"], content["data"]) == (
        "things.happened",
        event_id,
        {"thing_id": "one", "status": "new"},
    )
    assert message.headers["x-mine"] == "a value of mine"
    assert message.headers["content-type"] == "application/json"
    assert message.headers["user-agent"].startswith("Corral/")
    delivery = await hooks.delivery(made["id"])
    assert (delivery["id"], delivery["status"], delivery["payload"]) == (message.id, "succeeded", content)
    (attempt,) = delivery["attempts"]
    assert (attempt["n"], attempt["status_code"], attempt["response"]) == (1, 200, "OK")
    assert (await hooks.get(made["id"]))["last_status_code"] == 200


@pytest.mark.one_engine
async def test_a_failed_delivery_is_tried_again_by_the_schedule(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.set("webhooks.retry_schedule", [0, 60, 600])
    await hooks.set("webhooks.probe_seconds", 0)
    receiver.status = 500
    made = await hooks.create(receiver)
    await hooks.emit("one")
    for seconds in (0, 50, 20, 530, 130):
        await hooks.run(seconds=seconds)
    await hooks.later(7200)
    await hooks.run()
    delivery = await hooks.delivery(made["id"])
    assert len(receiver.messages) == 3
    assert (delivery["status"], delivery["attempt"], delivery["error"]) == ("failed", 3, "status")
    assert [each["status_code"] for each in delivery["attempts"]] == [500, 500, 500]
    assert len(receiver.ids) == 1
    moments = [int(message.headers["webhook-timestamp"]) for message in receiver.messages]
    assert moments[1] - moments[0] >= 60
    assert all(message.verify_signature(made["secret"]) for message in receiver.messages)


@pytest.mark.one_engine
async def test_what_a_receiver_answers(hooks: Hooks, receiver: Receiver) -> None:
    """Every 3xx is a failure, `Retry-After` is kept to, and of long answers the first 1 KiB is kept."""
    made = await hooks.create(receiver)
    receiver.status, receiver.answer_headers = 302, {"Location": "http://127.0.0.1:1/"}
    await hooks.emit("one")
    await hooks.run()
    receiver.status, receiver.answer_headers = 429, {"Retry-After": "3000"}
    receiver.answer = b"x" * 200_000
    await hooks.run(seconds=6)
    assert [each["status_code"] for each in (await hooks.delivery(made["id"]))["attempts"]] == [302, 429]
    assert len((await hooks.delivery(made["id"]))["attempts"][1]["response"]) == 1024
    await hooks.set("webhooks.probe_seconds", 0)
    await hooks.run(seconds=2900)
    assert len(receiver.messages) == 2
    receiver.status, receiver.answer = 204, None
    await hooks.later(101)
    await hooks.run()
    assert (await hooks.delivery(made["id"]))["status"] == "succeeded"


@pytest.mark.one_engine
@pytest.mark.parametrize("charset", ["utf-16", "idna", "hex"])
async def test_the_character_set_of_an_answer_is_not_believed(hooks: Hooks, receiver: Receiver, charset: str) -> None:
    receiver.answer_headers, receiver.answer = {"Content-Type": f"text/plain; charset={charset}"}, b"caf\xc3\xa9 \xff"
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    delivery = await hooks.delivery(made["id"])
    assert (delivery["status"], delivery["attempts"][0]["response"]) == ("succeeded", "caf\u00e9 \ufffd")


async def test_an_answer_with_a_nul_is_stored(hooks: Hooks, receiver: Receiver) -> None:
    receiver.status, receiver.answer = 500, b"a\0b"
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    delivery = await hooks.delivery(made["id"])
    assert (delivery["status"], delivery["attempts"][0]["response"]) == ("retrying", "a\ufffdb")


async def test_a_secret_that_cannot_be_decrypted_is_a_failed_attempt(hooks: Hooks, receiver: Receiver) -> None:
    made, other = await hooks.create(receiver), await hooks.create(receiver)

    def swap() -> None:
        taken = Webhook.select(SQL("secret")).where(Webhook.id == other["id"])
        Webhook.update(secret=taken).where(Webhook.id == made["id"]).execute()

    await hooks.kit.kernel.database.work(swap)
    await hooks.emit("one")
    await hooks.run()
    delivery = await hooks.delivery(made["id"])
    assert (delivery["status"], delivery["attempt"]) == ("retrying", 1)
    assert "cannot be decrypted" in delivery["attempts"][0]["response"]


@pytest.mark.one_engine
async def test_a_probe_uses_up_no_attempt_and_a_success_makes_all_due(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.set("webhooks.retry_schedule", [0, 36_000, 36_000])
    await hooks.set("webhooks.disable_after_seconds", 0)
    receiver.status = 500
    made = await hooks.create(receiver)
    await hooks.emit("one", "two", "three")
    await hooks.run(rounds=3)
    assert [row["attempt"] for row in await hooks.deliveries(made["id"])] == [1, 1, 1]
    for _ in range(4):
        await hooks.run(seconds=61)
    assert len(receiver.messages) == 7
    assert [row["attempt"] for row in await hooks.deliveries(made["id"])] == [1, 1, 1]
    await hooks.run(seconds=30)
    assert len(receiver.messages) == 7
    receiver.status = 200
    await hooks.run(seconds=31)
    await hooks.run()
    assert [row["status"] for row in await hooks.deliveries(made["id"])] == ["succeeded"] * 3
    assert (await hooks.get(made["id"]))["failing_since"] is None


@pytest.mark.one_engine
async def test_a_probe_that_is_given_back_uses_up_no_attempt(hooks: Hooks, receiver: Receiver) -> None:
    """The process of one probe stops, and that of another one dies."""
    await hooks.set("webhooks.retry_schedule", [0, 36_000, 36_000])
    receiver.status = 500
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    claims = hooks.kit.service(DeliveryClaims)
    clock.travel(61)
    (probe,) = await hooks.kit.work(claims.claim)
    await hooks.kit.work(lambda: claims.release(probe, clock.now()))
    (probe,) = await hooks.kit.work(claims.claim)
    assert probe.is_probe
    clock.travel(31)
    await hooks.kit.run_schedule("webhooks.reap")
    await hooks.run()
    assert len(receiver.messages) == 2
    assert [row["attempt"] for row in await hooks.deliveries(made["id"])] == [1]


@pytest.mark.one_engine
async def test_probes_become_rarer(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.set("webhooks.retry_schedule", [0, 172_800])
    await hooks.set("webhooks.disable_after_seconds", 0)
    receiver.status = 500
    await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    counts = []
    for seconds, step in ((3600, 60), (7200, 300)):
        before = len(receiver.messages)
        for _ in range(seconds // step):
            await hooks.run(seconds=step)
        counts.append(len(receiver.messages) - before)
    assert counts[0] in range(58, 62)
    assert counts[1] in range(22, 26)


@pytest.mark.one_engine
async def test_a_dead_webhook_is_disabled_and_admins_are_told(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.set("webhooks.retry_schedule", [0, *[10] * 15])
    await hooks.set("webhooks.disable_after_seconds", 60)
    receiver.status = 500
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    for _ in range(7):
        await hooks.run(seconds=12)
    assert (await hooks.get(made["id"]))["is_active"]  # 60 s have passed, but not 10 failures
    for _ in range(2):
        await hooks.run(seconds=12)
    found = await hooks.get(made["id"])
    assert (found["is_active"], found["disabled_reason"], found["pending_deliveries"]) == (False, "failing", 0)
    assert [row["status"] for row in await hooks.deliveries(made["id"])] == ["cancelled"]
    events = {event.type: event.payload() for event in await hooks.kit.events()}
    assert events["webhook.disabled"] == {"webhook_id": made["id"], "reason": "failing"}
    assert events["system.alert"]["kind"] == "webhook_disabled"


async def test_a_deactivated_owner_receives_nothing(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver)
    receiver.status = 500
    await hooks.emit("one")
    await hooks.run()
    path = f"/admin/users/{hooks.member.user['id']}"
    await hooks.ok(hooks.admin.patch(path, {"is_active": False}))
    await hooks.run(seconds=6)
    await hooks.emit("two")
    await hooks.run()
    assert len(receiver.messages) == 1
    await hooks.ok(hooks.admin.patch(path, {"is_active": True}))
    hooks.member = await hooks.kit.sign_in(hooks.member.user["email"])
    found = await hooks.get(made["id"])
    assert (found["is_active"], found["disabled_reason"]) == (False, "owner_inactive")
    assert [row["status"] for row in await hooks.deliveries(made["id"])] == ["cancelled"]


@pytest.mark.one_engine
async def test_rights_that_are_lost_before_an_attempt_cancel_it(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver, by=hooks.admin)
    receiver.status = 500
    await hooks.emit("secret", visibility="admin")
    await hooks.run()
    assert len(receiver.messages) == 1
    other = await hooks.kit.as_user("admin")
    path = f"/admin/users/{hooks.admin.user['id']}"
    await hooks.ok(other.patch(path, {"role": "member"}))
    receiver.status = 200
    await hooks.run(seconds=6)
    assert len(receiver.messages) == 1
    hooks.member = await hooks.kit.sign_in(hooks.admin.user["email"])
    assert [row["status"] for row in await hooks.deliveries(made["id"])] == ["cancelled"]


@pytest.mark.one_engine
async def test_the_kill_switch_holds_deliveries(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.create(receiver)
    held = {"engaged": True, "reason": "stop", "hold_deliveries": True}
    await hooks.ok(hooks.admin.post("/admin/kill-switch", held))
    await hooks.emit("one")
    await hooks.run()
    assert receiver.messages == []
    await hooks.ok(hooks.admin.post("/admin/kill-switch", {"engaged": False}))
    await hooks.run(seconds=2)
    assert len(receiver.messages) == 1


async def test_filters_and_patterns(hooks: Hooks, receiver: Receiver) -> None:
    filtered = await hooks.create(receiver, "things.happened", filter={"status": "done"})
    await hooks.kit.events()  # on PostgreSQL, until all events are numbered: those that are not belong to the future
    everything = await hooks.create(receiver, "*", "things.*")
    await hooks.emit("one", status="new")
    await hooks.emit("two", status="done")
    await hooks.run(rounds=2)
    assert [row["event"] for row in await hooks.deliveries(filtered["id"])] == ["things.happened"]
    types = [row["event"] for row in await hooks.deliveries(everything["id"])]
    assert types.count("things.happened") == 2
    assert "webhook.created" not in types  # of itself


@pytest.mark.one_engine
async def test_nothing_from_before_a_webhook_was_enabled_is_sent(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.emit("before")
    made = await hooks.create(receiver)
    path = f"/webhooks/{made['id']}"
    await hooks.ok(hooks.member.put(path, {"is_active": False}))
    await hooks.emit("meanwhile")
    await hooks.run()
    await hooks.ok(hooks.member.put(path, {"is_active": True}))
    await hooks.emit("after")
    await hooks.run()
    assert [message.content["data"]["thing_id"] for message in receiver.messages] == ["after"]


@pytest.mark.one_engine
async def test_the_url_and_the_secret_of_an_attempt_are_those_of_the_moment(hooks: Hooks, receiver: Receiver) -> None:
    receiver.status = 500
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    async with Receiver() as other:
        secret = "another secret of mine"
        await hooks.ok(hooks.member.put(f"/webhooks/{made['id']}", {"url": other.url, "secret": secret}))
        await hooks.run(seconds=6)
        (message,) = other.messages
        assert message.id == receiver.messages[0].id
        assert message.verify_signature(secret)


@pytest.mark.one_engine
async def test_a_delivery_can_be_sent_again(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    row = await hooks.delivery(made["id"])
    again = await hooks.member.post(f"/webhooks/{made['id']}/deliveries/{row['id']}/redeliver")
    assert (again.status, again.json()["status"], again.json()["attempt"]) == (202, "pending", 0)
    twice = await hooks.member.post(f"/webhooks/{made['id']}/deliveries/{row['id']}/redeliver")
    assert (twice.status, twice.code) == (409, "invalid_state")
    await hooks.run()
    assert [message.id for message in receiver.messages] == [row["id"]] * 2
    assert [each["n"] for each in (await hooks.delivery(made["id"]))["attempts"]] == [1, 2]


async def test_purged_users_leave_no_webhooks(hooks: Hooks, receiver: Receiver) -> None:
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    user = hooks.member.user
    await hooks.ok(hooks.admin.patch(f"/admin/users/{user['id']}", {"is_active": False}))
    accounts = hooks.kit.service(Accounts)
    await hooks.kit.work(lambda: accounts.purge(user["id"]))
    await hooks.kit.run_consumers()
    await hooks.kit.run_jobs()
    left = await hooks.kit.work(lambda: (Webhook.select().count(), Delivery.select().count()), read=True)
    assert (left, made["user_id"]) == ((0, 0), user["id"])


@pytest.mark.one_engine
async def test_an_attempt_that_fails_in_corral_counts(
    hooks: Hooks, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a fault of Corral")

    monkeypatch.setattr(hooks.kit.service(WebhookSender), "_headers", broken)
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    delivery = await hooks.delivery(made["id"])
    assert (delivery["status"], delivery["attempt"], receiver.messages) == ("retrying", 1, [])
    assert "RuntimeError in Corral" in delivery["attempts"][0]["response"]


async def test_a_delivery_that_is_cancelled_while_it_is_claimed_is_not_sent(
    hooks: Hooks, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_waiting = claims._first_waiting

    def cancelled(webhooks: Iterable[Webhook], with_probes: bool) -> list[Delivery]:
        rows = first_waiting(webhooks, with_probes)
        for row in rows:  # as another unit of work does on PostgreSQL
            cancel_batch(row.webhook_id, clock.now())
        return rows

    monkeypatch.setattr(claims, "_first_waiting", cancelled)
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    assert (receiver.messages, len(await hooks.deliveries(made["id"], "cancelled"))) == ([], 1)


async def test_what_nobody_would_send_is_cancelled(hooks: Hooks, receiver: Receiver) -> None:
    """A delivery may be written while its webhook is disabled, in a unit of work that does not see that yet."""
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.kit.events()
    await hooks.kit.service(WebhookFanOut).handle_new_events()
    await hooks.kit.work(lambda: Webhook.update(is_active=False).execute())
    await hooks.kit.run_schedule("webhooks.purge")
    assert len(await hooks.deliveries(made["id"], "cancelled")) == 1


@pytest.mark.one_engine
async def test_old_deliveries_are_deleted(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    clock.travel(31 * 86_400)
    await hooks.kit.run_schedule("webhooks.purge")
    assert await hooks.kit.work(lambda: Delivery.select().count(), read=True) == 0


@pytest.mark.one_engine
async def test_deliveries_of_a_dead_process_come_back(hooks: Hooks, receiver: Receiver) -> None:
    """A result that comes after the lease ended has no effect."""
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.kit.events()
    await hooks.kit.service(WebhookFanOut).handle_new_events()
    claims, outcomes = hooks.kit.service(DeliveryClaims), hooks.kit.service(DeliveryOutcomes)
    (lost,) = await hooks.kit.work(claims.claim)
    await hooks.run()
    assert receiver.messages == []
    clock.travel(31)
    await hooks.kit.run_schedule("webhooks.reap")
    await hooks.run()
    assert len(receiver.messages) == 1
    late = AttemptResult(status_code=500, error="status")
    assert not await hooks.kit.work(lambda: outcomes.record(lost, late, clock.now()))
    assert (await hooks.delivery(made["id"]))["status"] == "succeeded"


async def test_the_limits_of_a_host_and_of_all(hooks: Hooks) -> None:
    """Five attempts a host; a second one to a host leaves a fifth of all slots free; a webhook begins with one."""
    await hooks.set("webhooks.concurrency", 10)
    receivers = [Receiver(f"127.0.0.{number}") for number in range(2, 6)]
    for each in receivers:
        await each.start()
        await hooks.create(each)
    await hooks.emit("first", "second")
    await hooks.run()
    assert [len(each.messages) for each in receivers] == [1] * 4
    await hooks.run()
    await hooks.emit(*[f"thing-{number}" for number in range(9)])
    await hooks.kit.events()
    await hooks.kit.service(WebhookFanOut).handle_new_events()
    claims = hooks.kit.service(DeliveryClaims)
    taken = await hooks.kit.work(claims.claim)
    hosts = Counter(each.webhook.host for each in taken)
    assert sorted(hosts.values()) == [2, 2, 2, 2]
    assert await hooks.kit.work(claims.claim) == []
    for each in receivers:
        await each.stop()


async def test_an_event_that_cannot_be_handled_is_skipped_after_five_tries(
    hooks: Hooks, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await hooks.create(receiver)

    def break_on_poison(event: LoggedEvent) -> Any:
        if event.payload()["thing_id"] == "poison":
            Delivery.insert(id=event.id).execute()  # columns that must not be null are missing
        return body_of_event(event)

    monkeypatch.setattr(fan_out, "body_of_event", break_on_poison)
    await hooks.emit("one", "poison", "two")
    await hooks.kit.events()
    for _ in range(5):
        await hooks.kit.service(WebhookFanOut).handle_new_events()
    assert len(await hooks.deliveries(made["id"])) == 2
    alerts = [each.payload() for each in await hooks.kit.events() if each.type == "system.alert"]
    assert [each["title"] for each in alerts] == ["webhooks.fan_out could not handle an event"]


@pytest.mark.one_engine
async def test_an_installation_without_webhooks_writes_nothing(hooks: Hooks) -> None:
    await hooks.run()
    before = await hooks.kit.work(lambda: ConsumerRow.get_by_id("webhooks.fan_out").cursor, read=True)
    await hooks.emit("one")
    await hooks.run()
    assert await hooks.kit.work(lambda: ConsumerRow.get_by_id("webhooks.fan_out").cursor, read=True) == before
    await hooks.kit.run_schedule("webhooks.reap")
    assert await hooks.kit.work(lambda: ConsumerRow.get_by_id("webhooks.fan_out").cursor, read=True) > before


@pytest.mark.one_engine
async def test_credentials_are_redacted_from_answers_and_from_payloads(hooks: Hooks, receiver: Receiver) -> None:
    secret = "a very private secret"
    made = await hooks.create(receiver, secret=secret, headers={"Authorization": "Bearer of-my-own-kind-1234"})
    await hooks.kit.service(WebhookRedactorValues).refresh()
    receiver.answer = b"you said Bearer of-my-own-kind-1234 and " + secret.encode()
    await hooks.emit(f"it is {secret}")
    await hooks.run()
    assert receiver.messages[0].headers["authorization"] == "Bearer of-my-own-kind-1234"
    delivery = await hooks.delivery(made["id"])
    assert delivery["attempts"][0]["response"] == "you said [redacted] and [redacted]"
    assert receiver.messages[0].content["data"]["thing_id"] == "it is [redacted]"


@pytest.mark.one_engine
async def test_events_for_a_dead_webhook_are_recorded_for_two_weeks(hooks: Hooks, receiver: Receiver) -> None:
    receiver.status = 410
    made = await hooks.create(receiver)
    await hooks.emit("one")
    await hooks.run()
    await hooks.later(13 * 86_400)
    await hooks.emit("two")
    await hooks.run()
    await hooks.later(2 * 86_400)
    await hooks.emit("three")
    await hooks.run()
    assert [row["status"] for row in await hooks.deliveries(made["id"])] == ["failed", "cancelled"]
