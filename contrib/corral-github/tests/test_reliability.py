"""Nothing is lost and nothing is posted twice: hosts that are down, rate limits, crashes, several processes, rights."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ALLOWED, PLUGINS, World, serving, signature
from corral_github.models import Delivery, Repository, Thread
from corral_github.plugin import GitHubPlugin
from corral_github.service import pull_requests, repositories
from corral_github.service.work_queue import LEASE_SECONDS, WORK_JOB
from recorded_github import TOKEN, WEBHOOK_SECRET, RecordedGitHub, recorded

from corral import clock
from corral.jobs.job import enqueue
from corral.testing.kit import Client, Kit, make_kernel
from corral.testing.server import PASSWORD


@pytest.fixture
async def world(make_kit: Callable[..., Any], github: RecordedGitHub) -> World:
    """A world on a kernel of its own: these tests move the clock far, and leave work behind."""
    return await World(await make_kit(plugins=[*PLUGINS, GitHubPlugin], config=ALLOWED), github).build()


async def test_a_host_that_is_down_for_an_hour_gets_everything_once(world: World) -> None:
    review = await world.review()
    world.github.is_down = True
    await world.decide(review["id"], "request-changes", reason="First.")
    await world.issue()
    world.github.head_sha = "c" * 40
    await world.pull("synchronize")
    for _ in range(60):
        clock.travel(60)
        await world.kit.run_schedule("github.resume")
        await world.kit.run_jobs()
    asked = len(world.github.requests)
    assert asked < 40  # the pauses become longer
    assert world.github.posts == []
    member = await world.kit.as_user("member")
    shown = (await member.get(f"/github/repositories/{world.repository_id}")).json()
    assert "503" in shown["last_error"]
    assert shown["waiting"] == 1
    alerts = [event for event in await world.kit.events() if event.type == "system.alert"]
    assert 1 <= len([each for each in alerts if each.payload()["kind"] == "github_unreachable"]) <= 2

    world.github.is_down = False
    clock.travel(900)
    await world.kit.run_schedule("github.resume")
    await world.kit.run_jobs()
    assert [each["event"] for each in world.github.reviews] == ["REQUEST_CHANGES"]
    shown = (await member.get(f"/github/repositories/{world.repository_id}")).json()
    assert (shown["last_error"], shown["waiting"]) == (None, 0)


@pytest.mark.one_engine
@pytest.mark.parametrize("status", [403, 429])
async def test_a_rate_limit_pauses_all_requests_of_the_repository(world: World, status: int) -> None:
    review = await world.review()
    reset = str(int(clock.time_s()) + 600)
    limited = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset} if status == 403 else {"Retry-After": "600"}
    world.github.refusals = [(status, limited)]
    await world.decide(review["id"], "approve")
    asked = len(world.github.requests)
    assert (await world.repository())["paused_until"] is not None
    world.github.head_sha = "c" * 40
    await world.pull("synchronize")
    clock.travel(580)
    await world.kit.run_schedule("github.resume")
    await world.kit.run_jobs()
    assert len(world.github.requests) == asked
    clock.travel(30)
    await world.kit.run_schedule("github.resume")
    await world.kit.run_jobs()
    assert [each["event"] for each in world.github.reviews] == ["APPROVE"]


@pytest.mark.parametrize("kind", ["review", "comment"])
async def test_an_answer_that_is_lost_does_not_lead_to_a_second_post(world: World, kind: str) -> None:
    if kind == "review":
        review = await world.review()
        world.github.lose_next = True
        await world.decide(review["id"], "approve")
    else:
        await world.issue()
        await world.settle()
        world.github.lose_next = True
        await world.finish_task(world.author, {"text": "Done."})
    assert [each["status"] for each in await world.listed("posts")] == ["pending"]
    assert len(world.github.posts) == 1
    clock.travel(60)
    assert await world.kit.run_jobs() == 1
    (post,) = await world.listed("posts")
    assert (post["status"], post["attempts"], len(world.github.posts)) == ("posted", 2, 1)
    assert post["url"] == world.github.posts[0]["html_url"]


@pytest.mark.one_engine
async def test_posts_of_a_pull_request_keep_their_order(world: World) -> None:
    review = await world.review()
    world.github.is_down = True
    await world.decide(review["id"], "request-changes", reason="First.")
    answer = await world.member.post(f"/code-reviews/{review['id']}/revisions", {"patch": world.github.diff.decode()})
    assert answer.status == 403  # only the admin for whom the review was opened revises it
    answer = await world.admin.post(f"/code-reviews/{review['id']}/revisions", {"patch": world.github.diff.decode()})
    assert answer.status == 200, answer
    await world.decide(review["id"], "approve")
    world.github.is_down = False
    clock.travel(60)
    await world.kit.run_jobs()
    assert [each["event"] for each in world.github.reviews] == ["REQUEST_CHANGES", "APPROVE"]


async def test_two_processes_post_and_handle_everything_once(
    make_kit: Callable[..., Any], github: RecordedGitHub
) -> None:
    first = await make_kit(plugins=[*PLUGINS, GitHubPlugin], config=ALLOWED)
    second = await make_kit(plugins=[*PLUGINS, GitHubPlugin], config=ALLOWED)
    world = await World(first, github).build()
    for number in range(1, 11):
        payload = recorded("pull_request_opened") | {"number": number}
        payload["pull_request"] = payload["pull_request"] | {"number": number}
        assert (await world.deliver("pull_request", payload)).status == 202
    await _work_on_all_threads_twice(first, second)
    reviews = await world.reviews()
    assert len(reviews) == 10
    for review in reviews:
        assert (await world.member.post(f"/code-reviews/{review['id']}/approve", {})).status == 200
    await first.run_consumers()
    await _work_on_all_threads_twice(first, second)
    assert sorted(each["number"] for each in github.reviews) == list(range(1, 11))


async def _work_on_all_threads_twice(*kits: Kit) -> None:
    """Let every process have a job for each pull request, so that they compete for all of them."""

    def enqueue_all() -> None:
        for row in Thread.select(Thread.id):
            enqueue(WORK_JOB, thread_id=row.id)

    await kits[0].work(enqueue_all)
    await asyncio.gather(*[kit.run_jobs() for kit in kits])


async def test_without_the_rights_of_the_admin_nothing_happens_until_another_admin_takes_over(world: World) -> None:
    review = await world.review()
    other = await world.kit.as_user("admin")
    demoted = await other.patch(f"/admin/users/{world.admin.user['id']}", {"role": "viewer"})
    assert demoted.status == 200, demoted
    asked = len(world.github.requests)
    await world.decide(review["id"], "approve")
    await world.issue()
    world.github.head_sha = "c" * 40
    await world.pull("synchronize")
    await world.settle()
    assert len(world.github.requests) == asked
    assert await world.tasks() == []
    listed = [*await world.listed("deliveries"), *await world.listed("posts")]
    assert sorted(each["status"] for each in listed) == ["done", "failed", "failed", "failed"]
    path = f"/github/repositories/{world.repository_id}"
    assert (await other.patch(path, {"enabled": True})).json()["owner_id"] == other.user["id"]
    assert (await other.post(f"{path}/retry")).json() == {"deliveries": 2, "posts": 1}
    await world.settle()
    assert [each["event"] for each in world.github.reviews] == ["APPROVE"]
    assert len(await world.tasks()) == 1


@pytest.mark.one_engine
async def test_a_token_that_is_replaced_in_the_vault_is_used_for_what_waits(world: World) -> None:
    (token,) = (await world.admin.get(f"/secrets?search={world.token}")).json()["items"]
    changed = await world.admin.post(f"/secrets/{token['id']}/rotate", {"value": "another-token"})
    assert changed.status == 200, changed
    await world.pull()
    await world.settle()
    assert "Bad credentials" in (await world.repository())["last_error"]
    await world.admin.post(f"/secrets/{token['id']}/rotate", {"value": TOKEN})
    answer = await world.admin.post(f"/github/repositories/{world.repository_id}/retry")
    assert answer.status == 200, answer
    await world.settle()
    assert len(await world.reviews()) == 1


async def test_a_disconnected_repository_receives_and_posts_nothing(world: World) -> None:
    review = await world.review()
    assert (await world.admin.delete(f"/github/repositories/{world.repository_id}")).status == 204
    payload = recorded("issues_labeled")
    assert (await world.deliver("issues", payload)).status == 401
    asked = len(world.github.requests)
    await world.decide(review["id"], "approve")
    assert len(world.github.requests) == asked
    secret = (await world.admin.get(f"/secrets?search={world.token}")).json()["items"][0]
    assert (await world.admin.delete(f"/secrets/{secret['id']}")).status == 204  # nothing uses it any more


async def test_a_delivery_that_was_stored_while_its_repository_was_disconnected_is_deleted(world: World) -> None:
    await world.issue()
    await world.kit.work(lambda: Repository.delete().execute())  # it did not see the rows of the delivery
    await world.settle()
    left = await world.kit.work(lambda: (Thread.select().count(), Delivery.select().count()))
    assert left == (0, 0)


@pytest.mark.one_engine
async def test_private_addresses_are_refused(make_kit: Callable[..., Any], github: RecordedGitHub) -> None:
    kit = await make_kit(plugins=[*PLUGINS, GitHubPlugin])
    with pytest.raises(AssertionError, match="url_blocked"):
        await World(kit, github).build()
    assert github.requests == []


def _wait(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


async def test_a_process_that_is_killed_between_the_post_and_its_record_does_not_post_twice(
    tmp_path: Path, github: RecordedGitHub
) -> None:
    await asyncio.to_thread(_killed_while_posting, tmp_path, github)
    assert len(github.reviews) == 1
    plugins = [*PLUGINS, GitHubPlugin]
    url = f"sqlite:///{tmp_path}/corral.db"
    async with make_kernel(tmp_path, plugins=plugins, database_url=url, config=ALLOWED) as kit:
        await kit.run_jobs()
        assert len(github.reviews) == 1  # the lease of the killed process has not ended
        clock.travel(LEASE_SECONDS + 1)
        await kit.run_schedule("github.resume")
        assert await kit.run_jobs() >= 1
        member: Client = await kit.as_user("member")
        (repository,) = (await member.get("/github/repositories")).json()["items"]
        (post,) = (await member.get(f"/github/repositories/{repository['id']}/posts")).json()["items"]
        assert (post["status"], post["attempts"]) == ("posted", 2)
    assert len(github.reviews) == 1


def _killed_while_posting(folder: Path, github: RecordedGitHub) -> None:
    """Run a server that receives a pull request, and kill it while it waits for the answer to its post."""
    with serving(folder, database_url=f"sqlite:///{folder}/corral.db") as server:
        admin = server.sign_in()
        admin.post("/auth/reauth", json={"password": PASSWORD}).raise_for_status()
        for name, value in (("github-token", TOKEN), ("github-webhook", WEBHOOK_SECRET)):
            admin.post("/secrets", json={"name": name, "value": value}).raise_for_status()
        agent = admin.post("/agents", json={"name": "author"}).json()["id"]
        body: dict[str, Any] = {"name": "octo/hello", "api_url": github.url, "agent_id": agent}
        body |= {"token_secret": "github-token", "webhook_secret": "github-webhook"}
        repository = admin.post("/github/repositories", json=body).raise_for_status().json()
        content = json.dumps(recorded("pull_request_opened")).encode()
        headers = {"X-GitHub-Event": "pull_request", "X-GitHub-Delivery": "d-1", "Content-Type": "application/json"}
        headers["X-Hub-Signature-256"] = signature(content)
        hook = f"{server.address}{repository['hook_path']}"
        assert server.client().post(hook, content=content, headers=headers).status_code == 202
        _wait(lambda: admin.get("/code-reviews").json()["items"])
        (review,) = admin.get("/code-reviews").json()["items"]
        github.hold.set()
        admin.post(f"/code-reviews/{review['id']}/approve", json={}).raise_for_status()
        assert github.held.wait(120)
        server.kill()
    github.hold.clear()
    github.go_on.set()


@pytest.mark.one_engine
async def test_an_unexpected_error_is_shown_and_retried_after_longer_and_longer_pauses(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise LookupError("an error of the plugin")

    with monkeypatch.context() as broken:
        broken.setattr(pull_requests.Pull, "of", fail)
        await world.pull()
        for _ in range(10):
            await world.kit.run_schedule("github.resume")
            await world.kit.run_jobs()
            clock.travel(30)
    assert len(world.github.requests) < 8
    assert "LookupError" in (await world.repository())["last_error"]
    alerts = [event for event in await world.kit.events() if event.type == "system.alert"]
    assert "github_unreachable" in [each.payload()["kind"] for each in alerts]
    clock.travel(600)
    await world.settle()
    assert len(await world.kit.work(lambda: list(Thread.select().where(Thread.review_id.is_null(False))))) == 1


async def test_posts_of_a_disabled_repository_wait_until_it_is_enabled(world: World) -> None:
    review = await world.review()
    path, asked = f"/github/repositories/{world.repository_id}", len(world.github.requests)
    assert (await world.admin.patch(path, {"enabled": False})).status == 200
    await world.decide(review["id"], "approve")
    assert len(world.github.requests) == asked
    assert (await world.repository())["waiting"] == 1
    assert (await world.admin.patch(path, {"enabled": True})).status == 200
    await world.settle()
    assert [each["event"] for each in world.github.reviews] == ["APPROVE"]


@pytest.mark.one_engine
async def test_the_kill_switch_holds_posts(world: World) -> None:
    review = await world.review()
    held = {"engaged": True, "mode": "pause", "reason": "a test", "hold_deliveries": True}
    assert (await world.admin.post("/admin/kill-switch", held)).status == 200
    await world.decide(review["id"], "approve")
    assert world.github.reviews == []
    assert (await world.admin.post("/admin/kill-switch", {"engaged": False})).status == 200
    clock.travel(60)
    await world.kit.run_jobs()
    assert [each["event"] for each in world.github.reviews] == ["APPROVE"]


async def test_a_retry_takes_the_newest_of_many_failures(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        await world.issue(number)
    await world.kit.work(lambda: Delivery.update(status="failed").execute())
    monkeypatch.setattr(repositories, "BATCH_SIZE", 1)
    await world.admin.post(f"/github/repositories/{world.repository_id}/retry")
    assert [(each["number"], each["status"]) for each in await world.listed("deliveries")] == [
        (2, "pending"),
        (1, "failed"),
    ]
