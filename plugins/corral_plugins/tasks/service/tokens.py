"""Attempt tokens: made at each claim, bound to the lease, dead with it."""

from __future__ import annotations

from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.core.api import Accounts
from corral.database.statement import Statement
from corral.errors import NotFound, Unauthorized
from corral_plugins.tasks.models import Attempt
from corral_plugins.tasks.service.claims import TOKEN_PREFIX, token_hash

_LIVE = Statement(
    lambda p: (
        Attempt.select(Attempt.task_id, Attempt.lease_id, Attempt.agent_id, Attempt.requester_id)
        .where((Attempt.token_hash == p("hash")) & Attempt.finished_at.is_null())
        .tuples()
    )
)


class AttemptTokens:
    """The rights of an attempt are those of agents that its requester holds too, and those that only machines hold."""

    def __init__(self, accounts: Accounts, permissions: Permissions) -> None:
        self._accounts, self._permissions = accounts, permissions

    def recognises(self, credential: str) -> bool:
        return credential.startswith(TOKEN_PREFIX)

    def authenticate(self, credential: str) -> Principal:
        found = _LIVE.one({"hash": token_hash(credential)})
        if found is None:
            raise Unauthorized("The lease of this token has ended.")
        task_id, lease_id, agent_id, requester_id = found
        role = self._role(requester_id)
        return Principal(
            kind="agent",
            id=agent_id,
            agent_id=agent_id,
            user_id=requester_id,
            role=role,
            permissions=self._rights(role),
            task_id=task_id,
            lease_id=lease_id,
        )

    def _role(self, requester_id: str | None) -> str:
        if requester_id is None:
            return "member"
        try:
            requester = self._accounts.get(requester_id)
        except NotFound:
            raise Unauthorized("The requester of this task is gone.") from None
        if not requester.is_active:
            raise Unauthorized("The requester of this task is deactivated.")
        return requester.role

    def _rights(self, role: str) -> frozenset[str]:
        of_agents = self._permissions.of("agent")
        return (of_agents & self._permissions.of(role)) | (of_agents - self._permissions.of("admin"))
