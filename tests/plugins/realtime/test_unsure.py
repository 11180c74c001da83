"""One connection whose credential nobody can judge at the moment, among others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.plugins.realtime.conftest import ear

from corral.testing.kit import Client
from corral.testing.server import serving


async def disable(admin: Client, name: str) -> None:
    """Take a plugin out of service, and before it those that require it."""
    answer = await admin.post(f"/plugins/{name}/disable")
    for other in answer.json().get("references", ()):
        await disable(admin, other)
    assert answer.status == 200 or (await admin.post(f"/plugins/{name}/disable")).status == 200


async def test_a_credential_of_a_plugin_out_of_service_ends_its_own_connection_only(
    make_kit: Callable[..., Any],
) -> None:
    kit = await make_kit()
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    agent = (await member.post("/agents", {"name": "Ada"})).json()["id"]
    issued = (await member.post(f"/agents/{agent}/tokens", {"name": "outside"})).json()
    machine = Client(kit.application.app, issued["token"])
    async with serving(kit) as port, ear(port, machine) as theirs, ear(port, member) as ours:
        assert (await theirs.ask("subscribe", event="task.created"))["type"] == "subscribed"
        assert (await ours.ask("subscribe", event="user.updated"))["type"] == "subscribed"
        await disable(admin, "agents")
        await asyncio.sleep(1.2)  # what was known of their rights is too old by now
        await member.put("/auth/me", {"full_name": "Grace"})
        assert (await ours.hear())["event"] == "user.updated"
        assert await theirs.closed() == 4401
