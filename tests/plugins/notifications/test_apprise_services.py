"""The services that the extra `notify` adds, with the library itself and a receiver."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from tests.plugins.notifications.conftest import Notified
from tests.plugins.notifications.services import Service
from tests.promises.test_s03_egress import connections

from corral_plugins.notifications.service import apprise_services
from corral_plugins.notifications.service.apprise_services import SERVICES, AppriseChannelTypes

__all__ = ["connections"]

pytestmark = pytest.mark.one_engine
LETTERS = "aBcDeFgHiJ" * 6
CONFIGS: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "discord": ({"webhook_id": "123456789"}, {"webhook_token": LETTERS}, "content"),
    "google_chat": ({"workspace": "AAAA"}, {"webhook_key": LETTERS, "webhook_token": LETTERS[::-1]}, "text"),
    "ntfy": ({}, {"targets": "alerts-of-the-fleet"}, "message"),
    "pushover": ({}, {"user_key": LETTERS[:30], "token": LETTERS[10:40]}, "message"),
    "webex": ({"targets": LETTERS}, {"access_token": LETTERS[::-1]}, "markdown"),
}
ADDRESSES = {"discord": "notify_url", "google_chat": "notify_url", "ntfy": "cloud_notify_url", "pushover": "notify_url"}


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    """A receiver to which the library sends instead of all services."""
    async with Service("further") as service:
        for each in SERVICES:
            made = getattr(importlib.import_module(f"apprise.plugins.{each.module}"), each.name)
            name = ADDRESSES.get(each.type, "api_url")
            path = getattr(made, name).split("/", 3)[3:]
            monkeypatch.setattr(made, name, service.url.rstrip("/") + "".join(f"/{part}" for part in path))
        yield service


@pytest.fixture
def allowed(receiver: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    """The same, and Corral takes its address for that of all services. Use it before `world`."""
    moved = [msgspec.structs.replace(each, address=receiver.url.rstrip("/")) for each in SERVICES]
    monkeypatch.setattr(apprise_services, "SERVICES", tuple(moved))
    return receiver


async def test_further_services_get_harmless_text(allowed: Service, world: Notified) -> None:
    for kind, (open_members, secrets, member) in CONFIGS.items():
        made = await world.channel(kind, {**open_members, **secrets})
        assert made["config"] == {**open_members, **dict.fromkeys(secrets, "********")}
        await world.rule(made, name=kind, conditions=f"data.title == '{kind}'")
        allowed.requests.clear()
        text = "@everyone <users/all> [me](https://evil.example) " + "x" * 10_000
        await world.fail_task(kind, title=kind, message=text)
        await world.run()
        [(path, headers, body)] = allowed.requests
        text = body[member].replace("\\", "")  # Webex escapes
        assert text.startswith(f"Task failed: {kind}")
        assert text.endswith(f"https://corral.example/api/v1/tasks/{kind}")
        assert len(text) <= next(each.limit for each in SERVICES if each.type == kind)
        for mark in ("@", "users/all", "evil.example"):
            assert mark not in text, (kind, mark)
        sent = f"{path} {headers} {body}"
        assert all(value in sent for value in secrets.values())
    assert {row["status"] for row in await world.deliveries()} == {"succeeded"}


async def test_the_response_of_the_service_decides(allowed: Service, world: Notified) -> None:
    open_members, secrets, _ = CONFIGS["discord"]
    made = await world.channel("discord", {**open_members, **secrets})
    await world.rule(made, events=("things.*",))
    allowed.answers = [429, 500, 404]
    for thing, seconds, expected in (
        ("one", 0, ("retrying", 0, "status 429")),
        ("one", 8, ("retrying", 1, "status 500")),
        ("one", 61, ("failed", 2, "status 404")),
    ):
        if not seconds:
            await world.happen(thing)
        await world.run(seconds=seconds)
        [row] = await world.deliveries()
        assert (row["status"], row["attempts"], row["last_error"].partition(":")[0]) == expected
    assert len(allowed.requests) == 3


async def test_further_services_reach_no_other_address(
    world: Notified, receiver: Service, connections: list[Any]
) -> None:
    """The library would send elsewhere. It can open no connection by itself."""
    for kind, (open_members, secrets, _) in CONFIGS.items():
        made = await world.channel(kind, {**open_members, **secrets})
        tested = await world.ok(world.admin.post(f"/notifications/channels/{made['id']}/test"))
        assert (tested["delivered"], tested["error"]) == (False, "blocked"), kind
    assert receiver.requests == []
    assert connections == []


async def test_wrong_configs_of_further_services_are_422(world: Notified) -> None:
    for kind, config in (
        ("discord", {"webhook_id": "1234567/../x", "webhook_token": LETTERS}),
        ("discord", {"webhook_id": "123456789", "webhook_token": LETTERS, "host": "127.0.0.1"}),
        ("ntfy", {"targets": "http://127.0.0.1/x"}),
        ("pushover", {"user_key": "x", "token": "y"}),
        ("json", {"host": "127.0.0.1"}),
    ):
        answer = await world.admin.post("/notifications/channels", {"name": "x", "type": kind, "config": config})
        assert answer.status == 422, (kind, config)


def test_without_the_extra_there_are_no_further_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apprise_services, "LIBRARY", "a_library_that_is_not_installed")
    assert AppriseChannelTypes().definitions() == []
