"""The lines of the page on authentication, by number; each as its tests show it.

1 is shown here on a fresh installation, and by `test_sign_in.py`. 2: `test_rotation.py` and promise S6. 3:
`test_lockout.py` and promise S4. 4: `test_lockout.py` and promise S5. 5: `test_mfa.py`. 6: here, and by promise S12 for
every way in which a session ends. 7: here for tokens of sign-in, and by promise S1 for every forged token on every
operation. 8: `test_policy.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.kernel.auth.authenticator import AuthenticatorApp
from tests.limits import Stopwatch, within
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from corral import clock
from corral.auth.principal import PUBLIC
from corral.events.log import EventRow
from corral.ids import new_id
from corral.testing.kit import Kit
from corral.testing.server import PASSWORD, ServerProcess
from corral_core.accounts.models import ChallengeRow, LockoutRow, SessionRow, UserRow

MakeKit = Callable[..., Awaitable[Kit]]


def curl(server: ServerProcess, method: str, path: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
    """Status and body, by the program that everybody has."""
    command = ["curl", "--silent", "--show-error", "--request", method, "--write-out", "\n%{http_code}"]
    if token is not None:
        command += ["--header", f"Authorization: Bearer {token}"]
    if body is not None:
        command += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
    done = subprocess.run([*command, f"{server.address}/api/v1{path}"], capture_output=True, text=True, check=True)
    text, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(text) if text else None


def test_auth_1_with_curl_on_a_fresh_install(database_url: str, tmp_path: Path) -> None:
    """Registered, signed in, refreshed, signed out; then tokens are refused, and the open socket is closed."""
    nobody = {"CORRAL_BOOTSTRAP_ADMIN_EMAIL": "", "CORRAL_BOOTSTRAP_ADMIN_PASSWORD": ""}
    with ServerProcess(tmp_path, database_url=database_url, environ=nobody) as server:
        new = {"email": "ann@example.org", "password": PASSWORD, "full_name": "Ann"}
        assert curl(server, "POST", "/auth/register", new)[0] == 201
        status, signed_in = curl(server, "POST", "/auth/login", {"email": "Ann@Example.org", "password": PASSWORD})
        assert status == 200
        assert curl(server, "GET", "/auth/me", token=signed_in["access_token"])[1]["role"] == "admin"
        status, renewed = curl(server, "POST", "/auth/refresh", {"refresh_token": signed_in["refresh_token"]})
        assert status == 200
        address = f"{server.address.replace('http', 'ws', 1)}/ws?token={renewed['access_token']}"
        with connect(address, proxy=None) as socket:
            assert curl(server, "POST", "/auth/logout", token=renewed["access_token"])[0] == 204
            with Stopwatch() as watch, contextlib.suppress(ConnectionClosed):
                while True:
                    socket.recv(timeout=60)
            assert (socket.close_code, watch.seconds < 2.0) == (4401, True)
            for token in (signed_in["access_token"], renewed["access_token"]):
                assert curl(server, "GET", "/auth/me", token=token)[1]["code"] == "session_revoked"
            for token in (signed_in["refresh_token"], renewed["refresh_token"]):
                assert curl(server, "POST", "/auth/refresh", {"refresh_token": token})[1]["code"] == "session_revoked"


async def test_auth_6_a_deactivated_user_is_out_in_another_process(make_kit: MakeKit) -> None:
    """Two kernels on one database: refused at once here, and there when the second is over that a caller is kept."""
    kits = [await make_kit(plugins=["admin", "cost", "security"]) for _ in range(2)]
    await kits[0].as_user("admin")
    admin = await kits[0].as_user("admin")
    user = await kits[1].as_user()
    signed_in = await kits[1].client.post("/auth/login", {"email": user.user["email"], "password": PASSWORD})
    made = await user.post("/security/api-keys", {"name": "script"})
    assert made.status == 201, made
    key = made.json()["key"]
    assert (await kits[1].client.get("/auth/me", headers={"X-API-Key": key})).status == 200
    assert (await user.get("/auth/me")).status == 200
    assert (await admin.patch(f"/admin/users/{user.user['id']}", {"is_active": False})).status == 200
    refresh = {"refresh_token": signed_in.json()["refresh_token"]}
    async with within(2):
        assert (await kits[1].client.post("/auth/refresh", refresh)).code == "session_revoked"
        while (await user.get("/auth/me")).status == 200:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.01)
        while (await kits[1].client.get("/auth/me", headers={"X-API-Key": key})).status == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_auth_7_tokens_of_sign_in_open_no_operation(make_kit: MakeKit) -> None:
    """Refresh tokens, `mfa_token`s, tickets, and access tokens that are over: 401, and no row changes."""
    kit = await make_kit()
    user = await kit.as_user("admin", "ann@example.org")
    app = AuthenticatorApp((await user.post("/auth/mfa/setup")).json()["secret"])
    credentials = {"email": "ann@example.org", "password": PASSWORD}
    refresh = (await kit.client.post("/auth/login", credentials)).json()["refresh_token"]
    assert (await user.post("/auth/mfa/verify", {"code": app.code()})).status == 200
    pending = (await kit.client.post("/auth/login", credentials)).json()["mfa_token"]
    ticket = (await user.post("/auth/ws-ticket")).json()["ticket"]
    expired = user.token
    clock.travel(905 + 1)
    tokens = {"refresh": refresh, "mfa": pending, "ticket": ticket, "expired": expired}
    operations = [
        route
        for loaded in kit.kernel.plugins
        for routes in loaded.contributions_to("corral_routes")
        for route in routes
    ]
    closed = [route for route in operations if PUBLIC not in route.needs]
    assert len(closed) > 100
    before = await _counts(kit)
    for route in closed:
        path = route.path
        for name in route.path_parameters:
            path = path.replace(f"{{{name}}}", new_id())
        for kind, token in tokens.items():
            answer = await kit.client.request(route.method, path, headers={"Authorization": f"Bearer {token}"})
            assert answer.status == 401, (route.label, kind, answer)
    assert await _counts(kit) == before


async def _counts(kit: Kit) -> list[int]:
    tables = (UserRow, SessionRow, ChallengeRow, LockoutRow, EventRow)
    return await kit.kernel.database.work(lambda: [table.select().count() for table in tables], read=True)
