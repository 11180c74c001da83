"""A kernel with an audit log, those who read it, and hands that reach behind the product's back."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
import pytest

from corral.plugin import AuditEntry
from corral.testing.kit import Client, Kit
from corral_plugins.audit.service.checkpoints import CheckpointSigner
from corral_plugins.audit.service.log import AuditLog
from corral_plugins.audit.service.signing import SignedCheckpoint
from corral_plugins.audit.service.verify import Verification
from corral_plugins.audit.shapes import VerificationResult


class Books:
    """`log` as other plugins use it, and people who read."""

    def __init__(self, kit: Kit, url: str) -> None:
        self.kit, self.url = kit, url
        self.admin: Client
        self.auditor: Client

    async def build(self) -> Books:
        self.admin, self.auditor = await self.kit.as_user("admin"), await self.kit.as_user("auditor")
        return self

    def service(self, kind: Any) -> Any:
        return self.kit.kernel.container.get(kind)

    @property
    def log(self) -> AuditLog:
        found: AuditLog = self.service(AuditLog)
        return found

    async def work(self, fn: Callable[[], Any], **options: Any) -> Any:
        return await self.kit.kernel.database.work(fn, **options)

    async def write(self, count: int = 1, **given: Any) -> None:
        """Rows of their own, one unit each."""
        fields: dict[str, Any] = {"action": "test.thing.change", "object_type": "thing", "object_id": "one", **given}
        for _ in range(count):
            await self.work(lambda: self.log.record(AuditEntry(**fields)))

    async def set(self, setting: Any, value: Any) -> None:
        """As an admin does; returns when it is in force here."""
        category, _, key = setting.name.partition(".")
        answer = await self.admin.put(f"/settings/{category}/{key}", {"value": value})
        assert answer.status == 200, answer
        while self.kit.kernel.settings.get(setting) != value:  # noqa: ASYNC110  (nothing tells a test)
            await asyncio.sleep(0.01)

    async def sign(self) -> SignedCheckpoint:
        made = await self.service(CheckpointSigner).create_checkpoint()
        assert made is not None
        found: SignedCheckpoint = made
        return found

    async def verify(self, *part: int | None) -> VerificationResult:
        found: VerificationResult = await self.service(Verification).run(*part)
        return found

    async def rows(self, query: str = "", *, by: Client | None = None) -> list[Any]:
        """Rows of the list, oldest first."""
        answer = await (by or self.admin).get(f"/admin/audit?limit=200{query}")
        assert answer.status == 200, answer
        return list(reversed(answer.json()["items"]))

    def behind(self, *statements: str, parameters: Sequence[Any] = ()) -> None:
        """Statements of somebody who has the database, and takes the triggers out of the way."""
        if self.url.startswith("sqlite"):
            with sqlite3.connect(self.url.removeprefix("sqlite:///"), timeout=10) as engine:
                for table in ("rows", "checkpoints"):
                    for verb in ("update", "delete", "replace"):
                        engine.execute(f"DROP TRIGGER IF EXISTS audit_{table}_no_{verb}")
                for statement in statements:
                    engine.execute(statement, parameters)
            engine.close()
            return
        with psycopg.connect(self.url) as connection:
            for table in ("rows", "checkpoints"):
                connection.execute(f"ALTER TABLE audit_{table} DISABLE TRIGGER USER")
            for statement in statements:
                connection.execute(statement.replace("?", "%s"), parameters)


@pytest.fixture
async def books(make_kit: Callable[..., Any], database_url: str) -> Books:
    """On each engine, with people."""
    return await Books(await make_kit(plugins=["audit", "admin", "settings"]), database_url).build()
