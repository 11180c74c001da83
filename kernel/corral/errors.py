"""Problems (RFC 9457): every error response that a client receives.

Services raise subclasses such as `NotFound` or `Conflict`, which are rendered as `application/problem+json`. Clients
rely on the stable `code`. `detail` is a sentence for people.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import msgspec

# Maps each code to (HTTP status, title). A code has exactly one status. Plugins add codes with `declare_codes`.
CODES: dict[str, tuple[int, str]] = {
    "malformed_json": (400, "The body is not valid JSON"),
    "malformed_multipart": (400, "The multipart body is malformed"),
    "malformed_request": (400, "The request is malformed"),
    "invalid_host": (400, "The Host header is not accepted by this installation"),
    "unauthenticated": (401, "A credential is required"),
    "token_expired": (401, "The token has expired"),
    "session_revoked": (401, "The session has ended"),
    "forbidden": (403, "Not allowed"),
    "insufficient_scope": (403, "The credential lacks a required scope"),
    "ip_blocked": (403, "The IP address is blocked"),
    "reauth_required": (403, "Confirm your identity first"),
    "not_found": (404, "Not found"),
    "method_not_allowed": (405, "Method not allowed"),
    "not_acceptable": (406, "No acceptable representation"),
    "request_timeout": (408, "The request took too long to arrive"),
    "invalid_state": (409, "The state of the object does not allow this"),
    "idempotency_in_progress": (409, "The first request with this key is still running"),
    "duplicate": (409, "The object already exists"),
    "in_use": (409, "The object is in use"),
    "setting_locked": (409, "The value is pinned by the configuration"),
    "cursor_expired": (410, "The cursor has expired"),
    "precondition_failed": (412, "The version is outdated"),
    "payload_too_large": (413, "The body is too large"),
    "uri_too_long": (414, "The URL is too long"),
    "unsupported_media_type": (415, "The media type is not supported"),
    "range_not_satisfiable": (416, "The range is not satisfiable"),
    "validation_error": (422, "Validation failed"),
    "unknown_reference": (422, "A referenced object does not exist"),
    "unknown_event": (422, "The event type does not exist"),
    "unknown_setting": (422, "The setting does not exist"),
    "idempotency_key_reused": (422, "The idempotency key was used with another body"),
    "url_blocked": (422, "Connections to the address are not allowed"),
    "masked_value_submitted": (422, "The mask was submitted instead of a value"),
    "invalid_cursor": (422, "The cursor is not valid for this list"),
    "schema_mismatch": (422, "The value does not match the schema"),
    "precondition_required": (428, "If-Match is required"),
    "rate_limited": (429, "Too many requests"),
    "quota_exceeded": (429, "The quota is used up"),
    "concurrency_limit": (429, "Too many concurrent requests"),
    "headers_too_large": (431, "The headers are too large"),
    "internal": (500, "Internal error"),
    "upstream_error": (502, "The remote server failed"),
    "upstream_timeout": (504, "The remote server did not answer in time"),
    "dependency_unavailable": (503, "A dependency is unavailable"),
    "vault_sealed": (503, "The vault is sealed"),
    "plugin_disabled": (503, "The plugin is disabled"),
    "plugin_failed": (503, "The plugin has failed"),
    "storage_full": (503, "The storage is full"),
    "audit_unavailable": (503, "The audit log cannot be written"),
    "overloaded": (503, "The server is overloaded"),
    "shutting_down": (503, "The server is shutting down"),
}
LIMITING_CODES: set[str] = set()
"""The problem codes that `Principal.limited` may have. Every route that is not marked `limited` may return them."""


def declare_codes(codes: Mapping[str, tuple[int, str]], *, limiting: bool = False) -> None:
    """Declare the problem codes of a plugin, `{code: (HTTP status, title)}`.

    Call this function at import time, in the plugin's module `api`.

    With `limiting`, `Principal.limited` may be one of these codes: every route that is not marked `limited` then
    refuses the principal with this code. Raises `ValueError` if a code is already declared with another status or
    title.
    """
    for code, meaning in codes.items():
        if CODES.setdefault(code, meaning) != meaning:
            raise ValueError(f"the problem code {code} is already declared as {CODES[code]}; choose another name")
    if limiting:
        LIMITING_CODES.update(codes)


class FieldError(msgspec.Struct, frozen=True, omit_defaults=True):
    """An item of `errors[]` in a problem document.

    `pointer` is a JSON pointer, `/query/<name>` or `/header/<name>`. `code` is stable, and `detail` describes the
    fault.
    """

    pointer: str
    code: str
    detail: str


class ExpectedFailure(Exception):
    """Base class of expected failures, such as a tool's error response. They do not count as errors of a plugin."""


class ContributionFailed(ExpectedFailure):
    """Raised when a callable that a plugin contributed failed, or when the plugin is out of service.

    A failure has already been counted against the plugin. The caller continues as if the plugin had not contributed the
    callable.
    """


class Problem(ExpectedFailure):
    """A failure with a stable code. `members` such as `current_status` are added to the problem document."""

    default: ClassVar[str] = "internal"

    def __init__(
        self,
        detail: str = "",
        *,
        code: str | None = None,
        errors: Iterable[FieldError] = (),
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        self.code = code or self.default
        self.status, self.title = CODES[self.code]
        self.detail = detail or self.title + "."
        self.errors, self.headers = tuple(errors), dict(headers or {})
        self.members = members
        super().__init__(f"{self.code}: {self.detail}")

    def document(self, instance: str, request_id: str) -> dict[str, Any]:
        """Return the RFC 9457 document, with at most 100 items in `errors`."""
        body: dict[str, Any] = {
            "type": f"/problems/{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": instance,
            "code": self.code,
            "request_id": request_id,
        }
        if self.errors:
            body["errors"] = self.errors[:100]
        body.update(self.members)
        return body


class Malformed(Problem):
    """400: the request cannot be parsed."""

    default = "malformed_request"


class Unauthorized(Problem):
    """401: the credential is missing, expired, invalid or revoked."""

    default = "unauthenticated"


class Forbidden(Problem):
    """403: the caller lacks the permission."""

    default = "forbidden"


class NotFound(Problem):
    """404: the object does not exist or is not visible to the caller."""

    default = "not_found"


class Conflict(Problem):
    """409: the state of the object does not allow the operation. With code `invalid_state`, pass `current_status=`."""

    default = "invalid_state"


class Gone(Problem):
    """410: a link, a cursor or a similar resource has expired."""

    default = "cursor_expired"


class PreconditionFailed(Problem):
    """412: `If-Match` or an expected version is outdated. Pass `current_version=`."""

    default = "precondition_failed"


class TooLarge(Problem):
    """413: the body exceeds the limit of the route."""

    default = "payload_too_large"


class Invalid(Problem):
    """422: the request is well-formed but not valid. `errors` lists the faults."""

    default = "validation_error"

    @classmethod
    def at(cls, pointer: str, code: str, detail: str, *, problem: str | None = None) -> Invalid:
        """Return a problem with a single fault, at this JSON pointer.

        For example: `Invalid.at("/name", "not_unique", "…")`.
        """
        return cls(detail, code=problem, errors=(FieldError(pointer, code, detail),))


class _RetryLater(Problem):
    """Base class of problems with a `Retry-After` header. `retry_after` is in seconds."""

    def __init__(self, detail: str = "", *, retry_after: int = 1, code: str | None = None, **members: Any) -> None:
        super().__init__(detail, code=code, headers={"Retry-After": str(retry_after)}, **members)


class TooMany(_RetryLater):
    """429: a limit was reached."""

    default = "rate_limited"


class Unavailable(_RetryLater):
    """503: a dependency, a plugin or the process is unavailable."""

    default = "dependency_unavailable"


class NoUnit(RuntimeError):
    """Raised when a service is called outside a unit of work."""


class NestedUnit(RuntimeError):
    """Raised when `work()` is called inside a unit of work."""


class StartupError(Exception):
    """Raised when the process refuses to start, for example because of its configuration (exit status 3).

    `faults` contains one line for the operator per fault.
    """

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        super().__init__("; ".join(faults))
