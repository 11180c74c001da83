"""Accounts as a service: the last admin stays, rights that are lost end sessions, a purged account is a tombstone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from playhouse.schema_diff import diff_models

from corral.auth.principal import SYSTEM_PRINCIPAL, Principal
from corral.errors import Conflict, Invalid, NotFound
from corral.testing.kit import Kit
from corral_core.accounts.api import Accounts, InsufficientRights, NewUser, UserPatch, UserQuery, UserView
from corral_core.accounts.models import UserRow

MakeKit = Callable[..., Awaitable[Kit]]


@pytest.fixture
async def kit(make_kit: MakeKit) -> Kit:
    return await make_kit(plugins=[])


def _accounts(kit: Kit) -> Accounts:
    return kit.kernel.container.get(Accounts)


async def _patch(kit: Kit, user_id: str, **patch: Any) -> UserView:
    return await kit.kernel.database.work(lambda: _accounts(kit).update(user_id, UserPatch(**patch)))


async def _admins(kit: Kit) -> int:
    active = (UserRow.role == "admin") & UserRow.is_active
    return await kit.kernel.database.work(lambda: UserRow.select().where(active).count(), read=True)


@pytest.mark.parametrize("patch", [{"role": "member"}, {"is_active": False}])
async def test_the_last_active_admin_stays(kit: Kit, patch: dict[str, Any]) -> None:
    admin = await kit.as_user("admin")
    with pytest.raises(Conflict) as found:
        await _patch(kit, admin.user["id"], **patch)
    assert found.value.code == "last_admin"
    other = await kit.as_user("admin")
    assert not hasattr(await _patch(kit, admin.user["id"], **patch), "password_hash")
    with pytest.raises(Conflict):
        await _patch(kit, other.user["id"], **patch)


async def test_admin_2_admins_who_demote_each_other_leave_one(kit: Kit) -> None:
    for round_ in range(5):
        admins = [await kit.as_user("admin") for _ in range(4)]
        patches = [
            _patch(kit, admin.user["id"], **({"role": "viewer"} if (n + round_) % 2 else {"is_active": False}))
            for n, admin in enumerate(admins)
        ]
        results = await asyncio.gather(*patches, return_exceptions=True)
        refused = [each for each in results if isinstance(each, BaseException)]
        assert [getattr(each, "code", each) for each in refused] == ["last_admin"] * len(refused)
        assert await _admins(kit) >= 1
        assert await _admins(kit) == 1


@pytest.mark.one_engine
async def test_the_rights_of_a_person_without_a_session_are_those_of_the_moment(kit: Kit) -> None:
    await kit.as_user("admin")
    user_id = (await kit.as_user("admin")).user["id"]

    async def principal(id: str = user_id, *needs: str) -> Principal:
        return await kit.kernel.database.work(lambda: _accounts(kit).principal_of(id, *needs), read=True)

    found = await principal(user_id, "plugins.write")
    assert (found.kind, found.user_id, found.role) == ("user", user_id, "admin")
    await _patch(kit, user_id, role="viewer")
    assert not (await principal()).may("plugins.write")
    with pytest.raises(InsufficientRights, match=r"plugins\.write"):
        await principal(user_id, "plugins.write")
    await _patch(kit, user_id, is_active=False)
    with pytest.raises(InsufficientRights, match="is deactivated"):
        await principal()
    with pytest.raises(InsufficientRights, match="no longer exists"):
        await principal("01890a5d-ac96-774b-bcce-b302099a8057")


async def test_the_principals_of_many_people_are_those_of_each(kit: Kit) -> None:
    work, accounts = kit.kernel.database.work, _accounts(kit)
    admin, member, viewer = [(await kit.as_user(role)).user["id"] for role in ("admin", "member", "viewer")]
    await _patch(kit, viewer, is_active=False)
    await work(lambda: accounts.set_password(member, "no hash", must_change=True))
    asked = [admin, member, viewer, "01890a5d-ac96-774b-bcce-b302099a8057"]
    many = await work(lambda: accounts.principals_of(asked), read=True)
    assert many == {id: await work(lambda id=id: accounts.principal_of(id), read=True) for id in (admin, member)}  # type: ignore[misc]  # bound now
    assert many[member].limited == "password_change_required"


async def test_lost_rights_end_sessions_and_won_ones_do_not(kit: Kit) -> None:
    client = await kit.as_user("viewer")
    await _patch(kit, client.user["id"], role="member")
    assert (await client.get("/auth/me")).json()["role"] == "member"
    await kit.as_user("admin")
    await _patch(kit, client.user["id"], role="admin")
    assert (await client.get("/plugins")).status == 200
    await _patch(kit, client.user["id"], role="viewer")
    assert (await client.get("/auth/me")).code == "session_revoked"


@pytest.mark.one_engine
async def test_a_taken_address_is_told_to_admins_only(kit: Kit) -> None:
    first = await kit.as_user(email="ann@example.org")
    new = NewUser(email="ANN@example.org", full_name="Ann")
    admin = Principal(kind="user", id="x", user_id=None, role="admin")
    for by, told in ((admin, first.user["id"]), (SYSTEM_PRINCIPAL, None)):

        def create(by: Principal = by) -> None:
            with pytest.raises(Conflict) as found:
                _accounts(kit).create(new, password_hash=None, by=by)
            assert found.value.members.get("existing_id") == (first.user["id"] if by is admin else None)

        await kit.kernel.database.work(create)
        assert told in (first.user["id"], None)


async def test_search_filters_and_pages(kit: Kit) -> None:
    admin = await kit.as_user("admin", email="root@example.org")
    for name in ("anna", "annika", "bert"):
        await kit.as_user(email=f"{name}@example.org")
    caller = Principal(kind="user", id=admin.user["id"], user_id=admin.user["id"], role="admin")

    def emails(**query: Any) -> tuple[list[str], int | None]:
        page = _accounts(kit).list(UserQuery(**query), caller)
        return [each.email.partition("@")[0] for each in page.items], page.total

    work = kit.kernel.database.work
    assert await work(lambda: emails(search="ANN")) == (["annika", "anna"], 2)
    assert await work(lambda: emails(search="ann", limit=1)) == (["annika"], 2)
    assert await work(lambda: emails(search="%")) == ([], 0)
    assert (await work(lambda: emails(role=["admin"])))[0] == ["root"]
    assert (await work(lambda: emails(search="Member")))[1] == 3
    assert (await work(lambda: emails(is_active=False)))[1] == 0


@pytest.mark.one_engine
async def test_a_purged_account_is_a_tombstone(kit: Kit) -> None:
    client = await kit.as_user(email="ann@example.org")
    work, accounts, user_id = kit.kernel.database.work, _accounts(kit), client.user["id"]
    with pytest.raises(Conflict):
        await work(lambda: accounts.purge(user_id))
    await _patch(kit, user_id, is_active=False)
    await work(lambda: accounts.purge(user_id))
    tombstone = await work(lambda: accounts.get(user_id), read=True)
    assert (tombstone.full_name, tombstone.email, tombstone.is_active) == ("deleted user", "", False)
    assert await work(lambda: accounts.find("ann@example.org"), read=True) is None
    assert (await kit.as_user(email="ann@example.org")).user["id"] != user_id
    with pytest.raises(NotFound):
        await _patch(kit, user_id, is_active=True)
    assert [each.type for each in await kit.events()].count("user.purged") == 1


async def test_who_is_made_active_again_meanwhile_is_not_purged(kit: Kit) -> None:
    user_id = (await kit.as_user()).user["id"]
    await _patch(kit, user_id, is_active=False)
    work, accounts = kit.kernel.database.work, _accounts(kit)
    changed, go_on = threading.Event(), threading.Event()

    def reactivate() -> None:
        accounts.update(user_id, UserPatch(is_active=True))
        changed.set()
        assert go_on.wait(60)

    reactivating = asyncio.create_task(work(reactivate))
    assert await asyncio.to_thread(changed.wait, 60)
    purging = asyncio.create_task(work(lambda: accounts.purge(user_id)))
    await asyncio.sleep(0.3)  # so that it has read the account, where it can
    go_on.set()
    await reactivating
    with pytest.raises(Conflict):
        await purging
    assert (await work(lambda: accounts.get(user_id), read=True)).full_name != "deleted user"


@pytest.mark.one_engine
async def test_an_admin_sets_a_password(kit: Kit) -> None:
    client = await kit.as_user(email="ann@example.org")
    accounts = _accounts(kit)
    with pytest.raises(Invalid):
        await accounts.hash_password("short", email="ann@example.org", full_name="Ann")
    hashed = await accounts.hash_password("an entirely other phrase", email="ann@example.org", full_name="Ann")
    await kit.kernel.database.work(lambda: accounts.set_password(client.user["id"], hashed, must_change=True))
    assert (await client.get("/auth/me")).code == "session_revoked"
    again = await kit.sign_in("ann@example.org", "an entirely other phrase")
    assert (await again.get("/auth/me")).json()["limited"] == "password_change_required"


async def test_the_migration_equals_the_models(kit: Kit) -> None:
    models = kit.loaded("accounts").contributions_to("corral_models")

    def differences() -> str:
        return str(diff_models(kit.kernel.database.engine, models))

    assert await kit.kernel.database.work(differences) == ""
