"""UUIDv7 identifiers, the ids of all tables: 36 characters, sortable by time. They are not secrets."""

from __future__ import annotations

import re

from uuid_utils import uuid7

ID_PATTERN = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")


def new_id() -> str:
    """A new UUIDv7, lower case with hyphens."""
    return str(uuid7())


def parse_id(text: str) -> str | None:
    """The canonical form of an id in a path or body; None if it is not valid."""
    return text.lower() if ID_PATTERN.fullmatch(text) else None
