"""A kernel with API keys, IP rules and limits, and callers that come from wherever a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from tests.limits import within

from corral.testing.kit import Answer, Client, Kit

TRUSTING = {"server.trusted_proxies": ["127.0.0.1"]}
PLUGINS = ["security", "settings", "audit", "agents", "tasks", "workers", "realtime", "admin"]
HOME, AWAY = "198.51.100.7", "203.0.113.9"


class From(Client):
    """Calls from an address, as a trusted proxy tells it; `key` is sent as `X-API-Key`."""

    def __init__(self, client: Client, address: str | None = None, *, key: str | None = None) -> None:
        super().__init__(client.app, None if key else client.token, client.user)
        self.address, self.key = address, key

    async def request(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        headers: Mapping[str, str] = options.pop("headers", None) or {}
        sent = dict(headers)
        if self.address is not None:
            sent.setdefault("x-forwarded-for", self.address)
        if self.key is not None:
            sent.setdefault("x-api-key", self.key)
        return await super().request(method, path, body, headers=sent, **options)


async def make_key(owner: Client, **facts: Any) -> tuple[From, dict[str, Any]]:
    """A caller with a new key of the owner, and the key as it was shown."""
    answer = await owner.post("/security/api-keys", {"name": "script", **facts})
    assert answer.status == 201, answer
    shown = answer.json()
    return From(owner, key=shown["key"]), shown


async def within_two_seconds(ask: Callable[[], Awaitable[Answer]], status: int) -> Answer:
    """Ask until the answer has this status, as it must after a change elsewhere, and return the answer."""
    async with within(2):
        while (answer := await ask()).status != status:  # noqa: ASYNC110  (no notification exists)
            await asyncio.sleep(0.05)
    return answer


@pytest.fixture
async def kit(make_kit: Callable[..., Any]) -> Kit:
    """On each engine, behind a trusted proxy, with the plugins that the tests call."""
    made: Kit = await make_kit(plugins=PLUGINS, config=TRUSTING)
    return made
