"""The rules of reviews: who may do what, what supersedes and cancels, and what stops an approval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytest_asyncio
from tests.plugins.code_reviews.conftest import HUMAN, PLUGINS, Desk, desk_of, patch_of
from tests.shared_kernels import on_the_loop_of_the_module

from corral import clock
from corral.testing.kit import Client
from corral_plugins.code_reviews.service import rows


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(make_shared_kit: Callable[..., Any]) -> Desk:
    """A desk for the tests that need nothing but a review of their own."""
    return await desk_of(await make_shared_kit(plugins=PLUGINS))


# -- comments


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"file": "x.py", "line": 40}, "/line"),
        ({"file": "x.py", "line": 2, "end_line": 9}, "/line"),
        ({"file": "x.py", "line": 3, "end_line": 2}, "/end_line"),
        ({"file": "y.py"}, "/file"),
        ({"line": 2}, "/file"),
        ({"file": "x.py", "end_line": 2}, "/line"),
        ({"parent_id": "01890000-0000-7000-8000-000000000000"}, "/parent_id"),
    ],
)
@on_the_loop_of_the_module
async def test_a_comment_is_about_what_the_current_revision_shows(shared: Desk, fields: Any, pointer: str) -> None:
    review = await shared.opened()
    answer = await shared.act(review["id"], "comment", {"body": "x", **fields})
    assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, pointer), answer


@on_the_loop_of_the_module
async def test_the_text_of_all_comments_on_a_review_is_bounded(shared: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_CHARACTERS", 30)
    review = await shared.opened()
    first = await shared.comment(review["id"], "x" * 10, file="x.py", line=2, suggestion="y" * 6)  # 20 with the file
    path = f"/code-reviews/{review['id']}/comments/{first['id']}"
    refused = [
        await shared.act(review["id"], "comment", {"body": "z" * 11}),
        # It takes the file, too.
        await shared.act(review["id"], "comment", {"body": "z" * 7, "parent_id": first["id"]}),
        await shared.other.put(path, {"body": "x" * 21}),
    ]
    assert [(answer.status, answer.code) for answer in refused] == [(429, "quota_exceeded")] * 3
    assert (await shared.other.put(path, {"body": "x" * 20})).status == 200
    assert (await shared.other.put(path, {"body": "x" * 20})).status == 200  # no longer than before
    assert (await shared.act(review["id"], "comment", {"body": "z"})).code == "quota_exceeded"
    assert (await shared.other.put(path, {"body": "x" * 4})).status == 200
    await shared.comment(review["id"], "z" * 6, parent_id=first["id"])
    assert [each["body"] for each in (await shared.review(review["id"]))["comments"]] == ["x" * 4, "z" * 6]


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_the_old_side_has_its_own_lines(shared: Desk) -> None:
    review = await shared.opened()
    comment = await shared.comment(review["id"], "Keep it.", file="x.py", line=2, side="old")
    assert (comment["side"], comment["line"], comment["anchor"]) == ("old", 2, "active")


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_only_its_author_edits_a_comment_and_every_member_resolves_it(shared: Desk) -> None:
    review = await shared.opened()
    comment = await shared.comment(review["id"], "Whi?")
    path = f"/code-reviews/{review['id']}/comments/{comment['id']}"
    assert (await shared.member.put(path, {"body": "x"})).status == 403
    edited = (await shared.other.put(path, {"body": "Why?"})).json()
    assert (edited["body"], edited["edited"]) == ("Why?", True)
    for action, resolved in (("resolve", True), ("resolve", True), ("reopen", False), ("reopen", False)):
        answer = await shared.member.post(f"{path}/{action}", {})
        assert (answer.status, answer.json()["resolved"]) == (200, resolved)
    viewer = await shared.kit.as_user("viewer")
    assert (await viewer.post(f"{path}/resolve", {})).status == 403
    assert (await shared.act(review["id"], "approve")).status == 200
    assert (await shared.comment(review["id"], "Late, but readable."))["anchor"] == "none"


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_a_thread_is_resolved_as_a_whole(shared: Desk) -> None:
    review = await shared.opened()
    first = await shared.comment(review["id"], "Why?", severity="blocker")
    answer = await shared.comment(review["id"], "And this?", parent_id=first["id"], severity="blocker")
    nested = await shared.comment(review["id"], "Well.", parent_id=answer["id"])
    assert nested["parent_id"] == first["id"]
    assert (await shared.member.post(f"/code-reviews/{review['id']}/comments/{answer['id']}/resolve", {})).status == 200
    assert (await shared.review(review["id"]))["open_blockers"] == 0


# -- decisions


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_a_viewer_and_an_api_key_decide_nothing(shared: Desk) -> None:
    review = await shared.opened()
    viewer = await shared.kit.as_user("viewer")
    assert (await viewer.get(f"/code-reviews/{review['id']}")).status == 200
    made = await shared.member.post("/security/api-keys", {"name": "k", "scopes": ["*"]})
    key = Client(shared.kit.application.app, made.json()["key"])
    for client in (viewer, key):
        for action in ("approve", "reject", "request-changes"):
            assert (await client.post(f"/code-reviews/{review['id']}/{action}", {})).status == 403


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_an_empty_body_approves(shared: Desk) -> None:
    review = await shared.opened()
    answer = await shared.other.post(f"/code-reviews/{review['id']}/approve")
    assert (answer.status, answer.json()["decided_by"]) == (200, shared.other.user["id"])


@pytest.mark.one_engine
async def test_the_opener_approves_unless_a_second_person_must(desk: Desk) -> None:
    first, second = await desk.opened(), await desk.opened()
    assert (await desk.act(first["id"], "approve", by=desk.member)).status == 200
    await desk.admin.put("/settings/code_reviews/require_second_person", {"value": True})
    refused = await desk.act(second["id"], "approve", by=desk.member)
    assert (refused.status, refused.code) == (403, "self_approval")
    _, awaited = await desk.waiting()
    assert (await desk.act(awaited, "approve", by=desk.member)).code == "self_approval"
    assert (await desk.act(second["id"], "approve")).status == 200


@pytest.mark.one_engine
async def test_the_owner_of_the_task_is_no_second_person_if_somebody_else_opened_the_review(desk: Desk) -> None:
    await desk.admin.put("/settings/code_reviews/require_second_person", {"value": True})
    review = await desk.opened(desk.other, task_id=await desk.task())
    for by in (desk.member, desk.other):
        assert (await desk.act(review["id"], "approve", by=by)).code == "self_approval"
    assert (await desk.act(review["id"], "approve", by=await desk.kit.as_user("member"))).status == 200


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_a_failed_check_stops_an_approval(shared: Desk) -> None:
    review = await shared.opened()
    checks = [{"name": "tests", "status": "failed", "url": "https://ci.example.com/1"}, {"name": "lint"}]
    assert (await shared.member.patch(f"/code-reviews/{review['id']}", {"checks": checks})).status == 200
    refused = await shared.act(review["id"], "approve", {"force": True}, shared.admin)
    assert (refused.code, refused.json()["failed_checks"]) == ("invalid_state", ["tests"])
    checks[0]["status"] = "passed"
    await shared.member.patch(f"/code-reviews/{review['id']}", {"checks": checks})
    assert (await shared.act(review["id"], "approve")).status == 200


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_a_required_reviewer_who_asked_for_changes_must_be_heard(shared: Desk) -> None:
    required = {"user_id": shared.other.user["id"], "required": True}
    review = await shared.opened(reviewers=[required])
    assert [each["state"] for each in review["reviewers"]] == ["pending"]
    await shared.comment(review["id"], "Hm.")
    assert [each["state"] for each in (await shared.review(review["id"]))["reviewers"]] == ["commented"]
    assert (await shared.act(review["id"], "request-changes")).json()["reviewers"][0]["state"] == "rejected"
    await shared.member.post(f"/code-reviews/{review['id']}/revisions", {"patch": patch_of("2")})
    refused = await shared.act(review["id"], "approve", by=shared.member)
    assert (refused.code, refused.json()["rejected_by"]) == ("invalid_state", [shared.other.user["id"]])
    approved = await shared.act(review["id"], "approve")
    assert (approved.status, approved.json()["reviewers"][0]["state"]) == (200, "approved")


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_only_admins_release_a_review_from_a_required_reviewer_who_asked_for_changes(shared: Desk) -> None:
    required = {"user_id": shared.other.user["id"].upper(), "required": True}
    review = await shared.opened(reviewers=[required])
    path = f"/code-reviews/{review['id']}"
    assert (await shared.member.patch(path, {"reviewers": []})).status == 200  # nobody has objected yet
    assert (await shared.member.patch(path, {"reviewers": [required]})).status == 200
    await shared.act(review["id"], "request-changes")
    await shared.member.post(f"{path}/revisions", {"patch": patch_of("2")})
    for reviewers in ([], [{**required, "required": False}], [{"user_id": shared.member.user["id"], "required": True}]):
        refused = await shared.member.patch(path, {"reviewers": reviewers})
        assert (refused.status, refused.code) == (403, "forbidden"), refused
    kept = await shared.member.patch(path, {"reviewers": [{"user_id": shared.member.user["id"]}, required]})
    assert [each["state"] for each in kept.json()["reviewers"]] == ["pending", "rejected"]
    assert (await shared.act(review["id"], "approve", by=shared.member)).code == "invalid_state"
    assert (await shared.admin.patch(path, {"reviewers": []})).status == 200
    assert (await shared.act(review["id"], "approve", by=shared.member)).status == 200


@pytest.mark.one_engine
@pytest.mark.parametrize("case", ["nobody", "both", "unknown", "twice", "author", "required agent"])
@on_the_loop_of_the_module
async def test_reviewers_that_make_no_sense_are_refused(shared: Desk, case: str) -> None:
    other, agent = {"user_id": shared.other.user["id"]}, {"agent_id": await shared.agent(f"second {case}")}
    cases: dict[str, list[dict[str, Any]]] = {
        "nobody": [{}],
        "both": [{**other, **agent}],
        "unknown": [{"user_id": shared.agent_id}],
        "twice": [other, other],
        "author": [{"agent_id": shared.agent_id}],
        "required agent": [{**agent, "required": True}],
    }
    body = {"title": "x", "agent_id": shared.agent_id, "patch": patch_of("2"), "reviewers": cases[case]}
    answer = await shared.member.post("/code-reviews", body)
    assert (answer.status, answer.json()["errors"][0]["pointer"].split("/")[1]) == (422, "reviewers"), answer


# -- tasks


@pytest.mark.one_engine
async def test_a_result_that_breaks_its_schema_is_not_reviewed(desk: Desk) -> None:
    task_id = await desk.task(review_policy=HUMAN, output_schema={"type": "object", "required": ["m"]})
    task = await desk.diff(await desk.worker.run())
    assert (task["id"], task["review_id"], task["error"]["type"]) == (task_id, None, "schema_mismatch")
    assert (await desk.member.get("/code-reviews")).json()["items"] == []


@pytest.mark.one_engine
async def test_without_a_policy_or_a_diff_a_task_completes(desk: Desk) -> None:
    await desk.task()
    assert (await desk.diff(await desk.worker.run()))["status"] == "completed"
    await desk.task(review_policy=HUMAN)
    lease = await desk.worker.run()
    assert (await lease.ok("complete", {"result": 1}))["status"] == "completed"


@pytest.mark.one_engine
async def test_a_run_ends_with_one_diff_because_people_would_not_read_the_second(desk: Desk) -> None:
    await desk.task(review_policy=HUMAN)
    lease = await desk.worker.run()
    diffs = [{"name": name, "type": "diff", "patch": patch_of(name)} for name in ("one", "two")]
    answer = await lease.call("complete", {"result": None, "artifacts": diffs})
    assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, "/artifacts/1"), answer


@pytest.mark.one_engine
async def test_a_patch_that_no_review_keeps_must_be_small(desk: Desk) -> None:
    await desk.task()
    lease = await desk.worker.run()
    artifact = {"name": "d", "type": "diff", "patch": patch_of("x" * 70_000)}
    answer = await lease.call("complete", {"result": 1, "artifacts": [artifact]})
    assert (answer.status, answer.json()["errors"][0]["code"]) == (422, "too_long")


@pytest.mark.one_engine
async def test_the_policy_of_the_agent_applies_unless_the_task_has_its_own(desk: Desk) -> None:
    answer = await desk.member.patch(f"/agents/{desk.agent_id}", {"review_policy": HUMAN})
    assert answer.json()["review_policy"] == {"mode": "human", "reviewer_agent_id": None}
    await desk.task()
    assert (await desk.diff(await desk.worker.run()))["status"] == "waiting"
    await desk.task(review_policy={"mode": "none"})
    assert (await desk.diff(await desk.worker.run()))["status"] == "completed"


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("policy", "pointer"),
    [
        ({"mode": "agent"}, "/review_policy/reviewer_agent_id"),
        ({"mode": "human", "reviewer_agent_id": "self"}, "/review_policy/reviewer_agent_id"),
        ({"mode": "agent", "reviewer_agent_id": "self"}, "/review_policy/reviewer_agent_id"),
        (
            {"mode": "agent", "reviewer_agent_id": "01890000-0000-7000-8000-000000000000"},
            "/review_policy/reviewer_agent_id",
        ),
    ],
)
@on_the_loop_of_the_module
async def test_policies_without_a_possible_reviewer_are_refused(shared: Desk, policy: Any, pointer: str) -> None:
    given = {**policy, **({"reviewer_agent_id": shared.agent_id} if policy.get("reviewer_agent_id") == "self" else {})}
    task = {"title": "x", "agent_id": shared.agent_id, "review_policy": given}
    answers = [
        await shared.member.post("/tasks", task),
        await shared.member.patch(f"/agents/{shared.agent_id}", {"review_policy": given}),
    ]
    assert [(each.status, each.json()["errors"][0]["pointer"]) for each in answers] == [(422, pointer)] * 2


@pytest.mark.one_engine
async def test_a_second_diff_of_a_task_supersedes_the_first_and_the_task_waits_for_it(desk: Desk) -> None:
    task_id, first = await desk.waiting()
    second = await desk.opened(task_id=task_id, patch=patch_of("2"))
    assert (await desk.review(first))["status"] == "superseded"
    task = await desk.read(task_id)
    assert (task["status"], task["review_id"], task["waiting_for"]["id"]) == ("waiting", second["id"], second["id"])
    assert (await desk.act(first, "approve")).json()["current_status"] == "superseded"
    assert (await desk.act(second["id"], "approve")).status == 200
    assert (await desk.read(task_id))["status"] == "completed"


@pytest.mark.one_engine
async def test_a_withdrawn_review_fails_its_task(desk: Desk) -> None:
    task_id, review_id = await desk.waiting()
    assert (await desk.act(review_id, "cancel")).status == 403
    assert (await desk.act(review_id, "cancel", by=desk.member)).json()["status"] == "cancelled"
    assert (await desk.read(task_id))["error"]["kind"] == "rejected"


@pytest.mark.one_engine
@pytest.mark.parametrize("how", ["cancel", "complete", "fail"])
async def test_a_task_that_ends_otherwise_cancels_its_review(desk: Desk, how: str) -> None:
    task_id, review_id = await desk.waiting()
    body = {"complete": {"result": None}, "fail": {"error": {"type": "x", "message": ""}}}.get(how, {})
    assert (await desk.member.post(f"/tasks/{task_id}/{how}", body)).status == 200
    assert (await desk.review(review_id))["status"] == "cancelled"
    assert (await desk.member.delete(f"/tasks/{task_id}")).status == 204
    assert (await desk.review(review_id))["task_id"] == task_id


async def test_a_cancelled_task_cancels_reviews_that_it_does_not_wait_for(desk: Desk) -> None:
    task_id = await desk.task()
    review = await desk.opened(task_id=task_id)
    await desk.member.post(f"/tasks/{task_id}/cancel", {})
    await desk.kit.run_consumers()
    assert (await desk.review(review["id"]))["status"] == "cancelled"


@pytest.mark.one_engine
async def test_an_agent_that_ends_without_a_new_revision_ends_the_review(desk: Desk) -> None:
    task_id, review_id = await desk.waiting()
    await desk.act(review_id, "request-changes")
    lease = await desk.worker.run()
    await lease.ok("complete", {"result": 2})
    assert (await desk.read(task_id))["status"] == "completed"
    assert (await desk.review(review_id))["status"] == "cancelled"


@pytest.mark.parametrize("end", ["no diff", "the same diff", "another diff"])
async def test_people_who_send_a_diff_back_while_the_run_goes_on_are_heard(desk: Desk, end: str) -> None:
    """The run knows nothing of it. Only another diff may be an answer; otherwise the task runs again."""
    task_id = await desk.task(review_policy=HUMAN)
    lease = await desk.worker.run()
    agent = Client(desk.kit.application.app, lease.claim["agent_token"])
    body = {"title": "Mine", "agent_id": desk.agent_id, "task_id": task_id, "patch": patch_of("2")}
    review_id = (await agent.post("/code-reviews", body)).json()["id"]
    await desk.comment(review_id, "Which two?", file="x.py", line=2)
    assert (await desk.act(review_id, "request-changes", {"reason": "See there."})).status == 200
    match end:
        case "no diff":
            await lease.ok("complete", {"result": 1})
        case "the same diff":
            await desk.diff(lease, patch_of("2"))
        case _:
            await desk.diff(lease, patch_of("II"))
            review = await desk.review(review_id)
            assert ((await desk.read(task_id))["status"], review["status"], review["revision"]) == (
                "waiting",
                "pending",
                2,
            )
            return
    assert (await desk.read(task_id))["status"] == "pending"
    again = await desk.worker.run()
    batch = again.claim["resume"]["review"]
    assert (batch["id"], batch["reason"], batch["round"]) == (review_id, "See there.", 1)
    assert [each["body"] for each in batch["comments"]] == ["Which two?"]
    await desk.diff(again, patch_of("II"))
    assert (await desk.review(review_id))["revision"] == 2
    assert (await desk.act(review_id, "approve")).status == 200
    assert (await desk.read(task_id))["status"] == "completed"


@pytest.mark.one_engine
async def test_a_diff_that_is_sent_back_twice_during_a_run_is_sent_back_again(desk: Desk) -> None:
    """The run was told of the first decision, and not of the second."""
    task_id, review_id = await desk.waiting()
    await desk.act(review_id, "request-changes", {"reason": "first"})
    lease = await desk.worker.run()
    agent = Client(desk.kit.application.app, lease.claim["agent_token"])
    revised = await agent.post(f"/code-reviews/{review_id}/revisions", {"patch": patch_of("2")})
    assert revised.status == 200, revised
    await desk.act(review_id, "request-changes", {"reason": "second"})
    await lease.ok("complete", {"result": 1})
    assert (await desk.worker.run()).claim["resume"]["review"]["reason"] == "second"
    assert (await desk.read(task_id))["status"] == "running"


@pytest.mark.one_engine
async def test_the_run_that_follows_has_the_whole_time_limit(desk: Desk) -> None:
    await desk.task(review_policy=HUMAN, timeout_seconds=100)
    lease = await desk.worker.run()
    clock.travel(90)  # no time limit is looked at before the run ends
    review_id = (await desk.diff(lease))["review_id"]
    await desk.act(review_id, "request-changes")
    again = await desk.worker.run()
    for _ in range(3):
        await desk.pass_time(20)
        assert (await again.call("progress", {})).status == 200


@pytest.mark.one_engine
async def test_a_repeated_completion_gets_the_same_answer(desk: Desk) -> None:
    await desk.task(review_policy=HUMAN)
    lease = await desk.worker.run()
    first = await desk.diff(lease)
    assert (await desk.diff(lease))["review_id"] == first["review_id"]
    assert (await desk.member.get("/code-reviews")).json()["total"] == 1


# -- agents


@pytest.mark.one_engine
async def test_an_agent_opens_and_revises_reviews_of_its_own_task_only(desk: Desk) -> None:
    task_id = await desk.task()
    lease = await desk.worker.run()
    agent = Client(desk.kit.application.app, lease.claim["agent_token"])
    body = {"title": "Mine", "agent_id": desk.agent_id, "task_id": task_id, "patch": patch_of("2")}
    review = await agent.post("/code-reviews", body)
    assert review.status == 201, review
    revised = await agent.post(f"/code-reviews/{review.json()['id']}/revisions", {"patch": patch_of("II")})
    assert (revised.status, revised.json()["revision"]) == (200, 2)
    elsewhere = await desk.task()
    second = await desk.agent("second")
    for change in ({"task_id": elsewhere}, {"agent_id": second}):
        assert (await agent.post("/code-reviews", {**body, **change})).status == 403
    assert (await agent.post(f"/code-reviews/{review.json()['id']}/approve", {})).status == 403
    person = await desk.opened()
    comment = await desk.comment(person["id"], "From a person.")
    assert (await agent.post(f"/code-reviews/{person['id']}/comments/{comment['id']}/resolve", {})).status == 403
    said = await agent.post(f"/code-reviews/{person['id']}/comment", {"body": "From an agent."})
    assert said.json()["author"] == {"type": "agent", "id": desk.agent_id}


@pytest.mark.one_engine
async def test_an_agent_reviews_but_never_decides(desk: Desk) -> None:
    reviewer = await desk.agent("reviewer")
    task_id = await desk.task(agent_id=desk.agent_id, review_policy={"mode": "agent", "reviewer_agent_id": reviewer})
    review_id = (await desk.diff(await desk.worker.run()))["review_id"]
    lease = await desk.worker.run()
    task = lease.claim["task"]
    assert (task["agent_id"], task["source"]) == (reviewer, {"type": "review", "id": review_id})
    assert (task["input"]["review_id"], task["input"]["patch"]) == (review_id, patch_of("TWO"))
    agent = Client(desk.kit.application.app, lease.claim["agent_token"])
    finding = {"body": "Unclear.", "file": "x.py", "line": 2, "severity": "issue"}
    assert (await agent.post(f"/code-reviews/{review_id}/comment", finding)).status == 201
    review = await desk.review(review_id)
    assert [(each["agent_id"], each["state"]) for each in review["reviewers"]] == [(reviewer, "commented")]
    assert (review["status"], (await desk.read(task_id))["status"]) == ("pending", "waiting")


@pytest.mark.one_engine
async def test_the_reviewer_of_the_policy_is_asked_for_a_diff_that_was_proposed_before_the_end(desk: Desk) -> None:
    reviewer = await desk.agent("reviewer")
    policy = {"mode": "agent", "reviewer_agent_id": reviewer}
    task_id = await desk.task(agent_id=desk.agent_id, review_policy=policy)
    lease = await desk.worker.run()
    agent = Client(desk.kit.application.app, lease.claim["agent_token"])
    body = {"title": "Mine", "agent_id": desk.agent_id, "task_id": task_id, "patch": patch_of("2")}
    review_id = (await agent.post("/code-reviews", body)).json()["id"]
    await lease.ok("complete", {"result": 1})
    (asked,) = await desk.worker.claim_all(max_tasks=4)
    assert (asked.claim["task"]["agent_id"], asked.claim["task"]["input"]["review_id"]) == (reviewer, review_id)
    assert [each["agent_id"] for each in (await desk.review(review_id))["reviewers"]] == [reviewer]


@pytest.mark.one_engine
async def test_an_agent_that_becomes_a_reviewer_is_asked_once(desk: Desk) -> None:
    reviewer, other = await desk.agent("reviewer"), {"user_id": desk.other.user["id"]}
    review = await desk.opened(reviewers=[other])
    for reviewers in ([other, {"agent_id": reviewer}], [{"agent_id": reviewer}]):
        changed = await desk.member.patch(f"/code-reviews/{review['id']}", {"reviewers": reviewers})
        assert changed.status == 200, changed
    (asked,) = await desk.worker.claim_all(max_tasks=4)
    task = asked.claim["task"]
    assert (task["agent_id"], task["input"]["review_id"]) == (reviewer, review["id"])
    assert task["input"]["patch"] == patch_of("TWO")


@pytest.mark.one_engine
async def test_a_review_whose_task_was_deleted_is_still_commented_and_decided(desk: Desk) -> None:
    task_id = await desk.task()
    review = await desk.opened(task_id=task_id)
    await desk.member.post(f"/tasks/{task_id}/complete", {"result": None})
    assert (await desk.member.delete(f"/tasks/{task_id}")).status == 204
    await desk.kit.run_consumers()
    assert (await desk.comment(review["id"], "Hm.", file="x.py", line=2))["anchor"] == "active"
    assert (await desk.act(review["id"], "request-changes")).status == 200
    revised = await desk.member.post(f"/code-reviews/{review['id']}/revisions", {"patch": patch_of("2")})
    assert revised.status == 200, revised
    assert (await desk.act(review["id"], "approve")).status == 200


# -- contents


@pytest.mark.one_engine
async def test_a_credential_in_a_patch_is_replaced_and_stops_the_approval(desk: Desk) -> None:
    value = "correct-horse-battery-staple-42"
    assert desk.kit.kernel.redactor.set_values("vault", {"password": value}) == []
    review = await desk.opened(patch=patch_of(f"password = '{value}'"))
    diff = await desk.member.get(f"/code-reviews/{review['id']}/diff")
    assert value.encode() not in diff.body
    assert b"[redacted]" in diff.body
    (comment,) = review["comments"]
    assert (comment["author"]["type"], comment["severity"], review["open_blockers"]) == ("system", "blocker", 1)
    assert "lines of the diff: 7" in comment["body"]
    await desk.task(review_policy=HUMAN)
    task = await desk.diff(await desk.worker.run(), patch_of(f"password = '{value}'"))
    assert (await desk.review(task["review_id"]))["open_blockers"] == 1


@pytest.mark.one_engine
async def test_a_patch_comes_from_a_file_too(desk: Desk) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="d.patch"\r\n\r\n' + (
        patch_of("2").encode() + b"\r\n--b--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    uploaded = await desk.member.post("/files/upload", content=form, headers=headers)
    assert uploaded.status == 201, uploaded
    body = {"title": "x", "agent_id": desk.agent_id, "file_id": uploaded.json()["id"]}
    review = await desk.member.post("/code-reviews", body)
    assert (review.status, review.json()["patch_sha256"]) == (201, uploaded.json()["sha256"])
    assert (await desk.other.post("/code-reviews", body)).code == "unknown_reference"
    both = await desk.member.post("/code-reviews", {**body, "patch": patch_of("2")})
    assert (both.status, both.json()["errors"][0]["pointer"]) == (422, "/patch")
    unknown = await desk.member.post(f"/code-reviews/{review.json()['id']}/revisions", {"file_id": desk.agent_id})
    documented = (await desk.kit.client.get("/openapi.json")).json()["paths"]["/api/v1/code-reviews/{id}/revisions"]
    assert (unknown.status, unknown.code) == (422, "unknown_reference")
    assert "unknown_reference" in documented["post"]["responses"]["422"]["$ref"]


@pytest.mark.one_engine
async def test_revisions_can_be_downloaded_and_compared(desk: Desk) -> None:
    review = await desk.opened()
    path = f"/code-reviews/{review['id']}"
    revised = await desk.member.post(f"{path}/revisions", {"patch": patch_of("2"), "note": "Shorter."})
    first, second = revised.json()["revisions"]
    assert (first["revision"], first["patch_sha256"], first["note"]) == (1, review["patch_sha256"], "")
    assert (second["revision"], second["patch_sha256"]) == (2, revised.json()["patch_sha256"])
    assert (second["note"], second["created_by"]) == ("Shorter.", desk.member.user["id"])
    assert (await desk.member.get(f"{path}/diff?revision=1")).body == patch_of("TWO").encode()
    assert (await desk.member.get(f"{path}/diff")).body == patch_of("2").encode()
    compared = (await desk.member.get(f"{path}/diff?against=1")).body.decode()
    assert "-TWO\n+2\n" in compared
    assert " one\n" in compared
    for query in ("revision=3", "against=3", "revision=3&against=1"):
        assert (await desk.member.get(f"{path}/diff?{query}")).status == 404


async def test_lists_have_filters(desk: Desk) -> None:
    task_id = await desk.task()
    mine = {"user_id": desk.other.user["id"]}
    first, second = await desk.opened(title="First"), await desk.opened(task_id=task_id, reviewers=[mine])
    await desk.act(first["id"], "approve")

    async def listed(query: str) -> list[str]:
        answer = await desk.other.get(f"/code-reviews?{query}")
        assert answer.status == 200, answer
        assert not {"files", "comments"} & answer.json()["items"][0].keys() if answer.json()["items"] else True
        return [item["id"] for item in answer.json()["items"]]

    assert await listed("") == [second["id"], first["id"]]
    assert await listed("status=approved") == [first["id"]]
    assert await listed("status=approved&status=pending") == [second["id"], first["id"]]
    assert await listed("reviewer=me") == [second["id"]]
    assert await listed(f"reviewer={desk.member.user['id']}") == []
    assert await listed(f"task_id={task_id}") == [second["id"]]
    assert await listed("search=irst") == [first["id"]]
    assert await listed(f"agent_id={task_id}") == []


async def test_reminders_are_sent_once_a_day(desk: Desk) -> None:
    review = await desk.opened()

    async def reminders() -> int:
        await desk.kit.run_schedule("code_reviews.remind")
        found = [event for event in await desk.kit.events() if event.type == "code_review.updated"]
        return len([event for event in found if event.payload()["change"] == "reminder"])

    assert await reminders() == 0
    clock.travel(86_401)
    assert [await reminders(), await reminders()] == [1, 1]
    clock.travel(86_401)
    await desk.act(review["id"], "approve", by=await desk.kit.as_user("member"))
    assert await reminders() == 1


async def test_a_newer_review_of_the_task_keeps_the_required_reviewers_who_asked_for_changes(desk: Desk) -> None:
    task_id, review_id = await desk.waiting()
    required = {"user_id": desk.other.user["id"], "required": True}
    idle = {"user_id": desk.admin.user["id"], "required": True}
    path = f"/code-reviews/{review_id}"
    assert (await desk.member.patch(path, {"reviewers": [required, idle]})).status == 200
    assert (await desk.act(review_id, "request-changes")).status == 200
    lease = await desk.worker.run()
    agent = Client(desk.kit.application.app, lease.claim["agent_token"])
    for reviewers in ([], [{**required, "required": False}]):
        newer = await desk.opened(agent, task_id=task_id, patch=patch_of("3"), reviewers=reviewers)
        assert [(each["user_id"], each["required"], each["state"]) for each in newer["reviewers"]] == [
            (desk.other.user["id"], True, "rejected")
        ]
        assert (await desk.act(newer["id"], "approve", by=desk.member)).code == "invalid_state"
    assert (await desk.act(newer["id"], "approve")).status == 200
