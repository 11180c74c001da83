"""What admins do to accounts is `admin.user.*` in the audit log, what their holders do is `auth.*`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pyotp

from corral.testing.kit import PASSWORD, Kit
from corral_core.accounts.api import Accounts

MakeKit = Callable[..., Awaitable[Kit]]
NEW = {"email": "new@example.org", "password": "a rather long phrase", "full_name": "New"}


async def test_of_accounts_admins_and_holders_are_told_apart(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=["admin", "audit"], environ={"CORRAL_REGISTRATION": "open"})
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    before = len((await admin.get("/admin/audit?limit=200")).json()["items"])
    path = f"/admin/users/{member.user['id']}"
    setup = (await member.post("/auth/mfa/setup", {"password": PASSWORD})).json()
    code = {"code": pyotp.TOTP(setup["secret"]).now()}
    assert (await member.post("/auth/mfa/verify", code)).status == 200
    for _ in range(5):
        await kit.client.post("/auth/login", {"email": member.user["email"], "password": "wrong wrong wrong"})
    assert (await member.put("/auth/me", {"full_name": "Mine"})).status == 200
    assert (await admin.put("/auth/me", {"full_name": "My own"})).status == 200
    assert (await kit.client.post("/auth/register", NEW)).status == 201
    assert (await admin.post("/auth/reauth", {"password": PASSWORD})).status == 200
    assert (await admin.post("/admin/users", {**NEW, "email": "made@example.org"})).status == 201
    for request in (
        admin.patch(path, {"full_name": "Theirs"}),
        admin.post(f"{path}/unlock"),
        admin.post(f"{path}/reset-mfa"),
        admin.post(f"{path}/reset-password"),
        admin.patch(path, {"is_active": False}),
        admin.patch(path, {"is_active": True}),
        admin.patch(path, {"is_active": False}),
    ):
        assert (await request).status == 200
    accounts = kit.kernel.container.get(Accounts)
    await kit.kernel.database.work(lambda: accounts.purge(member.user["id"]))
    rows = (await admin.get("/admin/audit?limit=200")).json()["items"][::-1][before:]
    told = [(row["action"], row["actor"]["type"]) for row in rows if row["object"]["type"] == "user"]
    assert [each for each in told if each[0].startswith("admin.")] == [
        ("admin.user.create", "user"),
        ("admin.user.update", "user"),
        ("admin.user.unlock", "user"),
        ("admin.user.reset_mfa", "user"),
        ("admin.user.reset_password", "user"),
        ("admin.user.deactivate", "user"),
        ("admin.user.reactivate", "user"),
        ("admin.user.deactivate", "user"),
        ("admin.user.purge", "system"),
    ]
    assert [action for action, _ in told if action.startswith("auth.user")] == [
        "auth.user.lock",
        "auth.user.update",
        "auth.user.update",
        "auth.user.create",
    ]
    assert (await admin.get("/admin/audit?action=admin.*")).json()["total"] >= 9
