"""The service `CodeReviews` as other plugins use it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from tests.plugins.code_reviews.conftest import Desk, patch_of

from corral.auth.principal import Principal
from corral.errors import Conflict, Forbidden
from corral.testing.kit import Client
from corral_core.accounts.api import Accounts
from corral_plugins.code_reviews.api import CodeReviews, CommentFacts, NewReview, NewReviewer
from corral_plugins.tasks.api import Tasks


async def _principal(desk: Desk, user_id: str) -> Principal:
    accounts = desk.kit.service(Accounts)
    return await desk.kit.work(lambda: accounts.principal_of(user_id, "code_reviews.write"), read=True)


@pytest.mark.one_engine
async def test_a_plugin_opens_and_revises_a_review_in_its_own_unit_of_work(desk: Desk) -> None:
    reviews, by = desk.kit.service(CodeReviews), await _principal(desk, desk.member.user["id"])
    new = NewReview(title="A change", agent_id=desk.agent_id)
    patch = await reviews.prepare(patch_of("TWO"), pointer="/patch")

    def interrupted() -> None:
        reviews.add(new, patch, by=by)
        raise RuntimeError("the plugin fails before its own row is written")

    with pytest.raises(RuntimeError):
        await desk.kit.work(interrupted)
    assert (await desk.member.get("/code-reviews")).json()["items"] == []

    made = await desk.kit.work(lambda: reviews.add(new, patch, by=by))
    again = await reviews.prepare(patch_of("TWO", "AND MORE"), pointer="/patch")
    await desk.comment(made.id, "Why?", file="x.py", line=2, severity="issue")
    revised = await desk.kit.work(lambda: reviews.revise(made.id, again, by=by))
    assert (revised.revision, revised.status, revised.patch_sha256) == (2, "pending", again.sha256)
    (comment,) = await desk.kit.work(lambda: reviews.comments(made.id), read=True)
    assert isinstance(comment, CommentFacts)
    assert (comment.body, comment.file, comment.severity) == ("Why?", "x.py", "issue")
    assert (comment.author_type, comment.author_id) == ("user", desk.other.user["id"])


@pytest.mark.one_engine
async def test_a_plugin_withdraws_a_review_once_and_only_with_the_rights_of_its_owner(desk: Desk) -> None:
    reviews, review_id = desk.kit.service(CodeReviews), (await desk.opened())["id"]
    owner, other = [await _principal(desk, each.user["id"]) for each in (desk.member, desk.other)]
    patch = await reviews.prepare(patch_of("TWO"), pointer="/patch")
    acts: list[Callable[..., Any]] = [reviews.withdraw, lambda found, *, by: reviews.revise(found, patch, by=by)]
    for act in acts:
        with pytest.raises(Forbidden):
            await desk.kit.work(partial(act, review_id, by=other))
    withdrawn = await desk.kit.work(lambda: reviews.withdraw(review_id, by=owner))
    assert withdrawn.status == "cancelled"
    with pytest.raises(Conflict):
        await desk.kit.work(lambda: reviews.withdraw(review_id, by=owner))


async def test_an_agent_reviews_a_patch_from_outside_in_a_tainted_task(desk: Desk) -> None:
    reviews, by = desk.kit.service(CodeReviews), await _principal(desk, desk.member.user["id"])
    reviewer = (await desk.member.post("/agents", {"name": "reviewer"})).json()["id"]
    for tainted in (False, True):
        patch = await reviews.prepare(patch_of("TWO"), pointer="/patch", tainted=tainted)
        new = NewReview(title=f"{tainted}", agent_id=desk.agent_id, reviewers=[NewReviewer(agent_id=reviewer)])
        await desk.kit.work(partial(reviews.add, new, patch, by=by))
    tasks = (await desk.member.get(f"/tasks?agent_id={reviewer}")).json()["items"]
    assert {task["title"]: task["tainted"] for task in tasks} == {"Review: False": False, "Review: True": True}


@pytest.mark.parametrize("tainted", [False, True])
async def test_an_agent_reviews_the_patch_of_a_tainted_run_in_a_tainted_task(desk: Desk, tainted: bool) -> None:
    """Whether or not the run names its task."""
    reviewer = (await desk.member.post("/agents", {"name": "reviewer"})).json()["id"]
    await desk.task()
    lease, tasks = await desk.worker.run(), desk.kit.service(Tasks)
    agent = Client(desk.kit.application.app, lease.claim["agent_token"])
    review = await desk.opened(agent, reviewers=[{"agent_id": reviewer}])
    if tainted:
        await desk.kit.work(lambda: tasks.taint_run(lease.task_id, lease.lease_id, ["a test"]))
    revised = await agent.post(f"/code-reviews/{review['id']}/revisions", {"patch": patch_of("2")})
    assert revised.status == 200, revised
    await desk.opened(agent, reviewers=[{"agent_id": reviewer}])
    asked = (await desk.member.get(f"/tasks?agent_id={reviewer}")).json()["items"]
    assert [task["tainted"] for task in reversed(asked)] == [False, tainted, tainted]
