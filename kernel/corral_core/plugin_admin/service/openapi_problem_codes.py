"""Determines the problem codes that a route may return, for the OpenAPI document and the reference pages."""

from __future__ import annotations

import inspect
import typing

from corral.auth.principal import ANY_CALLER, PUBLIC
from corral.errors import CODES, LIMITING_CODES, Problem
from corral.http.handler_signature import Signature
from corral.http.page import PageQuery
from corral.http.routes import Route

# Problem codes that every route may return. Every route reads an announced body, even if its handler takes none, and
# refuses unknown query parameters.
EVERYWHERE = """
malformed_request malformed_json ip_blocked method_not_allowed request_timeout payload_too_large uri_too_long
unsupported_media_type validation_error concurrency_limit rate_limited headers_too_large internal overloaded
dependency_unavailable shutting_down storage_full plugin_disabled plugin_failed audit_unavailable"""
EVERY_ROUTE = frozenset(EVERYWHERE.split())


def problem_codes(route: Route, signature: Signature) -> dict[int, set[str]]:
    """Return the problem codes that the route may return, keyed by status.

    Codes that no plugin declares are omitted.
    """
    codes = {*EVERY_ROUTE, *route.raises}
    if not route.exempt_host:
        codes.add("invalid_host")
    if PUBLIC not in route.needs:
        codes |= {"unauthenticated", "token_expired", "session_revoked", "vault_sealed"}
        open_to_all = ANY_CALLER in route.needs and not route.own_session
        codes |= {"forbidden"} if open_to_all else {"forbidden", "insufficient_scope"}
        codes |= {"reauth_required"} if route.step_up else set()
        codes |= set() if route.limited else LIMITING_CODES
    if route.path_parameters:
        codes.add("not_found")
    if route.keyed:
        codes |= {"idempotency_in_progress", "idempotency_key_reused"}
    if signature.if_match is not None:
        codes.add("precondition_failed")
    query = typing.get_origin(signature.query) or signature.query
    if inspect.isclass(query) and issubclass(query, PageQuery):
        codes.add("invalid_cursor")
    found: dict[int, set[str]] = {}
    for problem in (Problem(code=code) for code in codes & CODES.keys()):
        if route.explain is not None:
            route.explain(problem, None)
        found.setdefault(problem.status, set()).add(problem.code)
    return found
