"""People and their rights. The numbers are those of "Done when" of the page on administration.

The rest of 4 and 5 is in `test_effects.py`; 6 is with the mails, in `tests/kernel/mail/test_registration.py`. Of 5 the
conversations and private files wait for the plugins `chat` and `files`, workflows for `workflows`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from corral.testing.kit import PASSWORD, Client, Kit

NEW = {"email": "New@Example.org", "password": "a fine long passphrase", "full_name": "New Person"}


async def make(make_kit: Callable[..., Any], **options: Any) -> tuple[Kit, Client]:
    kit: Kit = await make_kit(**options)
    return kit, await kit.as_user("admin")


async def test_admin_1_a_created_user_signs_in_with_the_given_role(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    made = await admin.post("/admin/users", {**NEW, "role": "viewer"})
    assert made.status == 201, made
    assert made.headers["location"].endswith(made.json()["id"])
    client = await kit.sign_in("new@example.org", NEW["password"])
    assert (await client.get("/auth/me")).json()["role"] == "viewer"
    assert (await admin.post("/admin/users", {**NEW, "email": "NEW@example.org"})).code == "duplicate"
    assert (
        await admin.post("/admin/users", {**NEW, "email": "x@example.org", "password": "short"})
    ).code == "weak_password"


async def test_admin_1_must_change_password_comes_first(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    await admin.post("/admin/users", {**NEW, "must_change_password": True})
    client = await kit.sign_in("new@example.org", NEW["password"])
    assert (await client.get("/tasks")).code == "password_change_required"
    same = {"current_password": NEW["password"], "new_password": NEW["password"]}
    refused = await client.post("/auth/change-password", same)
    assert (refused.code, refused.json()["errors"][0]["code"]) == ("weak_password", "core.reused")
    changed = await client.post(
        "/auth/change-password", {"current_password": NEW["password"], "new_password": "another long passphrase"}
    )
    assert changed.status == 200, changed
    client.token = changed.json()["access_token"]
    assert (await client.get("/tasks")).status == 200


async def test_admin_2_parallel_demotions_leave_an_admin(kit: Kit) -> None:
    admins = [await kit.as_user("admin") for _ in range(4)]
    pairs = [(admins[i], admins[(i + 1) % 4].user["id"]) for i in range(4)]
    await asyncio.gather(
        *[
            who.patch(f"/admin/users/{whom}", {"role": "member"} if i % 2 else {"is_active": False})
            for i, (who, whom) in enumerate(pairs)
        ]
    )
    from corral_core.accounts.api import Accounts

    accounts: Any = kit.kernel.container.get(Accounts)
    counts = await kit.kernel.database.work(accounts.count_by_role, read=True)
    assert counts.get(("admin", True), 0) >= 1


async def test_admin_3_members_are_kept_out_and_the_last_admin_stays(kit: Kit) -> None:
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    calls: list[tuple[str, str, Any]] = [
        ("GET", "/admin/users", None),
        ("POST", "/admin/users", NEW),
        ("GET", f"/admin/users/{member.user['id']}", None),
        ("PATCH", f"/admin/users/{member.user['id']}", {"role": "admin"}),
        ("GET", "/admin/kill-switch", None),
        ("POST", f"/admin/users/{member.user['id']}/unlock", None),
        ("POST", f"/admin/users/{member.user['id']}/reset-password", None),
        ("POST", f"/admin/users/{member.user['id']}/reset-mfa", None),
        ("GET", "/admin/invitations", None),
        ("POST", "/admin/invitations", {"email": "x@example.org"}),
        ("DELETE", f"/admin/invitations/{member.user['id']}", None),
        ("POST", "/admin/kill-switch", {"engaged": True, "reason": "x"}),
    ]
    for method, path, body in calls:
        assert (await member.request(method, path, body)).code == "forbidden", path
    query = f"/admin/audit?outcome=denied&actor={member.user['id']}&limit=200"
    denied = (await admin.get(query)).json()["items"]
    assert len(denied) == len(calls), [row["details"] for row in denied]  # each one is on record
    for body in ({"role": "admin"}, {"is_active": True}):
        assert (await member.put("/auth/me", body)).status == 422
    own = f"/admin/users/{admin.user['id']}"
    assert (await admin.patch(own, {"role": "member"})).code == "last_admin"
    assert (await admin.patch(own, {"is_active": False})).code == "last_admin"


async def test_deactivation_ends_everything_at_once(kit: Kit) -> None:
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    path = f"/admin/users/{member.user['id']}"
    answer = await admin.patch(path, {"is_active": False})
    assert (answer.status, answer.json()["is_active"]) == (200, False)
    assert (await member.get("/auth/me")).status == 401
    assert (await kit.client.post("/auth/login", {"email": member.user["email"], "password": PASSWORD})).status == 401
    assert (await admin.patch(path, {"is_active": True})).status == 200
    assert (await kit.sign_in(member.user["email"])).token


async def test_the_list_filters_and_pages(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    for _ in range(5):
        await kit.as_user("viewer")
    assert (await admin.get("/admin/users?role=viewer&limit=2")).json()["total"] == 5
    assert (await admin.get("/admin/users?search=ADMIN1@")).json()["items"][0]["id"] == admin.user["id"]
    assert (await admin.get("/admin/users?role=emperor")).status == 422


async def test_admin_4_the_switch_stops_claims_and_release_resumes(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    assert (await admin.post("/admin/kill-switch", {"engaged": True})).status == 422
    engaged = await admin.post("/admin/kill-switch", {"engaged": True, "reason": "a drill"})
    assert engaged.json()["engaged"] is True
    agent = (await admin.post("/agents", {"name": "a"})).json()
    assert (await admin.post(f"/agents/{agent['id']}/start")).code == "kill_switch"
    released = await admin.post("/admin/kill-switch", {"engaged": False})
    assert released.json()["engaged"] is False
    assert (await admin.post(f"/agents/{agent['id']}/start")).status == 200
    kinds = [event.payload()["kind"] for event in await kit.events() if event.type == "system.alert"]
    assert kinds == ["kill_switch", "kill_switch"]
