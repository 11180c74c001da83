"""What a provider's failure means: for the caller a problem, for the gateway whether another model may help."""

from __future__ import annotations

from typing import Any

from corral.errors import Invalid, Problem, TooMany
from corral_plugins.llm.api import ProviderError

CALLERS_OWN = (400, 422)
TEXT_LIMIT = 1024
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def may_fall_back(failure: ProviderError) -> bool:
    """Whether the failure says nothing about the request itself, so that another model may serve it."""
    return failure.status not in CALLERS_OWN


def problem_of(failure: ProviderError, provider: str) -> Problem:
    """The problem that the caller is told; the provider's own text is in it, at most 1 KiB."""
    said = failure.message.encode()[:TEXT_LIMIT].decode(errors="ignore")
    detail = f"{provider}: {said}"
    if failure.status in CALLERS_OWN:
        return Invalid.at("/messages", "not_allowed", detail)
    if failure.status == 429:
        return TooMany(detail, retry_after=failure.retry_after or 1, provider=provider)
    if failure.status in (408, 504):
        return Problem(detail, code="upstream_timeout", provider=provider)
    kind = {401: "credentials", 403: "credentials", 404: "model"}.get(failure.status, "provider")
    return Problem(detail, code="provider_error", kind=kind, provider=provider)


def openai_error(problem: Problem) -> dict[str, Any]:
    """The problem as OpenAI's clients show it."""
    first = problem.errors[0].pointer if problem.errors else None
    return {
        "message": problem.detail,
        "type": _TYPES.get(problem.status, "server_error" if problem.status >= 500 else "invalid_request_error"),
        "code": problem.code,
        "param": first.lstrip("/").replace("/", ".") if first else None,
    }
