"""The address that GitHub calls: signatures, replays, and many deliveries at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ALLOWED, PLUGINS, World, on_the_loop_of_the_module, signature
from corral_github.models import Delivery
from corral_github.plugin import GitHubPlugin
from corral_github.service import ingress
from recorded_github import RecordedGitHub, recorded

from corral.http.routes import Rate

UNKNOWN = "01890a5d-ac96-774b-bcce-b302099a8057"


@on_the_loop_of_the_module
@pytest.mark.one_engine
async def test_a_delivery_without_the_right_signature_is_refused_and_leaves_nothing(world: World) -> None:
    payload = recorded("issues_labeled")
    content = json.dumps(payload).encode()
    wrong = (
        signature(content, "another secret"),
        signature(content + b" "),
        signature(content).removeprefix("sha256="),
        "sha1=6dcb09b5b57875f334f61aebed695e2e4193db5e",
        "sha256=",
        "",
    )
    answers = [await world.deliver("issues", payload, X_Hub_Signature_256=each) for each in wrong]
    own, world.repository_id = world.repository_id, UNKNOWN
    answers.append(await world.deliver("issues", payload))
    world.repository_id = own
    assert {(answer.status, answer.code) for answer in answers} == {(401, "github.invalid_signature")}
    assert len({answer.json()["detail"] for answer in answers}) == 1  # nothing tells what was wrong
    assert await world.listed("deliveries") == []
    assert (await world.deliver("issues", payload)).status == 202


@pytest.mark.one_engine
async def test_deliveries_without_the_right_signature_do_not_use_up_the_limit(
    make_kit: Callable[..., Any], github: RecordedGitHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = await make_kit(plugins=[*PLUGINS, GitHubPlugin], config={**ALLOWED, "rate_limits": True})
    world = await World(kit, github).build()
    monkeypatch.setattr(ingress, "DELIVERIES", Rate("github delivery", 2, 3600, "key"))
    monkeypatch.setattr(ingress, "UNSIGNED", Rate("unsigned github delivery", 3, 3600, "key"))
    forged = [await world.deliver("ping", {}, X_Hub_Signature_256="sha256=") for _ in range(4)]
    signed = [await world.deliver("ping", recorded("ping") | {"n": number}) for number in range(3)]
    assert [answer.status for answer in (*forged, *signed)] == [401, 401, 401, 429, 202, 202, 429]


@on_the_loop_of_the_module
async def test_a_replayed_delivery_does_nothing_whatever_its_id(world: World) -> None:
    payload = recorded("issues_labeled")
    first = await world.deliver("issues", payload, id="d-1")
    again = await world.deliver("issues", payload, id="d-1")
    renamed = await world.deliver("issues", payload, id="d-2")
    assert [answer.status for answer in (first, again, renamed)] == [202, 200, 200]
    assert {answer.json()["id"] for answer in (first, again, renamed)} == {first.json()["id"]}
    assert [answer.json()["duplicate"] for answer in (first, again, renamed)] == [False, True, True]
    reused = await world.deliver("issues", payload | {"action": "opened"}, id="d-1")
    assert (reused.status, reused.code) == (409, "github.delivery_reused")
    await world.settle()
    assert len(await world.tasks()) == 1


@on_the_loop_of_the_module
async def test_a_delivery_whose_first_copy_is_deleted_meanwhile_is_stored(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = recorded("ping")
    first = await world.deliver("ping", payload, id="d-1")
    look_up = ingress._receipt_of_duplicate

    def look_up_too_late(*arguments: Any) -> Any:  # the row is old, or its repository was disconnected
        Delivery.delete().execute()
        return look_up(*arguments)

    monkeypatch.setattr(ingress, "_receipt_of_duplicate", look_up_too_late)
    again = await world.deliver("ping", payload, id="d-1")
    assert (again.status, again.json()["duplicate"]) == (202, False)
    assert [each["id"] for each in await world.listed("deliveries")] == [again.json()["id"]] != [first.json()["id"]]


@on_the_loop_of_the_module
async def test_100_deliveries_at_once_are_all_accepted_and_each_is_handled_once(world: World) -> None:
    answers = await asyncio.gather(*[world.issue(number) for number in range(1, 101)])
    assert {answer.status for answer in answers} == {202}
    await world.settle()
    tasks = await world.tasks()
    assert len({task["title"] for task in tasks}) == len(tasks) == 100
    assert (await world.repository())["waiting"] == 0


@on_the_loop_of_the_module
@pytest.mark.one_engine
async def test_what_starts_no_work_is_accepted_and_ignored(world: World) -> None:
    other = recorded("issues_labeled")
    other["repository"] = other["repository"] | {"full_name": "octo/other"}
    unlabelled = recorded("issues_labeled") | {"label": {"name": "bug"}}
    answers = [
        await world.deliver("ping", recorded("ping")),
        await world.deliver("issues", other),
        await world.deliver("issues", unlabelled),
        await world.deliver("issues", recorded("issues_labeled") | {"action": "deleted"}),
        await world.deliver("star", {"action": "created"}),
    ]
    assert {(answer.status, answer.json()["status"]) for answer in answers} == {(202, "ignored")}
    await world.settle()
    assert await world.tasks() == []
    assert world.github.requests == []


@on_the_loop_of_the_module
@pytest.mark.one_engine
async def test_unusable_deliveries_are_refused(world: World) -> None:
    payload = recorded("issues_labeled")
    form = await world.deliver("issues", payload, Content_Type="application/x-www-form-urlencoded")
    assert (form.status, form.code) == (415, "unsupported_media_type")
    unnamed = await world.deliver("", payload)
    assert (unnamed.status, unnamed.code) == (400, "malformed_request")
    empty = await world.deliver("issues", {**payload, "issue": None})
    assert (empty.status, empty.code) == (400, "malformed_request")
    content = json.dumps({"padding": "x" * 2 * 1024 * 1024}).encode()
    large = await world.kit.client.post(f"/github/hooks/{world.repository_id}", content=content)
    assert large.status == 413


@on_the_loop_of_the_module
async def test_only_members_see_repositories_and_what_was_delivered(world: World) -> None:
    await world.review()
    paths = ["/github/repositories", *(f"/github/repositories/{world.repository_id}{each}" for each in ("", "/posts"))]
    paths.append(f"/github/repositories/{world.repository_id}/deliveries")
    auditor, viewer = await world.kit.as_user("auditor"), await world.kit.as_user("viewer")
    for path in paths:
        assert (await world.kit.client.get(path)).status == 401
        assert (await auditor.get(path)).status == 403
        shown = await viewer.get(path)
        assert shown.status == 200
        assert b"secret-of-the-webhook" not in shown.body
    for caller in (world.member, viewer):
        assert (await caller.post("/github/repositories", {})).status == 403
        assert (await caller.delete(paths[1])).status == 403
        assert (await caller.post(f"{paths[1]}/retry")).status == 403
