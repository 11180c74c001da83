"""The first account becomes the admin; on a public address it needs the token that the start prints."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from corral.auth.principal import SYSTEM_PRINCIPAL
from corral.plugin import FirstAccount
from corral.testing.kit import PASSWORD, Answer, Kit
from corral_core.accounts.api import Accounts, Invitations, NewUser

MakeKit = Callable[..., Awaitable[Kit]]
PUBLIC = {"server.bind": "0.0.0.0:8000"}


async def register(kit: Kit, name: str = "ann", **more: Any) -> Answer:
    body = {"email": f"{name}@example.org", "password": PASSWORD, "full_name": "Somebody", **more}
    return await kit.client.post("/auth/register", body)


async def instructions(kit: Kit) -> str | None:
    return await kit.kernel.container.get(FirstAccount).instructions()


def token_file(kit: Kit) -> Path:
    return kit.kernel.config.data_dir / "setup.token"


async def test_on_loopback_the_first_to_register_becomes_the_admin(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[], environ={"CORRAL_REGISTRATION": "closed"})
    assert "the first person to register becomes the admin" in str(await instructions(kit))
    assert not token_file(kit).exists()
    assert (await register(kit, setup_token="invented")).code == "registration_closed"
    made = await register(kit)
    assert (made.status, made.json()["role"]) == (201, "admin")
    assert await instructions(kit) is None
    assert (await register(kit, "bob")).code == "registration_closed"


@pytest.mark.one_engine
@pytest.mark.parametrize("mode", ["open", "invite"])
async def test_on_a_public_address_the_first_account_needs_the_token_of_the_start(make_kit: MakeKit, mode: str) -> None:
    kit = await make_kit(plugins=[], config=PUBLIC, environ={"CORRAL_REGISTRATION": mode})
    told = str(await instructions(kit))
    token = token_file(kit).read_text().strip()
    assert token in told
    assert token_file(kit).stat().st_mode & 0o777 == 0o600
    for wrong in ({}, {"setup_token": token[::-1]}, {"setup_token": "Ä"}, {"setup_token": token[:-4]}):
        answer = await register(kit, **wrong)
        assert (answer.status, answer.code) == (403, "registration_closed"), answer
    assert "set-up token" in (await register(kit)).json()["detail"]
    answers = await asyncio.gather(*[register(kit, f"p{n}", setup_token=token) for n in range(4)])
    roles = [each.json()["role"] for each in answers if each.status == 201]
    assert roles == ["admin"]
    assert {each.code for each in answers} == {None, "registration_closed"}
    assert not token_file(kit).exists()
    assert await instructions(kit) is None
    assert (await register(kit, "late", setup_token=token)).code == "registration_closed"
    assert (await register(kit, "late")).status == (201 if mode == "open" else 403)


@pytest.mark.one_engine
async def test_an_account_made_on_the_machine_ends_the_token(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[], config=PUBLIC)
    assert "corral user create --admin EMAIL" in str(await instructions(kit))
    token = token_file(kit).read_text().strip()
    accounts: Any = kit.kernel.container.get(Accounts)
    new = NewUser(email="root@example.org", full_name="Root", role="admin")
    await kit.kernel.database.work(lambda: accounts.create(new, password_hash=None, by=SYSTEM_PRINCIPAL))
    assert not token_file(kit).exists()
    assert (await register(kit, setup_token=token)).code == "registration_closed"


async def test_an_invitation_gives_its_role_to_the_first_account_too(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[], config=PUBLIC)
    invitations: Any = kit.kernel.container.get(Invitations)
    _, url = await kit.kernel.database.work(
        lambda: invitations.create("ann@example.org", "viewer", by=SYSTEM_PRINCIPAL)
    )
    made = await register(kit, invitation_token=url.rpartition("=")[2])
    assert (made.status, made.json()["role"]) == (201, "viewer")
    assert str(await instructions(kit)).startswith("no account is an admin; create one")
