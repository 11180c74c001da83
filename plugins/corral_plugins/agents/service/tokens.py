"""Standing tokens, which agent owners create for agents that run outside Corral's workers."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.permissions import Permissions, within_scopes
from corral.auth.principal import Principal
from corral.database.unit import after_commit
from corral.errors import Invalid, NotFound, Problem, Unauthorized
from corral.http.page import Page, newest_first, paginate
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry, Setting, Settings
from corral_core.accounts.api import Accounts, InsufficientRights
from corral_plugins.agents.models import LIVING, Agent, AgentToken
from corral_plugins.agents.service.rows import find_writable_agent
from corral_plugins.agents.shapes import AgentTokenQuery, AgentTokenView, IssuedAgentToken, NewAgentToken

TOKEN_TTL_DAYS: Setting[int] = Setting(
    name="agents.token_ttl_days",
    kind=int,
    default=90,
    minimum=1,
    maximum=365,
    title="Default lifetime of a standing token in days",
)

PREFIX = "cra_s"
MAX_TOKENS = 10
MAX_DAYS, DAY_SECONDS = 365, 86_400


class AgentTokens:
    """Creates, lists and revokes standing tokens. Every method runs in the caller's unit of work."""

    audit: Audit | None

    def __init__(self, settings: Settings, permissions: Permissions, credentials: Credentials) -> None:
        self._settings, self._permissions, self._credentials = settings, permissions, credentials

    def list(self, agent_id: str, query: AgentTokenQuery, *, by: Principal) -> Page[AgentTokenView]:
        """Return the valid tokens of an agent, newest first. Only admins and the owner of the agent may list them."""
        find_writable_agent(agent_id, by)
        rows = AgentToken.select().where((AgentToken.agent_id == agent_id) & (AgentToken.expires_at > clock.now()))
        return paginate(
            rows, query, by, scope=f"agent_tokens:{agent_id}", order=newest_first(AgentToken), make=_token_view
        )

    def create(self, agent_id: str, new: NewAgentToken, *, by: Principal) -> IssuedAgentToken:
        """Create a token. The token grants permissions that the caller has and that agents may hold.

        Only the response contains the token. Raise a `Problem` with the code `quota_exceeded` if the agent has too many
        tokens.
        """
        find_writable_agent(agent_id, by)
        assert by.user_id is not None  # the route accepts only people
        self._check_scopes(new.scopes)
        expires_at = self._expiry_of(new)
        # The update locks the row, so that the count stays valid until the commit.
        Agent.update(updated_at=Agent.updated_at).where(Agent.id == agent_id).execute()
        living = (
            AgentToken.select().where((AgentToken.agent_id == agent_id) & (AgentToken.expires_at > clock.now())).count()
        )
        if living >= MAX_TOKENS:
            raise Problem(f"An agent can have at most {MAX_TOKENS} tokens; revoke one first.", code="quota_exceeded")
        secret = PREFIX + secrets.token_urlsafe(32)
        row = AgentToken(
            id=new_id(),
            agent_id=agent_id,
            name=new.name,
            token_hash=_hash_token(secret),
            scopes=new.scopes,
            created_by=by.user_id,
            created_at=clock.now(),
            expires_at=expires_at,
        )
        row.save(force_insert=True)
        self._record_audit("create", row, {"scopes": new.scopes, "expires_at": expires_at})
        return IssuedAgentToken(**_view_fields(row), token=secret)

    def revoke(self, agent_id: str, token_id: str, *, by: Principal) -> None:
        """Revoke a token immediately. Raise `NotFound` if the agent has no such token."""
        find_writable_agent(agent_id, by)
        mine = (AgentToken.id == token_id) & (AgentToken.agent_id == agent_id)
        ended: list[AgentToken] = list(AgentToken.delete().where(mine).returning(AgentToken).execute())
        if not ended:
            raise NotFound("The agent has no token with this id.")
        self._record_audit("end", ended[0], {})
        after_commit(lambda: self._credentials.forget(lambda caller: caller.agent_id == agent_id))

    def revoke_tokens_of_user(self, user_id: str) -> int:
        """Delete every token that a person created. Return the number of deleted tokens."""
        return int(AgentToken.delete().where(AgentToken.created_by == user_id).execute())

    def _record_audit(self, verb: str, row: AgentToken, details: Mapping[str, Any]) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"agents.token.{verb}",
                object_type="agent_token",
                object_id=row.id,
                object_name=row.name,
                details={"agent_id": row.agent_id, **details},
            )
            self.audit.record(entry)

    def _expiry_of(self, new: NewAgentToken) -> str:
        if new.expires_at is None:
            return clock.now(self._settings.get(TOKEN_TTL_DAYS) * DAY_SECONDS)
        asked = clock.from_datetime(new.expires_at)
        if asked <= clock.now():
            raise Invalid.at("/expires_at", "in_the_past", "must be in the future")
        if asked > clock.now(MAX_DAYS * DAY_SECONDS):
            raise Invalid.at("/expires_at", "too_large", f"at most {MAX_DAYS} days from now")
        return asked

    def _check_scopes(self, scopes: Sequence[str]) -> None:
        held = self._permissions.held_by("agent")
        for index, scope in enumerate(scopes):
            if not within_scopes(held, (scope,)):
                detail = "must be a permission that agents may hold, or a pattern: <plugin>.*, *.<verb> or *"
                raise Invalid.at(f"/scopes/{index}", "not_in_enum", detail)


class StandingTokenAuthenticator:
    """Authenticates standing tokens (`cra_s…`).

    A token grants the permissions that its creator currently has and that agents may hold, limited by the token's
    scopes.
    """

    def __init__(self, accounts: Accounts, permissions: Permissions) -> None:
        self._accounts, self._permissions = accounts, permissions

    def recognises(self, credential: str) -> bool:
        """Return whether the credential has the prefix of a standing token."""
        return credential.startswith(PREFIX)

    def authenticate(self, credential: str) -> Principal:
        """Return the principal for a standing token.

        Raise `Unauthorized` if the token is unknown or expired, its agent is deleted, or its creator is not active.
        """
        return self._principal_where(AgentToken.token_hash == _hash_token(credential))

    def reread(self, caller: Principal) -> Principal | None:
        """Authenticate the caller again by the id of its token, because the token may have been revoked.

        Return None if the caller did not use a standing token.
        """
        if caller.kind != "agent" or caller.token_id is None:
            return None
        return self._principal_where(AgentToken.id == caller.token_id)

    def _principal_where(self, is_this: Any) -> Principal:
        row = (
            AgentToken.select(
                AgentToken.id, AgentToken.agent_id, AgentToken.created_by, AgentToken.scopes, AgentToken.expires_at
            )
            .join(Agent, on=(Agent.id == AgentToken.agent_id))
            .where(is_this & LIVING)
            .namedtuples()
            .first()
        )
        if row is None:
            raise Unauthorized("The agent token is unknown or was revoked.")
        if row.expires_at <= clock.now():
            raise Unauthorized("The agent token has expired.", code="token_expired")
        try:
            person = self._accounts.principal_of(row.created_by)
        except InsufficientRights as error:
            raise Unauthorized(error.detail) from None
        rights = self._permissions.held_by("agent") & person.permissions
        return Principal(
            kind="agent",
            id=row.agent_id,
            agent_id=row.agent_id,
            user_id=person.user_id,
            role=person.role,
            token_id=row.id,
            permissions=within_scopes(rights, row.scopes),
            expires_at=clock.parse_instant(row.expires_at),
            limited=person.limited,
        )


def _hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _view_fields(row: AgentToken) -> dict[str, Any]:
    names = ("id", "agent_id", "name", "scopes", "created_by", "created_at", "expires_at")
    return {name: getattr(row, name) for name in names}


def _token_view(row: AgentToken) -> AgentTokenView:
    return AgentTokenView(**_view_fields(row))
