"""Who acts under a lease: by the attempt token that was made at its claim, or as the worker that holds it."""

from __future__ import annotations

from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.core.api import Accounts
from corral.database.statement import Statement
from corral.errors import Forbidden, NotFound, Unauthorized
from corral_plugins.tasks.models import Attempt
from corral_plugins.tasks.service.claims import TOKEN_PREFIX, token_hash
from corral_plugins.tasks.service.leases import lost

_LIVE = Statement(
    lambda p: (
        Attempt.select(Attempt.task_id, Attempt.lease_id, Attempt.agent_id, Attempt.requester_id)
        .where((Attempt.token_hash == p("hash")) & Attempt.finished_at.is_null())
        .tuples()
    )
)
_OF_LEASE = Statement(
    lambda p: (
        Attempt.select(Attempt.task_id, Attempt.lease_id, Attempt.agent_id, Attempt.requester_id, Attempt.worker_id)
        .where((Attempt.lease_id == p("lease")) & Attempt.finished_at.is_null())
        .tuples()
    )
)


class AttemptCallers:
    """The rights of an attempt are those of agents that its requester holds too, and those that only machines hold."""

    def __init__(self, accounts: Accounts, permissions: Permissions) -> None:
        self._accounts, self._permissions = accounts, permissions

    def of_worker(self, worker: Principal, lease_id: str) -> Principal:
        """The agent of a live lease that this worker holds.

        Raises `Conflict(lease_lost)`, and `Forbidden` for the lease of another worker.
        """
        found = _OF_LEASE.one({"lease": lease_id.lower()})
        if found is None:
            raise lost()
        if found[4] != worker.worker_id:
            raise Forbidden("This lease is held by another worker.")
        return self.principal(*found[:4])

    def principal(self, task_id: str, lease_id: str, agent_id: str, requester_id: str | None) -> Principal:
        """Who acts under the lease; `Unauthorized` once its requester may not any more."""
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


class AttemptTokens:
    """Recognises `cra_a…`, and workers that name their lease in `Corral-Lease`.

    Implements `Authenticator`, `Rereading` and `Delegation`.
    """

    delegation_header = "Corral-Lease"

    def __init__(self, callers: AttemptCallers) -> None:
        self._callers = callers

    def recognises(self, credential: str) -> bool:
        return credential.startswith(TOKEN_PREFIX)

    def authenticate(self, credential: str) -> Principal:
        found = _LIVE.one({"hash": token_hash(credential)})
        if found is None:
            raise Unauthorized("The lease of this token has ended.")
        return self._callers.principal(*found)

    def act_as(self, caller: Principal, named: str) -> Principal:
        return caller if caller.worker_id is None else self._callers.of_worker(caller, named)

    def reread(self, caller: Principal) -> Principal | None:
        if caller.lease_id is None:
            return None
        found = _OF_LEASE.one({"lease": caller.lease_id})
        if found is None:
            raise Unauthorized("The lease of this token has ended.")
        return self._callers.principal(*found[:4])
