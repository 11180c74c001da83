"""Who may do what, as the HTTP contract tells it; nothing here asks the code under test.

A permission tells by its name whose it is: `<plugin>.read`, `.write`, `.manage`, and the few with a verb of their own.
"""

from __future__ import annotations

from collections.abc import Iterable

from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN
from corral.http.routes import Route

ROLES = ("admin", "member", "viewer", "auditor")
# Areas that are the admins' alone, but the audit log, which auditors share.
ADMINS_AREAS = frozenset(
    {"admin", "circuit_breakers", "dead_letter", "plugins", "secrets", "security", "settings", "ssh"}
)
MEMBERS_OWN = frozenset(
    {
        "approvals.decide",
        "code_reviews.decide",
        "llm.use",
        "tools.use_external",
        "tools.use_dangerous",
        "workers.register",
        "workflows.run",
    }
)
# What is done under a lease or as a worker: only machines hold it, not even admins.
MACHINES_VERBS = frozenset({"act", "report"})
# The one path of who may only register.
REGISTRATION = frozenset({"POST /workers/register"})
# What a session may do before its password is changed or its second factor is set up.
LIMITED = ("/auth/me", "/auth/change-password", "/auth/mfa/", "/auth/logout", "/auth/reauth")


def is_machines(permission: str) -> bool:
    """Whether no person holds it."""
    return permission.rpartition(".")[2] in MACHINES_VERBS


def holds(role: str, permission: str) -> bool:
    """Whether people of this role hold it."""
    area, _, verb = permission.partition(".")
    if is_machines(permission):
        return False
    if role == "admin":
        return True
    if area == "audit":
        return role == "auditor" and verb in ("read", "export")
    if role == "auditor" or area in ADMINS_AREAS or verb == "manage" or permission == "cost.write":
        return False
    if verb == "read":
        return True
    return role == "member" and (verb == "write" or permission in MEMBERS_OWN)


def suffices(role: str, needs: Iterable[str]) -> bool:
    """Whether people of this role may call a route with these needs."""
    return any(need in (PUBLIC, SIGNED_IN, ANY_CALLER) or holds(role, need) for need in needs)


def is_for_limited(route: Route) -> bool:
    """Whether a session answers here that must first change its password or set up a second factor."""
    return any(route.path == place or (place[-1] == "/" and route.path.startswith(place)) for place in LIMITED)
