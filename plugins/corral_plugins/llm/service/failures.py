"""What a provider's failure means: whether to try again, whether another model may help, which problem is told."""

from __future__ import annotations

from typing import Any

from corral.errors import CODES, Conflict, Invalid, Problem, TooMany
from corral.redact.redactor import Redactor
from corral_plugins.llm.api import ProviderError

SILENT = (408, 504)
AGAIN = (408, 409, 429)
CALLERS = (400, 413, 422)
TEXT_LIMIT = 1024
SHOWN = 5
CREDENTIALS = "credentials"
_KINDS = {401: CREDENTIALS, 402: CREDENTIALS, 403: CREDENTIALS, 404: "model"}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def may_try_again(failure: ProviderError) -> bool:
    """Whether the same provider may answer a little later, and has not begun to work for money."""
    is_passing = failure.status in AGAIN or failure.status >= 500
    return is_passing and failure.code is None and not failure.reached


def may_fall_back(failure: ProviderError) -> bool:
    """Whether another model may serve the request: the failure says nothing about it, and no answer had begun."""
    return failure.code is not None or not (failure.reached or failure.status in CALLERS)


def timed_out(name: str, seconds: float, what: str) -> ProviderError:
    """The gateway's own patience ended; asking once more would take as long again."""
    return ProviderError(504, f"{name}: {what} within {seconds:g} seconds.", code="upstream_timeout", reached=True)


def lease_lost() -> Conflict:
    """The lease under which a call runs has ended, or its task is being cancelled."""
    return Conflict("The lease has ended; stop and discard.", code="lease_lost")


def problem_of(failure: ProviderError, provider: str, redactor: Redactor) -> Problem:
    """The problem that the caller is told; the provider's own text is in it, redacted, at most 1 KiB."""
    said = redactor.redact(failure.message[: 4 * TEXT_LIMIT]).encode()[:TEXT_LIMIT].decode(errors="ignore")
    detail = f"{provider}: {said}"
    if failure.code is not None:
        headers = {"Retry-After": str(failure.retry_after or 1)} if CODES[failure.code][0] == 503 else None
        return Problem(detail, code=failure.code, headers=headers, provider=provider)
    if failure.status in CALLERS:
        return Invalid.at("/messages", "not_allowed", detail)
    if failure.status == 429:
        return TooMany(detail, retry_after=failure.retry_after or 1, provider=provider)
    if failure.status in SILENT:
        return Problem(detail, code="upstream_timeout", provider=provider)
    return Problem(detail, code="provider_error", kind=_KINDS.get(failure.status, "provider"), provider=provider)


def is_about_credentials(problem: Problem) -> bool:
    """Whether the provider refuses its key."""
    return problem.members.get("kind") == CREDENTIALS


def openai_error(problem: Problem) -> dict[str, Any]:
    """The problem as OpenAI's clients show it: they know the message only, so that it names the first faults."""
    faults = [f"{fault.pointer}: {fault.detail}" for fault in problem.errors[:SHOWN] if fault.detail != problem.detail]
    first = problem.errors[0].pointer if problem.errors else None
    return {
        "message": f"{problem.detail}: {'; '.join(faults)}" if faults else problem.detail,
        "type": _TYPES.get(problem.status, "server_error" if problem.status >= 500 else "invalid_request_error"),
        "code": problem.code,
        "param": first.lstrip("/").replace("/", ".") if first else None,
    }
