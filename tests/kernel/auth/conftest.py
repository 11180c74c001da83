"""A kernel of accounts alone, an authenticator app, and shortcuts to sign in."""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from corral import clock
from corral.testing.kit import PASSWORD, Answer, Client, Kit

MakeKit = Callable[..., Awaitable[Kit]]


class AuthenticatorApp:
    """RFC 6238 in a few lines, so that the product is not held against its own library."""

    def __init__(self, secret: str) -> None:
        self.key = base64.b32decode(secret)

    def code(self, steps: int = 0) -> str:
        """The code of now, or of so many steps later."""
        step = int(clock.time_s()) // 30 + steps
        mac = hmac.new(self.key, struct.pack(">Q", step), hashlib.sha1).digest()
        at = mac[-1] & 15
        number = struct.unpack(">I", mac[at : at + 4])[0] & 0x7FFFFFFF
        return f"{number % 1_000_000:06d}"

    def wrong(self) -> str:
        """A code that is of no step near now."""
        near = {self.code(steps) for steps in range(-3, 4)}
        return next(code for number in range(20) if (code := f"{number:06d}") not in near)


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
