"""What another process does to the same rows at the same time. Only PostgreSQL runs units of work at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from tests.plugins.notifications.conftest import Notified
from tests.plugins.notifications.services import Service
from tests.plugins.notifications.test_rules import slack_channel

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.parametrize("unmade_database_url", ["postgres"], indirect=True),
]

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


class Other:
    """A transaction of another process, and a connection that sees who waits for it."""

    def __init__(self, url: str) -> None:
        self.transaction, self.watcher = psycopg.connect(url), psycopg.connect(url, autocommit=True)

    async def answer_after_commit(self, request: Any) -> Any:
        """Send a request that has to wait for the transaction, end the transaction, and return the answer."""
        running, ends = asyncio.ensure_future(request), time.monotonic() + 60
        while not self.watcher.execute(WAITING).fetchone()[0] and not running.done():  # type: ignore[index]  # a count is one row
            assert time.monotonic() < ends
            await asyncio.sleep(0.005)
        self.transaction.commit()
        return await running


@pytest.fixture
def other(world: Notified, unmade_database_url: str) -> Iterator[Other]:
    made = Other(unmade_database_url)
    yield made
    made.transaction.close()
    made.watcher.close()


async def test_notifications_8_a_channel_that_a_rule_begins_to_use_is_not_deleted(
    world: Notified, slack: Service, other: Other
) -> None:
    channel, rule = await slack_channel(world, slack), await world.rule()
    other.transaction.execute("SELECT id FROM notifications_channels FOR SHARE")  # as the creation of a rule does
    insert = "INSERT INTO notifications_rule_channels (channel_id, rule_id) VALUES (%s, %s)"
    other.transaction.execute(insert, (channel["id"], rule["id"]))
    answer = await other.answer_after_commit(world.admin.delete(f"/notifications/channels/{channel['id']}"))
    assert (answer.status, answer.code) == (409, "in_use")


async def test_no_rule_uses_a_channel_that_is_being_deleted(world: Notified, slack: Service, other: Other) -> None:
    channel = await slack_channel(world, slack)
    other.transaction.execute("DELETE FROM notifications_channels")
    body = {"name": "a rule", "events": ["task.failed"], "channel_ids": [channel["id"]]}
    answer = await other.answer_after_commit(world.admin.post("/notifications/rules", body))
    assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, "/channel_ids/0")
