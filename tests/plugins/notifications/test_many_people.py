"""Events that concern more people than one unit of work may tell."""

from __future__ import annotations

from typing import Any

import pytest
from tests.kernel.mail.conftest import MailServer
from tests.plugins.notifications.conftest import Notified

from corral.ids import new_id
from corral_core.accounts.models import UserRow
from corral_core.event_log.api import PositionMoved
from corral_plugins.notifications.models import Delivery, Notification, RecipientProgress
from corral_plugins.notifications.service import fan_out as fan_out_module
from corral_plugins.notifications.service import recipient_chunks
from corral_plugins.notifications.service.inbox import Inbox

EVERYBODY: dict[str, Any] = {"events": ("things.*",), "recipients": {"roles": ["member"]}, "in_app": True}


async def add_members(world: Notified, count: int, prefix: str = "more") -> None:
    def unit() -> None:
        one = dict(UserRow.get_by_id(world.member.user["id"]).__data__)
        rows = []
        for number in range(count):
            address = f"{prefix}{number}@example.org"
            rows.append({**one, "id": new_id(), "email": address, "email_key": address})
        for start in range(0, count, 500):
            UserRow.insert_many(rows[start : start + 500]).execute()

    await world.kit.work(unit)


async def counts(world: Notified) -> list[int]:
    """How many notifications about things each person has, and that nothing is half told."""

    def unit() -> list[int]:
        assert not RecipientProgress.select().exists()
        found: dict[str, int] = {}
        for row in Notification.select().where(Notification.type == "things.happened"):
            found[row.user_id] = found.get(row.user_id, 0) + row.count
        return sorted(found.values())

    return await world.kit.work(unit, read=True)


async def test_a_unit_of_work_tells_a_bounded_number_of_people(
    mailing: Notified, smtp: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every event goes to every member, in the app and by mail: no unit writes more than its number of rows."""
    for module in (recipient_chunks, fan_out_module):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 10)
    written: list[int] = []
    add = Inbox.add

    def measured(self: Inbox, new: Any) -> None:
        rows = list(new)
        written.append(len(rows))
        add(self, rows)

    monkeypatch.setattr(Inbox, "add", measured)
    await add_members(mailing, 23)
    made = await mailing.channel("email", {"to_recipients": True})
    await mailing.rule(made, **EVERYBODY)
    await mailing.happen("one", "two", "three")
    await mailing.kit.events()
    await mailing.dispatcher._fan_out.handle_new_events()
    assert await counts(mailing) == [3] * 25
    assert max(written) <= 10
    assert await mailing.kit.work(lambda: Delivery.select().count(), read=True) == 75


async def test_an_event_that_is_half_told_is_told_to_the_others(
    world: Notified, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends between two units of work. The next one goes on where it stopped."""
    for module in (recipient_chunks, fan_out_module):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 4)
    await add_members(world, 10)
    await world.rule(**EVERYBODY)
    await world.happen("one", "two")
    await world.kit.events()
    fan_out = world.dispatcher._fan_out
    batch = await world.kit.work(lambda: fan_out._load(50), read=True)
    matched = await fan_out._matching.matches(batch.rules, batch.events)
    roles = {"member": await fan_out._users_with_role("member")}
    plan = await world.kit.work(lambda: fan_out._plan(batch, batch.events, matched, {}, roles), read=True)
    assert len(plan.chunks) == 3
    first = plan.chunks[0]
    await world.kit.work(lambda: fan_out._write(batch, plan, first, None, matched))
    with pytest.raises(PositionMoved):  # another process read the same
        await world.kit.work(lambda: fan_out._write(batch, plan, first, None, matched))
    await world.run()
    assert await counts(world) == [2] * 12
