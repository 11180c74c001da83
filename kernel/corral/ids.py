"""UUIDv7 identifiers, the primary keys of all tables. They have 36 characters, sort by time and are not secrets."""

from __future__ import annotations

import re

from uuid_utils import uuid7

ID_PATTERN = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")


def new_id() -> str:
    """Return a new UUIDv7 in lower case with hyphens."""
    return str(uuid7())


def parse_id(text: str) -> str | None:
    """Return the canonical form of an id from a path or body, or None if the id is not valid."""
    return text.lower() if ID_PATTERN.fullmatch(text) else None
