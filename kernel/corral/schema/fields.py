"""Types for the fields of request and response bodies, such as names, strings and ids, including their limits."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

# Valid in Python and ECMAScript. `$` would accept a trailing newline in Python, so a lookahead marks the end.
LINE = r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]*(?![\s\S])"
SLUG = r"^[a-z0-9][a-z0-9_-]{0,63}(?![\s\S])"
UUID = r"^[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}(?![\s\S])"


def line(max_length: int, min_length: int = 1) -> Meta:
    """Return the constraint for a single line of text without control characters, as in `Annotated[str, line(80)]`."""
    return Meta(min_length=min_length or None, max_length=max_length, pattern=LINE)


def text_format(pattern: str, expected: str, **limits: Any) -> Meta:
    """Return the constraint for text that matches a pattern, for example `text_format("^[0-9]{4}$", "4 digits")`.

    `expected` describes the accepted text in errors, because people should not have to read the pattern. `limits` are
    further arguments of `Meta`.
    """
    return Meta(pattern=pattern, extra_json_schema={"patternErrorMessage": expected}, **limits)


IDENTIFIER = Meta(extra={"identifier": True})
"""Marks a field that is refused if it contains a credential, because a redacted identifier identifies nothing."""
Name = Annotated[str, line(100), IDENTIFIER]
Title = Annotated[str, line(200)]
ShortText = Annotated[str, line(500, 0)]
Text = Annotated[str, Meta(max_length=65536)]
Slug = Annotated[str, text_format(SLUG, "1 to 64 characters of a-z, 0-9, - and _, beginning with a letter or digit")]
Id = Annotated[str, Meta(pattern=UUID, extra_json_schema={"format": "uuid"})]
Instant = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]  # output only
MomentIn = Annotated[datetime, Meta(tz=True)]  # input only
Tags = Annotated[list[Annotated[str, line(64)]], Meta(max_length=20)]


class OpenShape(msgspec.Struct, dict=True):
    """Base class of request bodies that may contain undeclared fields. Handlers read these fields from `undeclared`."""

    undeclared: ClassVar[dict[str, Any]] = {}
