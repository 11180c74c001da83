"""A kernel with the vault and the audit log, an admin who has stepped up, and where values could be left."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from corral.testing.kit import PASSWORD, Answer, Client, Kit
from corral_plugins.secrets.api import Secrets

VALUE = "tR0ub4dor&3/žluťoučký+kůň=correct-horse"
PLUGINS = ("audit", "secrets")


def spellings(value: str) -> dict[str, bytes]:
    """The forms in which a value must be found nowhere."""
    data = value.encode()
    return {
        "raw": data,
        "base64": base64.b64encode(data).rstrip(b"="),
        "hex": data.hex().encode(),
        "HEX": data.hex().upper().encode(),
        "url": quote(value, safe="").encode(),
    }


class Safe:
    """The vault as people see it."""

    kit: Kit
    admin: Client
    member: Client

    async def build(self, kit: Kit) -> Safe:
        self.kit, self._n = kit, 0
        self.admin, self.member = await kit.as_user("admin"), await kit.as_user("member")
        return self

    async def reopen(self, kit: Kit) -> Safe:
        """The vault of another kernel on the same database."""
        self.kit, self._n = kit, 100
        self.admin, self.member = await kit.sign_in("admin1@example.org"), await kit.sign_in("member2@example.org")
        return self

    @property
    def service(self) -> Secrets:
        """The service as other plugins use it."""
        container: Any = self.kit.kernel.container
        found: Secrets = container.get(Secrets)
        return found

    async def work(self, fn: Callable[[], Any], *, read: bool = False) -> Any:
        """Run in a unit."""
        return await self.kit.kernel.database.work(fn, read=read)

    async def step_up(self) -> None:
        """The admin gives the password again."""
        answer = await self.admin.post("/auth/reauth", {"password": PASSWORD})
        assert answer.status == 200, answer
        self.kit.kernel.credentials.forget(lambda principal: True)

    async def create(self, value: str = VALUE, **fields: Any) -> dict[str, Any]:
        """A secret."""
        self._n += 1
        answer = await self.admin.post("/secrets", {"name": f"SECRET_{self._n}", "value": value, **fields})
        assert answer.status == 201, answer
        found: dict[str, Any] = answer.json()
        return found

    async def reveal(self, id: str, **more: Any) -> Answer:
        """Ask for a value."""
        return await self.admin.post(f"/secrets/{id}/reveal", {"reason": "a test wants it", **more})

    async def value(self, id: str) -> str:
        """The value, by the way of an admin."""
        answer = await self.reveal(id)
        assert answer.status == 200, answer
        found: str = answer.json()["value"]
        return found

    async def events(self, type: str) -> list[Any]:
        """The data of events of a type."""
        return [json.loads(event.data) for event in await self.kit.events() if event.type == type]

    async def measured(self, line: str) -> None:
        """Wait until the metrics have a line; under load a scrape leaves out what takes too long."""

        async def found() -> bool:
            return line in (await self.kit.client.get("/metrics")).body.decode()

        await self.until(found, seconds=30.0)

    async def until(self, check: Callable[[], Any], *, seconds: float = 60.0) -> Any:
        """What `check` gives as soon as it is true."""
        async with asyncio.timeout(seconds):
            while not (found := await check()):  # noqa: ASYNC110  (what is waited for has no bell)
                await asyncio.sleep(0.02)
        return found


@pytest.fixture
async def safe(make_kit: Callable[..., Any]) -> Safe:
    """On each engine."""
    return await Safe().build(await make_kit(plugins=PLUGINS))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; of SQLite the WAL too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
