"""The keys that sign access tokens: a change of key, and what the redactor must know of them."""

from __future__ import annotations

import asyncio
import contextlib

from corral.database.engine import Work
from corral.errors import Conflict, Unavailable
from corral.plugin import Audit, AuditEntry
from corral.redact.redactor import Redactor
from corral_core.accounts.service.access_tokens import CACHE_SECONDS, AccessTokens


class SigningKeys:
    """What `corral keys` calls, and what a running process does about keys that another one made."""

    audit: Audit | None = None

    def __init__(self, tokens: AccessTokens, work: Work, redactor: Redactor) -> None:
        self._tokens, self._work, self._redactor = tokens, work, redactor
        self._told: dict[str, str] = {}

    def rotate(self) -> str:
        """Sign with a new key from now on; joins the unit. The old one verifies until its last token is over."""
        if self._tokens.is_fixed:
            raise Conflict(
                "CORRAL_JWT_SECRET signs here; change it there, which ends every access token.", code="setting_locked"
            )
        kid = self._tokens.rotate()
        if self.audit is not None:
            self.audit.record(AuditEntry(action="auth.signing_key.rotate", object_type="signing_key", object_id=kid))
        return kid

    async def tell(self) -> None:
        """Let the redactor know the keys in use. With a sealed vault nobody can read them, nor show them."""
        with contextlib.suppress(Unavailable):
            keys = await self._work(self._tokens.credentials, read=True)
            if keys != self._told:
                await asyncio.to_thread(self._redactor.set_values, "signing_keys", keys)
                self._told = keys

    async def follow(self) -> None:
        """Go on telling, as often as keys are read again; supervised by the kernel."""
        while True:
            await asyncio.sleep(CACHE_SECONDS)
            await self.tell()
