"""Signs users out with any token of the session, even an expired one."""

from __future__ import annotations

from corral.auth.credentials import CHALLENGE, Credentials
from corral.auth.principal import Principal
from corral.crypto import digest
from corral.errors import Forbidden, Unauthorized
from corral_core.accounts.models import RefreshRow, SessionRow
from corral_core.accounts.service.authentication import AccessTokens, is_access_token


class SignOut:
    """Finds the user and the session to sign out. Every method runs in the caller's unit of work."""

    def __init__(self, tokens: AccessTokens, credentials: Credentials) -> None:
        self._tokens, self._credentials = tokens, credentials

    def holder_of_access_token(self, credential: str) -> Principal:
        """Return a principal with the user and the session of an access token, even if the token has expired.

        Raise `Unauthorized` for an invalid credential, and `Forbidden` for an API key or a machine's token.
        """
        if is_access_token(credential):
            claims = self._tokens.verify(credential, may_have_expired=True)
            return _holder(claims.sub, claims.sid)
        caller = self._credentials.authenticate(credential)
        code = "insufficient_scope" if caller.kind == "api_key" else "forbidden"
        raise Forbidden("Only users can sign out; to make an API key or a token invalid, revoke it.", code=code)

    @staticmethod
    def holder_of_refresh_token(refresh: str) -> Principal:
        """Return a principal with the user and the session of a refresh token, even if it has expired or was used.

        Raise `Unauthorized` for an unknown token.
        """
        found = SessionRow.select(SessionRow.id, SessionRow.user_id).join(
            RefreshRow, on=(RefreshRow.session_id == SessionRow.id)
        )
        row = found.where(RefreshRow.hash == digest(refresh)).first()
        if row is None:
            raise Unauthorized(
                "The refresh token does not belong to any session of this installation; sign in again.",
                headers=CHALLENGE,
            )
        return _holder(row.user_id, row.id)


def _holder(user_id: str, session_id: str) -> Principal:
    return Principal(kind="user", id=user_id, user_id=user_id, session_id=session_id)
