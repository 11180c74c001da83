"""How messages are claimed: with all their events, in turn, and without one channel keeping another from sending."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from tests.kernel.mail.conftest import MailServer
from tests.plugins.notifications.conftest import ALLOWED, PLUGINS, Notified
from tests.plugins.notifications.services import Service
from tests.plugins.notifications.test_rules import hours, slack_channel
from tests.plugins.webhooks.receivers import Receiver

from corral import clock
from corral.database.dialect import execute
from corral.database.unit import current
from corral.ids import new_id
from corral.plugin import Plugin, hookimpl
from corral.redact.redactor import Redactor
from corral_core.accounts.models import UserRow
from corral_plugins.notifications.api import ChannelType, SendResult
from corral_plugins.notifications.models import Channel, Delivery
from corral_plugins.notifications.service import claims as claims_module
from corral_plugins.notifications.service import dispatcher as dispatcher_module
from corral_plugins.notifications.service import grouping, outcomes
from corral_plugins.notifications.service.claims import DeliveryClaims
from corral_plugins.notifications.service.redactor_values import ChannelRedactorValues
from corral_plugins.notifications.service.sender import UNREADABLE

on_postgres = pytest.mark.parametrize(  # SQLite has one writer at a time
    "unmade_database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
DAY = 86_400
STORM: dict[str, Any] = {"events": ("things.*",), "group_by": ["agent_id"]}
WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted"


def read_meanwhile(world: Notified, module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Task[Any]]:
    """After the first call of a function in a unit of work, let another unit write what new events make.

    The other unit ends, or waits for this one, before the function returns.
    """
    original, loop, ended = getattr(module, name), asyncio.get_running_loop(), threading.Event()
    started: list[asyncio.Task[Any]] = []

    def start() -> None:
        task = loop.create_task(world.dispatcher._fan_out.handle_new_events())
        task.add_done_callback(lambda _: ended.set())
        started.append(task)

    def read(*args: Any) -> Any:
        found = original(*args)
        if not started and not ended.is_set():
            monkeypatch.setattr(module, name, original)
            loop.call_soon_threadsafe(start)
            while not ended.wait(0.01) and not execute(WAITING).fetchone()[0]:
                pass
        return found

    monkeypatch.setattr(module, name, read)
    return started


@on_postgres
async def test_an_event_that_joins_a_message_while_it_is_claimed_is_told(
    world: Notified, slack: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await slack_channel(world, slack)
    await world.rule(made, **STORM, group_interval_seconds=10)
    await world.happen("one")
    await world.kit.events()
    await world.dispatcher._fan_out.handle_new_events()
    await world.happen("two")
    await world.kit.events()
    started = read_meanwhile(world, claims_module, "_first_due", monkeypatch)
    found = await world.kit.work(world.kit.service(DeliveryClaims).claim)
    await asyncio.gather(*started)
    for each in found.claimed:
        world.dispatcher._start(each)
    await world.dispatcher.wait_until_idle()
    await world.run(seconds=11)
    assert sum(row["count"] for row in await world.deliveries("succeeded")) == 2
    assert len(slack.texts) == len(await world.deliveries())
    told = "\n".join(slack.texts)
    assert "2 × things.happened" in told or told.count("Something happened") == 2


async def test_a_message_that_failed_suppresses_no_later_one(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",))
    slack.answers = [400]
    await world.happen("one")
    await world.run()
    assert [row["status"] for row in await world.deliveries()] == ["failed"]
    await world.happen("one")
    await world.run()
    await world.run(seconds=2)
    assert [row["status"] for row in await world.deliveries()] == ["failed", "succeeded"]
    assert len(slack.texts) == 1


async def test_a_group_collects_while_its_earlier_message_waits(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    await world.rule(made, **STORM, group_interval_seconds=10)
    slack.answers = [500] * 2
    await world.happen("one")
    await world.run()
    for number in range(5):  # while the channel fails
        await world.happen(f"more {number}")
        await world.run()
    assert [(row["status"], row["count"]) for row in await world.deliveries()] == [("retrying", 1), ("pending", 5)]
    await world.run(seconds=11)
    assert len(slack.requests) == 2
    await world.run(seconds=61)
    await world.run(seconds=2)
    assert [text.partition("\n")[0] for text in slack.texts] == ["Something happened: a thing"]
    await world.run(seconds=11)
    assert slack.texts[1].startswith("5 × things.happened")


async def test_what_waits_behind_an_earlier_message_goes_when_the_channel_works_again(
    world: Notified, slack: Service
) -> None:
    made = await slack_channel(world, slack)
    await world.rule(made, **STORM, group_interval_seconds=10)
    slack.answers = [500] * 3
    await world.happen("one")
    for seconds in (0, 11, 61):
        await world.run(seconds=seconds)
    await world.happen("two")
    await world.run(seconds=1)
    assert [row["status"] for row in await world.deliveries()] == ["retrying", "pending"]
    await world.happen("else", agent_id="two")
    await world.run(seconds=1)  # is sent, and so is what waited
    for _ in range(3):
        await world.run(seconds=11)
    assert {row["status"] for row in await world.deliveries()} == {"succeeded"}
    assert len(slack.texts) == 3


async def test_channels_that_cannot_send_keep_no_other_from_sending(world: Notified, slack: Service) -> None:
    now = clock.now()
    ids = [new_id() for _ in range(120)]
    same: dict[str, Any] = {"type": "slack", "config": {}, "is_enabled": False, "created_at": now, "updated_at": now}
    waiting: dict[str, Any] = {
        "severity": "info",
        "group_key": "x",
        "items": [],
        "due_at": now,
        "ready_at": now,
        "next_attempt_at": now,
        "created_at": now,
    }

    def unit() -> None:
        Channel.insert_many([{**same, "id": each, "name": each} for each in ids]).execute()
        Delivery.insert_many([{**waiting, "id": new_id(), "channel_id": each} for each in ids]).execute()

    await world.kit.work(unit)
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",))
    await world.happen("one")
    await world.run()
    assert len(slack.texts) == 1


async def test_another_attempt_waits_for_the_end_of_quiet_hours(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    await world.ok(world.admin.put("/settings/notifications/retry_schedule", {"value": [0, 600, 600]}))
    await world.rule(made, events=("things.*",), quiet_hours=hours(3, 60))
    slack.answers = [500]
    await world.happen("one")
    await world.run()
    await world.run(seconds=900)
    assert len(slack.requests) == 1
    await world.run(seconds=3300)
    assert len(slack.texts) == 1


@pytest.mark.one_engine
async def test_a_service_that_asks_to_wait_for_ever_ends_the_attempts(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    await world.ok(world.admin.put("/settings/notifications/retry_schedule", {"value": [0, 10]}))
    await world.rule(made, events=("things.*",))
    slack.answers, slack.retry_after = [429] * 100, 40_000
    await world.happen("one")
    for _ in range(6):
        await world.run(seconds=40_001)
    await world.later(0)
    [row] = await world.deliveries()
    assert (row["status"], row["attempts"]) == ("failed", 2)


@pytest.mark.one_engine
async def test_a_service_that_asks_for_no_wait_is_not_asked_all_the_time(
    world: Notified, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "LEAST_WAIT_SECONDS", 300.0)  # real time passes as well
    async with Receiver(status=429) as receiver:
        receiver.answer_headers = {"Retry-After": "0"}
        made = await world.channel("webhook", {"url": receiver.url})
        await world.rule(made, events=("things.*",))
        await world.happen("one")
        for seconds in (0, 100, 201):
            await world.run(seconds=seconds)
        assert len(receiver.messages) == 2


async def test_an_error_that_no_database_stores_counts_as_an_attempt(world: Notified) -> None:
    async with Receiver(status=500) as receiver:
        receiver.answer = b"a\0b \xff"
        made = await world.channel("webhook", {"url": receiver.url})
        await world.rule(made, events=("things.*",))
        await world.happen("one")
        await world.run()
        [row] = await world.deliveries()
        assert (row["status"], row["attempts"], row["last_error"]) == ("retrying", 1, "status 500: a b \ufffd")


async def test_a_result_that_cannot_be_recorded_gives_way_to_a_fixed_text(
    world: Notified, slack: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = outcomes._error

    def fail(result: SendResult) -> str | None:
        if result.error is not None and result.error.startswith("status"):
            raise RuntimeError("cannot be stored")
        return error(result)

    monkeypatch.setattr(outcomes, "_error", fail)
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",))
    slack.answers = [400]
    await world.happen("one")
    await world.run()
    [row] = await world.deliveries()
    assert (row["status"], row["last_error"]) == ("failed", dispatcher_module.UNRECORDED)


async def test_the_successes_of_others_use_up_no_attempts(
    world: Notified, slack: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overloaded service accepts some messages and refuses others."""
    monkeypatch.setattr(outcomes, "PAUSE_SECONDS", 1000.0)  # real time passes as well
    await world.ok(world.admin.put("/settings/notifications/retry_schedule", {"value": [0, 36_000, 36_000]}))
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",))
    slack.answers = [500]
    await world.happen("one")
    await world.run()
    for number in range(3):
        await world.happen(f"more {number}")
        await world.run(seconds=2)
    assert [row["status"] for row in await world.deliveries()] == ["retrying"] + ["succeeded"] * 3
    assert len(slack.requests) == 4
    await world.run(seconds=1001)
    assert len(slack.texts) == 4


async def begin_mail(mailing: Notified, smtp: MailServer, hang: Callable[[], Awaitable[None]]) -> None:
    """Begin to send a mail to two addresses. The server calls `hang` before it accepts the second one."""
    accept = smtp.box.handle_RCPT

    async def accept_slowly(server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if address == "slow@example.org":
            await hang()
        return await accept(server, session, envelope, address, options)

    smtp.box.handle_RCPT = accept_slowly  # type: ignore[method-assign]  # for this server only
    made = await mailing.channel("email", {"to": ["ops@example.org", "slow@example.org"]})
    await mailing.rule(made, events=("things.*",))
    await mailing.happen("one")
    await mailing.kit.events()
    await mailing.dispatcher.run_once()


async def test_an_attempt_that_is_broken_off_repeats_no_mail(mailing: Notified, smtp: MailServer) -> None:
    waits = threading.Event()

    async def hang() -> None:
        waits.set()
        await asyncio.sleep(60)

    await begin_mail(mailing, smtp, hang)
    assert await asyncio.to_thread(waits.wait, 60)
    await mailing.dispatcher.stop()
    [row] = await mailing.kit.work(lambda: list(Delivery.select()), read=True)
    assert (row.status, row.served) == ("pending", ["ops@example.org"])


async def test_a_killed_process_repeats_few_mails(
    mailing: Notified, smtp: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whom an attempt has served is stored while it runs, so the process that takes over knows of it."""
    monkeypatch.setattr(dispatcher_module, "LOOK_SECONDS", 0.01)
    goes_on = threading.Event()

    async def hang() -> None:
        while not goes_on.is_set():  # noqa: ASYNC110  (the test runs in another thread)
            await asyncio.sleep(0.01)

    await begin_mail(mailing, smtp, hang)

    def stored() -> tuple[str, list[str]]:
        [row] = Delivery.select()
        return row.status, row.served

    async with asyncio.timeout(60):
        while (await mailing.kit.work(stored, read=True))[1] != ["ops@example.org"]:  # noqa: ASYNC110  (see above)
            await asyncio.sleep(0.01)
    goes_on.set()
    await mailing.dispatcher.wait_until_idle()
    assert await mailing.kit.work(stored, read=True) == ("succeeded", ["ops@example.org", "slow@example.org"])


@pytest.mark.one_engine
async def test_the_dispatcher_looks_at_once_at_what_people_do(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    wake_up = world.dispatcher._wake_up
    wake_up.clear()
    await world.rule(made, events=("things.*",))
    assert wake_up.is_set()
    slack.answers = [404]
    await world.happen("one")
    await world.run()
    [row] = await world.deliveries()
    wake_up.clear()
    await world.ok(world.admin.post(f"/notifications/deliveries/{row['id']}/retry"), 202)
    assert wake_up.is_set()


@pytest.mark.one_engine
async def test_a_channel_whose_key_is_not_loaded_is_not_claimed(
    world: Notified, slack: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",))
    await world.happen("one")
    await world.kit.events()
    await world.dispatcher._fan_out.handle_new_events()
    claims, keyring = world.kit.service(DeliveryClaims), world.kit.kernel.keyring
    monkeypatch.setattr(keyring, "sealed", True)
    assert (await world.kit.work(claims.claim)).claimed == []
    monkeypatch.setattr(keyring, "sealed", False)
    assert len((await world.kit.work(claims.claim)).claimed) == 1


@pytest.mark.one_engine
async def test_a_process_without_the_key_gives_up_only_what_nobody_sends(
    world: Notified, slack: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process, which has the key, attempts the message again when it is due."""
    await world.ok(world.admin.put("/settings/notifications/retry_schedule", {"value": [0, 2 * DAY]}))
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",), group_wait_seconds=0)
    slack.answers = [500]
    await world.happen("one")
    await world.run()
    assert [row["status"] for row in await world.deliveries()] == ["retrying"]
    claims = world.kit.service(DeliveryClaims)
    monkeypatch.setattr(world.kit.kernel.keyring, "sealed", True)
    for days, given_up in ((1.1, 0), (1.8, 0), (0.2, 1)):
        clock.travel(days * DAY)
        assert await world.kit.work(claims.fail_overdue) == given_up


async def test_who_may_not_or_does_not_want_to_know_gets_nothing_that_was_held(
    mailing: Notified, smtp: MailServer
) -> None:
    made = await mailing.channel("email", {"to_recipients": True})
    await mailing.rule(made, events=("system.alert",), recipients={"roles": ["admin"]}, group_wait_seconds=3600)
    await mailing.rule(made, name="own", group_wait_seconds=3600)
    former, muting = await mailing.kit.as_user("admin"), mailing.member
    await mailing.alert("only for admins")
    await mailing.fail_task("one", owner=muting)
    await mailing.run()
    demoted = UserRow.update(role="member").where(UserRow.id == former.user["id"])
    await mailing.kit.work(demoted.execute)
    await mailing.ok(muting.put("/notifications/preferences", {"mute": ["task.failed"]}))
    await mailing.run(seconds=3601)
    assert [str(mail["To"]) for mail in smtp.box.mails] == [mailing.admin.user["email"]]
    await mailing.later(0)
    assert sorted(row["status"] for row in await mailing.deliveries()) == ["cancelled", "cancelled", "succeeded"]


class SlowPlugin(Plugin):
    """Contributes a type of channel that sends until a test lets it end."""

    name = "slow"
    wants = ("notifications",)
    may_end: asyncio.Event

    @hookimpl(optionalhook=True)
    def corral_notification_channels(self) -> Iterable[ChannelType]:
        async def send(config: Any, notification: Any) -> SendResult:
            await self.may_end.wait()
            return SendResult()

        return [ChannelType(type="slow", title="Slow", schema={"type": "object"}, secrets=(), send=send)]


async def test_an_attempt_that_takes_long_keeps_its_lease(
    make_kit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "LOOK_SECONDS", 0.001)
    SlowPlugin.may_end = asyncio.Event()
    world = await Notified().build(await make_kit(plugins=(*PLUGINS, SlowPlugin), config=ALLOWED))
    made = await world.channel("slow", {})
    await world.rule(made, events=("things.*",))
    await world.happen("one")
    await world.kit.events()
    await world.dispatcher.run_once()

    def lease_until() -> str:
        return str(Delivery.select(Delivery.lease_until).where(Delivery.channel_id == made["id"]).scalar())

    for _ in range(3):
        clock.travel(50)
        least = clock.now(50)
        async with asyncio.timeout(30):
            while await world.kit.work(lease_until, read=True) < least:  # noqa: ASYNC110  (another unit writes it)
                await asyncio.sleep(0.01)
    assert await world.kit.work(world.kit.service(DeliveryClaims).release_expired) == 0
    SlowPlugin.may_end.set()
    await world.dispatcher.wait_until_idle()
    assert [row["status"] for row in await world.deliveries()] == ["succeeded"]


async def test_an_attempt_that_fails_in_corral_counts_and_blocks_no_channel(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",))
    broken = Channel.update(secrets="00" * 40).where(Channel.id == made["id"])
    await world.kit.work(broken.execute)
    await world.happen("one")
    await world.run()
    [row] = await world.deliveries()
    assert (row["status"], row["attempts"], row["last_error"]) == ("retrying", 1, UNREADABLE)


@pytest.mark.one_engine
@pytest.mark.parametrize("damaged", ["00" * 40, "no hexadecimal"], ids=["other", "not hexadecimal"])
async def test_damaged_secrets_can_be_set_again(world: Notified, slack: Service, damaged: str) -> None:
    made = await slack_channel(world, slack)
    path = f"/notifications/channels/{made['id']}"
    later = {"secrets": damaged, "version": made["version"] + 1}
    await world.kit.work(Channel.update(later).where(Channel.id == made["id"]).execute)
    values = world.kit.service(ChannelRedactorValues)
    await values.refresh()  # as at a start
    tested = await world.ok(world.admin.post(f"{path}/test"))
    assert (tested["delivered"], tested["error"]) == (False, UNREADABLE)
    refused = await world.admin.put(path, {"config": {}})
    assert refused.status == 422  # the URL is missing
    await world.ok(world.admin.put(path, {"config": {"webhook_url": slack.url + "services/x"}}))
    assert (await world.ok(world.admin.post(f"{path}/test")))["delivered"]


async def test_secrets_whose_key_is_not_loaded_are_redacted_once_it_is(
    world: Notified, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "a secret of a channel"
    values, keyring = world.kit.service(ChannelRedactorValues), world.kit.kernel.keyring
    redactor = world.kit.service(Redactor)
    made = await world.channel("webhook", {"url": "https://example.org/x", "secret": secret})
    changed = Channel.update(version=made["version"] + 1).where(Channel.id == made["id"])
    await world.kit.work(changed.execute)  # without an event
    monkeypatch.setattr(keyring, "sealed", True)
    await values.refresh()
    monkeypatch.setattr(keyring, "sealed", False)
    await values.refresh()
    assert secret not in redactor.redact(secret)


@on_postgres
async def test_events_that_join_a_summary_at_the_same_time_are_all_counted(
    world: Notified, slack: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that quiet hours hold joins the summary while new events join it."""
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",), quiet_hours=hours(2, 60), group_wait_seconds=300)
    await world.happen("before")  # is due within the quiet hours
    await world.run()
    await world.run(seconds=130)
    await world.happen("in the summary")
    await world.run()
    clock.travel(300)
    await world.happen("meanwhile")
    await world.kit.events()
    started = read_meanwhile(world, grouping, "_collecting", monkeypatch)
    await world.kit.work(world.kit.service(DeliveryClaims).claim)
    await asyncio.gather(*started)
    await world.run(seconds=3600)
    assert [text.partition("\n")[0] for text in slack.texts] == ["3 × things.happened"]


@pytest.mark.one_engine
async def test_a_claim_reads_one_delivery_of_a_channel_however_many_wait(
    world: Notified, slack: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",))
    await world.happen("one")
    await world.kit.events()
    await world.dispatcher._fan_out.handle_new_events()
    claims = world.kit.service(DeliveryClaims)
    monkeypatch.setattr(claims, "_lease", lambda *_: None)  # so that every claim does the same

    def steps() -> int:
        """The steps of SQLite's virtual machine that a look and a claim take."""
        connection, taken = current().connection, 0

        def count() -> int:
            nonlocal taken
            taken += 1
            return 0

        connection.set_progress_handler(count, 1)
        claims.next_due_time()
        assert claims.claim().more
        connection.set_progress_handler(None, 1)
        return taken

    def fill() -> None:
        row = Delivery.get()
        rows = [{**row.__data__, "id": new_id(), "group_id": None} for _ in range(500)]
        Delivery.insert_many(rows).execute()

    before = await world.kit.work(steps)
    await world.kit.work(fill)
    assert await world.kit.work(steps) < before + 500


@pytest.mark.one_engine
async def test_deliveries_to_a_deleted_channel_are_cancelled_and_wake_nobody(world: Notified, slack: Service) -> None:
    made = await slack_channel(world, slack)
    await world.rule(made, events=("things.*",))
    await world.happen("one")
    await world.kit.events()
    await world.dispatcher._fan_out.handle_new_events()
    await world.kit.work(Channel.delete().execute)
    claims = world.kit.service(DeliveryClaims)
    assert await world.kit.work(claims.next_due_time, read=True) is None
    await world.kit.run_schedule("notifications.group")
    assert [row["status"] for row in await world.deliveries()] == ["cancelled"]
