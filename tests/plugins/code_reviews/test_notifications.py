"""Reviewers and owners learn of reviews without any rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.plugins.code_reviews.conftest import patch_of
from tests.plugins.notifications.conftest import ALLOWED, PLUGINS, Notified
from tests.plugins.notifications.test_people import titles

from corral import clock

NEW, STILL = "A diff waits for a review", "A diff still waits for a review (revision 1)"


async def test_reviewers_and_owners_are_told(make_kit: Callable[..., Any]) -> None:
    plugins = (*PLUGINS, "code_reviews", "files", "tools")
    world = await Notified().build(await make_kit(plugins=plugins, config=ALLOWED))
    opener, reviewer, owner = await world.kit.as_user("member"), world.stranger, world.member
    agent = await world.ok(world.admin.post("/agents", {"name": "writer"}), 201)
    task = await world.ok(owner.post("/tasks", {"title": "Change it"}), 201)
    body = {
        "title": "Change",
        "agent_id": agent["id"],
        "task_id": task["id"],
        "patch": patch_of("TWO"),
        "reviewers": [{"user_id": reviewer.user["id"]}],
    }
    review = await world.ok(opener.post("/code-reviews", body), 201)
    assert [await titles(world, each) for each in (reviewer, owner, opener, world.admin)] == [[NEW], [NEW], [], []]
    [row] = await world.inbox(reviewer)
    assert (row["type"], row["object"]["id"]) == ("code_review.created", review["id"])

    await world.ok(reviewer.post(f"/code-reviews/{review['id']}/request-changes", {"reason": "Why?"}))
    assert await titles(world, world.admin) == ["A diff was sent back to its agent (revision 1)"]  # who owns the agent
    [row] = await world.inbox(world.admin)
    assert row["body"] == f"Why?\nSee it: corral reviews show {review['id']}"
    assert [await titles(world, each) for each in (reviewer, owner, opener)] == [[NEW], [NEW], []]

    del body["task_id"]
    await world.ok(opener.post("/code-reviews", body), 201)
    await world.run()
    clock.travel(86_401)
    await world.kit.run_schedule("code_reviews.remind")
    again = [await world.kit.sign_in(each.user["email"]) for each in (reviewer, owner, opener)]
    assert [(await titles(world, each))[-1:] for each in again] == [[STILL], [NEW], []]


async def test_a_review_without_reviewers_is_told_to_the_owner_of_the_agent(make_kit: Callable[..., Any]) -> None:
    plugins = (*PLUGINS, "code_reviews", "files", "tools")
    world = await Notified().build(await make_kit(plugins=plugins, config=ALLOWED))
    agent = await world.ok(world.stranger.post("/agents", {"name": "writer"}), 201)
    body = {"title": "Change", "agent_id": agent["id"], "patch": patch_of("TWO")}
    await world.ok(world.member.post("/code-reviews", body), 201)
    assert [await titles(world, each) for each in (world.stranger, world.member, world.admin)] == [[NEW], [], []]
