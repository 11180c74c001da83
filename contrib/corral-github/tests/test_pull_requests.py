"""Pull requests become code reviews, and the decisions of people are posted back."""

from __future__ import annotations

import pytest
from conftest import World, on_the_loop_of_the_module

pytestmark = on_the_loop_of_the_module

SECOND_HEAD = "a" * 40
MORE = b"""diff --git a/hello.py b/hello.py
--- a/hello.py
+++ b/hello.py
@@ -1,4 +1,6 @@
 def greet(name):
-    return "Hi " + name
+    # politely
+    greeting = f"Good day, {name}."
+    return greeting
\x20
 print(greet("you"))
"""


async def test_a_pull_request_becomes_a_review_and_new_commits_become_revisions(world: World) -> None:
    assert (await world.repository())["is_token_tried"] is False
    review = await world.review()
    assert (await world.repository())["is_token_tried"] is True
    assert (review["title"], review["repo"], review["agent_id"]) == ("Greet politely", "octo/hello", world.author)
    assert (review["base_ref"], review["head_ref"], review["status"]) == ("main", "politeness", "pending")
    diff = await world.member.get(f"/code-reviews/{review['id']}/diff")
    assert diff.body == world.github.diff

    asked = len(world.github.requests)
    await world.pull("synchronize")  # for a commit that was handled before
    await world.settle()
    assert world.github.requests[asked:] == ["GET /repos/octo/hello/pulls/7"]

    world.github.head_sha = "b" * 40  # new commits without a new diff, such as a rebase
    await world.pull("synchronize")
    world.github.head_sha, world.github.diff = SECOND_HEAD, MORE
    await world.pull("synchronize")
    await world.settle()
    (found,) = await world.reviews()
    assert (found["id"], found["revision"]) == (review["id"], 2)
    details = [each["detail"] for each in await world.listed("deliveries")]
    assert sorted(details) == sorted(
        ["A code review was opened.", "The code review has a new revision."] + ["This commit was handled before."] * 2
    )


@pytest.mark.one_engine
async def test_the_reviewing_agent_works_in_a_tainted_task(world: World) -> None:
    path = f"/github/repositories/{world.repository_id}"
    changed = await world.admin.patch(path, {"reviewer_agent_id": world.reviewer})
    assert (changed.status, changed.json()["version"]) == (200, 2)
    assert (await world.admin.patch(path, {"reviewer_agent_id": world.author})).status == 422
    await world.review()
    (task,) = (await world.member.get(f"/tasks?agent_id={world.reviewer}")).json()["items"]
    assert (task["tainted"], task["title"]) == (True, "Review: Greet politely")


async def test_a_closed_pull_request_withdraws_its_review_and_an_open_one_gets_a_new_review(world: World) -> None:
    first = await world.review()
    world.github.pull = {"state": "closed"}
    await world.pull("closed")
    await world.settle()
    assert (await world.member.get(f"/code-reviews/{first['id']}")).json()["status"] == "cancelled"
    world.github.pull = {"draft": True}
    await world.pull("reopened")
    await world.settle()
    assert len(await world.reviews()) == 1
    world.github.pull = {}
    await world.pull("ready_for_review")
    await world.settle()
    second = (await world.reviews())[0]
    assert (second["status"], second["id"] != first["id"]) == ("pending", True)
    assert world.github.posts == []


@pytest.mark.one_engine
async def test_a_decision_is_posted_with_the_comments_at_their_lines(world: World) -> None:
    review = await world.review()
    path = f"/code-reviews/{review['id']}/comment"
    for body in (
        {"body": "Why so stiff?", "file": "hello.py", "line": 2, "severity": "issue", "suggestion": "    pass"},
        {"body": "This was fine.", "file": "hello.py", "line": 2, "side": "old"},
        {"body": "Both lines.", "file": "hello.py", "line": 2, "end_line": 3},
        {"body": "Test it, please."},
        {"body": "Never mind.", "file": "hello.py", "line": 1},
    ):
        made = await world.member.post(path, body)
        assert made.status == 201, made
    await world.member.post(f"/code-reviews/{review['id']}/comments/{made.json()['id']}/resolve")
    await world.decide(review["id"], "request-changes", reason="Almost.")

    (posted,) = world.github.reviews
    assert (posted["event"], posted["commit_id"]) == ("REQUEST_CHANGES", world.github.head_sha)
    assert posted["comments"] == [
        {
            "path": "hello.py",
            "line": 2,
            "side": "RIGHT",
            "body": "**issue**: Why so stiff?\n\n```suggestion\n    pass\n```",
        },
        {"path": "hello.py", "line": 2, "side": "LEFT", "body": "This was fine."},
        {
            "path": "hello.py",
            "line": 3,
            "side": "RIGHT",
            "body": "Both lines.",
            "start_line": 2,
            "start_side": "RIGHT",
        },
    ]
    (post,) = await world.listed("posts")
    name = world.member.user["full_name"]
    assert posted["body"] == (
        f"**Changes requested** by {name} in Corral.\n\nAlmost.\n\nTest it, please.\n\n"
        f"<!-- corral-github:{post['id']} -->"
    )
    assert (post["status"], post["number"], post["attempts"]) == ("posted", 7, 1)
    assert post["url"] == "https://github.com/octo/hello/pull/7#pullrequestreview-80"

    world.github.head_sha, world.github.diff = SECOND_HEAD, MORE
    await world.pull("synchronize")
    await world.settle()
    await world.decide(review["id"], "approve", note="Now it is good.")
    assert [each["event"] for each in world.github.reviews] == ["REQUEST_CHANGES", "APPROVE"]
    assert world.github.reviews[1]["commit_id"] == SECOND_HEAD
    assert "Why so stiff?" in world.github.reviews[1]["body"] + str(world.github.reviews[1].get("comments"))


@pytest.mark.one_engine
async def test_a_rejection_is_posted_and_nothing_is_posted_about_other_reviews(world: World) -> None:
    other = await world.member.post(
        "/code-reviews", {"title": "x", "agent_id": world.author, "patch": world.github.diff.decode()}
    )
    await world.decide(other.json()["id"], "approve")
    assert world.github.posts == []
    await world.pull()
    await world.settle()
    review = (await world.reviews())[0]
    await world.decide(review["id"], "reject", reason="No.")
    (posted,) = world.github.reviews
    assert (posted["event"], "**Rejected** by" in posted["body"], "No." in posted["body"]) == (
        "REQUEST_CHANGES",
        True,
        True,
    )


@pytest.mark.one_engine
async def test_what_github_refuses_in_a_review_is_posted_in_its_text(world: World) -> None:
    """GitHub refuses comments on lines that its diff does not show, and the approval of one's own pull request."""
    review = await world.review()
    await world.member.post(f"/code-reviews/{review['id']}/comment", {"body": "Here.", "file": "hello.py", "line": 2})
    world.github.is_own_pull = True
    await world.decide(review["id"], "approve")
    (posted,) = world.github.reviews
    assert (posted["event"], "comments" in posted) == ("COMMENT", False)
    assert "`hello.py` line 2: Here." in posted["body"]


@pytest.mark.one_engine
async def test_credentials_that_became_known_later_are_not_posted(world: World) -> None:
    review = await world.review()
    body = {"body": "The password is correct-horse-7351, and <!-- corral-github:x --> is no marker."}
    await world.member.post(f"/code-reviews/{review['id']}/comment", body)
    await world.admin.post("/secrets", {"name": "later", "value": "correct-horse-7351"})
    await world.redactor_knows("correct-horse-7351")
    await world.decide(review["id"], "approve")
    (posted,) = world.github.reviews
    assert "correct-horse-7351" not in str(posted)
    assert posted["body"].count("<!--") == 1


@pytest.mark.one_engine
@pytest.mark.parametrize("how", ["bytes", "status", "format"])
async def test_a_diff_that_cannot_be_reviewed_is_answered_with_a_comment(world: World, how: str) -> None:
    if how == "bytes":
        world.github.diff = MORE + b"+" + b"x" * 2 * 1024 * 1024
    elif how == "status":
        world.github.is_diff_refused = True
    else:
        world.github.diff = b"diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1,9 +1,9 @@\n one\n"
    await world.pull()
    await world.settle()
    assert await world.reviews() == []
    (comment,) = world.github.comments
    told = {"bytes": "larger than 2 MiB", "status": "maximum number of lines", "format": "cannot be parsed at line"}
    assert comment["number"] == 7
    assert f"cannot review the commit {world.github.head_sha[:12]}" in comment["body"]
    assert told[how] in comment["body"]
    await world.pull("reopened")
    await world.settle()
    assert len(world.github.comments) == 1


async def test_pull_requests_can_become_tasks_whose_results_are_posted(world: World) -> None:
    changed = await world.admin.patch(f"/github/repositories/{world.repository_id}", {"pull_requests": "task"})
    assert changed.status == 200, changed
    await world.pull()
    await world.settle()
    (old,) = await world.tasks()
    world.github.head_sha, world.github.diff = SECOND_HEAD, MORE
    await world.pull("synchronize")
    await world.settle()
    (task, cancelled) = await world.tasks()
    assert (cancelled["id"], cancelled["status"], task["tainted"]) == (old["id"], "cancelled", True)
    assert task["source"]["type"] == "github"
    claim = await world.finish_task(world.author, {"text": "Well done."})
    assert claim["task"]["input"]["patch"] == MORE.decode()
    (comment,) = world.github.comments
    assert (comment["number"], comment["body"].splitlines()[0]) == (7, "Well done.")


@pytest.mark.one_engine
async def test_what_is_wrong_in_corral_is_not_told_at_the_pull_request(world: World) -> None:
    deleted = await world.member.delete(f"/agents/{world.author}")
    assert deleted.status == 204, deleted
    await world.pull()
    await world.settle()
    assert world.github.comments == []
    assert [each["status"] for each in await world.listed("deliveries")] == ["failed"]
    agent = (await world.member.post("/agents", {"name": "another"})).json()["id"]
    path = f"/github/repositories/{world.repository_id}"
    assert (await world.admin.patch(path, {"agent_id": agent})).status == 200
    assert (await world.admin.post(f"{path}/retry")).json() == {"deliveries": 1, "posts": 0}
    await world.settle()
    (review,) = await world.reviews(agent)
    assert review["agent_id"] == agent
