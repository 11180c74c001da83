"""`@name` in messages and in comments on code reviews."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.code_reviews.conftest import patch_of
from tests.plugins.notifications.conftest import ALLOWED, PLUGINS, Notified
from tests.plugins.notifications.test_people import titles

from corral_plugins.notifications.service.mentions import MAX_NAMES, mentioned_names


def name_of(client: Any) -> str:
    return str(client.user["email"]).partition("@")[0]


async def say(world: Notified, body: str, **fields: Any) -> None:
    message = {"channel": "news", "subject": "Lunch", "body": body, **fields}
    await world.ok(world.member.post("/messages/send", message), 201)


async def test_a_mention_in_a_message_tells_the_person_once(world: Notified) -> None:
    name, address = name_of(world.stranger), world.stranger.user["email"]
    await say(world, f"Ask @{name.upper()}, or @{address}. Not @{name}x, mail{address} or @nobody.")
    assert await titles(world, world.stranger) == ["You were mentioned in a message: Lunch"]
    [row] = await world.inbox(world.stranger)
    assert (row["type"], row["severity"], row["object"]["type"], row["count"]) == ("mention", "info", "message", 1)
    assert await titles(world, world.member) == await titles(world, world.admin) == []


@pytest.mark.one_engine
async def test_the_recipient_of_a_message_is_told_of_the_message_alone(world: Notified) -> None:
    text, recipient = f"Hello @{name_of(world.stranger)}", world.stranger.user["id"]
    await say(world, text, channel=None, recipient_user_id=recipient)
    assert await titles(world, world.stranger) == ["New message: Lunch"]


@pytest.mark.one_engine
async def test_nobody_is_told_of_their_own_words_or_of_what_they_muted(world: Notified) -> None:
    await say(world, f"I am @{name_of(world.member)}.")
    await world.ok(world.stranger.put("/notifications/preferences", {"mute": ["mention"]}))
    await say(world, f"You are @{name_of(world.stranger)}.")
    assert await titles(world, world.member) == await titles(world, world.stranger) == []


@pytest.mark.one_engine
async def test_admins_may_switch_mentions_off(world: Notified) -> None:
    await world.ok(world.admin.put("/settings/notifications/defaults", {"value": {"mention": False}}))
    await say(world, f"You are @{name_of(world.stranger)}.")
    assert await titles(world, world.stranger) == []


async def test_who_may_not_read_a_message_is_not_told_of_it(world: Notified) -> None:
    auditor = await world.kit.as_user("auditor")
    inactive = await world.kit.as_user("member")
    await world.ok(world.admin.patch(f"/admin/users/{inactive.user['id']}", {"is_active": False}))
    await say(world, f"@{name_of(auditor)} @{name_of(inactive)} @{name_of(world.stranger)}")
    assert await titles(world, world.stranger) == ["You were mentioned in a message: Lunch"]
    mine = await world.kit.work(lambda: rows_of(auditor.user["id"], inactive.user["id"]), read=True)
    assert mine == 0


async def test_a_mention_in_a_comment_on_a_code_review(make_kit: Callable[..., Any]) -> None:
    plugins = (*PLUGINS, "code_reviews", "files", "tools")
    world = await Notified().build(await make_kit(plugins=plugins, config=ALLOWED))
    agent = await world.ok(world.member.post("/agents", {"name": "writer"}), 201)
    body = {"title": "Change", "agent_id": agent["id"], "patch": patch_of("TWO")}
    review = await world.ok(world.member.post("/code-reviews", body), 201)
    comment = {"body": f"What do you think, @{name_of(world.stranger)}?"}
    await world.ok(world.member.post(f"/code-reviews/{review['id']}/comment", comment), 201)
    assert await titles(world, world.stranger) == ["You were mentioned in a comment on a code review"]
    [row] = await world.inbox(world.stranger)
    assert (row["type"], row["href"]) == ("mention", f"/api/v1/code-reviews/{review['id']}")
    assert await titles(world, world.admin) == []


def rows_of(*user_ids: str) -> int:
    from corral_plugins.notifications.models import Notification

    return int(Notification.select().where(Notification.user_id.in_(user_ids)).count())


@pytest.mark.one_engine
def test_names_in_a_text() -> None:
    text = "@ada, (@Bob) x@y.org @c.d. @e@f.org; @@g @- @ é@h @ada\n@i-"
    assert mentioned_names(text) == {"ada", "bob", "c.d", "e@f.org", "i"}
    assert len(mentioned_names(" ".join(f"@n{number}" for number in range(100)))) == MAX_NAMES
