"""Routes for admins: the sign-in policy, the IP rules and the sessions of all users."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.http.answers import IfMatch, Request
from corral.http.page import Page
from corral.http.routes import Routes
from corral_core.accounts.api import Accounts, AllSessions, UserSessionQuery, UserSessionView
from corral_plugins.security.service.api_keys import ApiKeys
from corral_plugins.security.service.ip_rules import IpRules
from corral_plugins.security.service.policies import SecurityPolicies
from corral_plugins.security.shapes import (
    AddressToCheck,
    AddressVerdict,
    NewRules,
    PasswordPolicyPatch,
    PasswordPolicyView,
    PolicyPatch,
    PolicyView,
    RevocationResult,
    RulesView,
    SessionRevocation,
)

READ, WRITE = "security.read", "security.write"

routes = Routes("/security", tag="Security", no_store=True)


@routes.get("/", needs=READ, live=True)
def read_security(policy: SecurityPolicies) -> PolicyView:
    """Read the sign-in policy, with warnings about the configuration."""
    return policy.get_policy()


@routes.put("/", needs=WRITE, own_session=True, raises=("setting_locked", "would_lock_out", "audit_unavailable"))
def update_security(body: PolicyPatch, match: IfMatch, caller: Principal, policy: SecurityPolicies) -> PolicyView:
    """Change the sign-in policy. Shortened session lifetimes also apply to existing sessions."""
    return policy.change_policy(body, match, by=caller)


@routes.get("/password-policy", needs=READ)
def read_password_policy(policy: SecurityPolicies) -> PasswordPolicyView:
    """Read the requirements for new passwords."""
    return policy.get_password_policy()


@routes.put("/password-policy", needs=WRITE, own_session=True, raises=("setting_locked", "audit_unavailable"))
def update_password_policy(
    body: PasswordPolicyPatch, match: IfMatch, caller: Principal, policy: SecurityPolicies
) -> PasswordPolicyView:
    """Change the password policy. The new policy applies the next time that a user changes their password."""
    return policy.change_password_policy(body, match, by=caller)


@routes.get("/ip-rules", needs=READ, live=True)
def read_ip_rules(request: Request, rules: IpRules) -> RulesView:
    """Read the IP rules, their mode, and the client address of this request."""
    return rules.get_rules(request.client_ip)


@routes.put("/ip-rules", needs=WRITE, own_session=True, raises=("would_lock_out", "audit_unavailable"))
def replace_ip_rules(body: NewRules, request: Request, match: IfMatch, caller: Principal, rules: IpRules) -> RulesView:
    """Replace all IP rules.

    If several rules match an address, the rule with the most specific network applies. If two rules have the same
    network, `block` takes precedence over `allow`. The mode `allowlist` rejects every address that no rule allows. The
    mode `blocklist` rejects only addresses that a rule blocks.
    """
    return rules.replace_rules(body, client_ip=request.client_ip, if_match=match, by=caller)


@routes.post("/ip-rules/check", needs=READ)
def check_address(body: AddressToCheck, rules: IpRules) -> AddressVerdict:
    """Check whether the IP rules allow an address, and return the rule that applies to it."""
    return rules.check_address(body.ip)


@routes.get("/sessions", needs=READ)
def list_sessions(query: UserSessionQuery, caller: Principal, sessions: AllSessions) -> Page[UserSessionView]:
    """List the active sessions of all users, newest first."""
    return sessions.list(query, caller)


@routes.delete("/sessions/{id}", needs=WRITE, own_session=True, raises=("audit_unavailable",))
def end_session(id: str, sessions: AllSessions) -> None:
    """End a session, invalidate its tokens, and close its WebSocket connections."""
    sessions.end(id, "revoked")


@routes.post("/users/{id}/revoke-sessions", needs=WRITE, own_session=True, raises=("audit_unavailable",))
def revoke_sessions(id: str, body: SessionRevocation, accounts: Accounts, keys: ApiKeys) -> RevocationResult:
    """End all sessions of a user. If `include_api_keys` is true, also revoke all of the user's API keys."""
    accounts.get(id)
    return RevocationResult(
        sessions=accounts.end_sessions(id, "revoked"),
        api_keys=keys.revoke_keys_of(id) if body.include_api_keys else 0,
    )
