"""What another process does to the same rows at the same time. Only PostgreSQL runs units of work at the same time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.engines import POSTGRES
from tests.plugins.notifications.conftest import Notified
from tests.plugins.notifications.services import Service
from tests.plugins.notifications.test_rules import slack_channel
from tests.rival import Rival

pytestmark = POSTGRES


@pytest.fixture
def rival(world: Notified, unmade_database_url: str) -> Iterator[Rival]:
    made = Rival(unmade_database_url)
    yield made
    made.close()


async def test_notifications_8_a_channel_that_a_rule_begins_to_use_is_not_deleted(
    world: Notified, slack: Service, rival: Rival
) -> None:
    channel, rule = await slack_channel(world, slack), await world.rule()
    rival.transaction.execute("SELECT id FROM notifications_channels FOR SHARE")  # as the creation of a rule does
    insert = "INSERT INTO notifications_rule_channels (channel_id, rule_id) VALUES (%s, %s)"
    rival.transaction.execute(insert, (channel["id"], rule["id"]))
    answer = await rival.before(world.admin.delete(f"/notifications/channels/{channel['id']}"))
    assert (answer.status, answer.code) == (409, "in_use")


async def test_no_rule_uses_a_channel_that_is_being_deleted(world: Notified, slack: Service, rival: Rival) -> None:
    channel = await slack_channel(world, slack)
    rival.transaction.execute("DELETE FROM notifications_channels")
    body = {"name": "a rule", "events": ["task.failed"], "channel_ids": [channel["id"]]}
    answer = await rival.before(world.admin.post("/notifications/rules", body))
    assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, "/channel_ids/0")
