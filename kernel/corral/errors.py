"""Defines problems (RFC 9457), which are the error responses that clients receive.

Services raise subclasses such as `NotFound` or `Conflict`, which are rendered as `application/problem+json`. Clients
rely on the stable `code`. `detail` is a sentence for people.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec


class Code(NamedTuple):
    """A problem code: its HTTP status, its title, and its remedy, which is a sentence that says what to do."""

    status: int
    title: str
    remedy: str = ""


_TABLE = json.loads(Path(__file__).with_name("errors.json").read_bytes())
CODES: dict[str, Code] = {code: Code(**entry) for code, entry in _TABLE.items()}
"""The problem codes. Plugins add codes with `declare_codes`."""
LIMITING_CODES: set[str] = set()
"""The possible values of `Principal.limited`: problem codes that routes not marked `limited` may return."""


def declare_codes(codes: Mapping[str, tuple[int, str] | tuple[int, str, str]], *, limiting: bool = False) -> None:
    """Declare the problem codes of a plugin, `{code: (HTTP status, title, remedy)}`.

    Call this function at import time, in the plugin's module `api`. The remedy is a sentence that says what to do; the
    page `/problems/<code>` shows it.

    If `limiting` is true, `Principal.limited` may be set to one of these codes: every route that is not marked
    `limited` then refuses the principal with this code. Raise `ValueError` if a code is already declared with another
    status or title.
    """
    for code, meaning in codes.items():
        if CODES.setdefault(code, Code(*meaning)) != meaning:
            raise ValueError(f"the problem code {code} is already declared as {CODES[code]}; choose another name")
    if limiting:
        LIMITING_CODES.update(codes)


class FieldError(msgspec.Struct, frozen=True, omit_defaults=True):
    """An item of `errors[]` in a problem document.

    `pointer` is a JSON pointer, `/query/<name>` or `/header/<name>`. `code` is stable, and `detail` says what is wrong.
    """

    pointer: str
    code: str
    detail: str


class ExpectedFailure(Exception):
    """Base class of expected failures, such as a tool's error response. They do not count as plugin errors."""


class ContributionFailed(ExpectedFailure):
    """Raised when a callable that a plugin contributed fails, or when the plugin is out of service.

    If the callable failed, the failure has already been counted against the plugin. The caller should continue as if
    the plugin had not contributed the callable.
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
        self.status, self.title, _ = CODES[self.code]
        self.detail = detail or self.title + "."
        self.errors, self.headers = tuple(errors), dict(headers or {})
        self.members = members
        super().__init__(f"{self.code}: {self.detail}")

    def document(self, instance: str, request_id: str) -> dict[str, Any]:
        """Return the RFC 9457 document, with at most 100 items in `errors`."""
        body: dict[str, Any] = {"type": f"/problems/{self.code}", "title": self.title, "status": self.status}
        body |= {"detail": self.detail, "instance": instance, "code": self.code, "request_id": request_id}
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
    """409: the object's state does not allow the operation. With the code `invalid_state`, pass `current_status=`."""

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
    """422: the request is well-formed but not valid. `errors` lists what is wrong."""

    default = "validation_error"

    @classmethod
    def at(cls, pointer: str, code: str, detail: str, *, problem: str | None = None) -> Invalid:
        """Return a problem with a single field error, at the given JSON pointer.

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

    `faults` contains one line for each fault, to be shown to the operator.
    """

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        super().__init__("; ".join(faults))
