"""Agents propose diffs and comment by tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.code_reviews.conftest import HUMAN, PLUGINS, patch_of
from tests.plugins.tools.conftest import World

TOOLS = ("code_review.propose", "code_review.comment")


@pytest.fixture
async def bench(make_kit: Callable[..., Any]) -> World:
    """A run of an agent with both tools."""
    more: Any = [name for name in PLUGINS if name not in ("admin", "agents", "workers", "tasks", "tools")]
    return await World().build(make_kit, more=more)


async def test_a_proposed_diff_is_what_the_task_waits_for(bench: World) -> None:
    run = await bench.run(*TOOLS, task={"title": "x", "review_policy": HUMAN})
    called = await run.tool("code_review.propose", {"title": "Mine", "patch": patch_of("2"), "repo": "r"})
    assert called.status == 200, called
    proposed = called.json()["result"]
    assert (proposed["revision"], proposed["status"]) == (1, "pending")
    done = await run.agent.post(f"/tasks/{run.task_id}/complete", {"result": "done"})
    assert (done.json()["status"], done.json()["review_id"]) == ("waiting", proposed["review_id"])
    review_id = proposed["review_id"]
    sent = await bench.member.post(f"/code-reviews/{review_id}/request-changes", {"reason": "No."})
    assert sent.status == 200, sent
    again = await bench.claim((await bench.member.get(f"/tasks/{run.task_id}")).json()["assigned_agent_id"])
    assert again.claim["resume"]["review"]["reason"] == "No."
    revised = await again.tool("code_review.propose", {"title": "Mine", "patch": patch_of("II")}, call_id="again")
    assert revised.json()["result"]["revision"] == 2, revised
    await again.agent.post(f"/tasks/{run.task_id}/complete", {"result": "done"})
    assert (await bench.member.post(f"/code-reviews/{review_id}/approve", {})).status == 200
    assert (await bench.member.get(f"/tasks/{run.task_id}")).json()["status"] == "completed"


async def test_an_agent_comments_by_a_tool(bench: World) -> None:
    run = await bench.run(*TOOLS)
    agent_id = run.claim["agent"]["id"]
    body = {"title": "x", "agent_id": agent_id, "patch": patch_of("2")}
    review = (await bench.member.post("/code-reviews", body)).json()
    said = {"review_id": review["id"], "body": "Why?", "file": "x.py", "line": 2}
    called = await run.tool("code_review.comment", said)
    assert called.json()["result"]["anchor"] == "active", called
    (comment,) = (await bench.member.get(f"/code-reviews/{review['id']}")).json()["comments"]
    assert (comment["author"]["type"], comment["author"]["id"], comment["line"]) == ("agent", agent_id, 2)
    told = [each for each in await bench.kit.events() if each.type == "code_review.commented"]
    assert [(each.actor_type, each.actor_id) for each in told] == [("agent", agent_id)]
    wrong = await run.tool("code_review.propose", {"title": "x", "patch": "no diff"})
    assert wrong.json()["error"] is not None or wrong.status == 422
