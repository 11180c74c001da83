"""A change of the key that signs access tokens."""

from __future__ import annotations

from corral.auth.tokens import AccessTokens
from corral.errors import Conflict
from corral.plugin import Audit, AuditEntry


class SigningKeys:
    """What `corral keys` calls."""

    audit: Audit | None = None

    def __init__(self, tokens: AccessTokens) -> None:
        self._tokens = tokens

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
