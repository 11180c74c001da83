"""A kernel of accounts alone, an authenticator app, and shortcuts to sign in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.kernel.auth.authenticator import AuthenticatorApp

from corral.testing.kit import PASSWORD, Answer, Client, Kit

MakeKit = Callable[..., Awaitable[Kit]]


class Door:
    """Sign-in as clients see it."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    async def login(self, email: str, password: str = PASSWORD, **more: Any) -> Answer:
        """`POST /auth/login`."""
        return await self.kit.client.post("/auth/login", {"email": email, "password": password, **more})

    async def challenge(self, token: str, **proof: str) -> Answer:
        """`POST /auth/mfa/challenge`."""
        return await self.kit.client.post("/auth/mfa/challenge", {"mfa_token": token, **proof})

    def client(self, answer: Answer) -> Client:
        """A client with the tokens of an answer."""
        assert answer.status == 200, answer
        return Client(self.kit.application.app, answer.json()["access_token"], answer.json()["user"])

    async def with_mfa(
        self, role: str = "member", email: str | None = None
    ) -> tuple[Client, AuthenticatorApp, list[str]]:
        """Somebody with a second factor: the client, the app, the recovery codes. The code of now is used up."""
        client = await self.kit.as_user(role, email)
        setup = await client.post("/auth/mfa/setup")
        assert setup.status == 200, setup
        app = AuthenticatorApp(setup.json()["secret"])
        done = await client.post("/auth/mfa/verify", {"code": app.code()})
        assert done.status == 200, done
        return client, app, done.json()["recovery_codes"]


@pytest.fixture
async def kit(make_kit: MakeKit) -> Kit:
    return await make_kit(plugins=[])


@pytest.fixture
def door(kit: Kit) -> Door:
    return Door(kit)


@pytest.fixture
def open_door() -> Callable[[Kit], Door]:
    """For kernels that a test makes itself."""
    return Door
