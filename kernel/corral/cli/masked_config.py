"""Formats the configuration for commands and the API: every value with its source, and credentials masked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from corral.config.model import CREDENTIAL_IN_URL, MASK, SECRET_NAME, Config, Row


def masked_rows(config: Config) -> list[Row]:
    """Return the rows of `Config.rows`, with values as JSON and with credentials masked."""
    return [row._replace(value=masked(row.value, secret=row.secret)) for row in config.rows()]


def masked(value: Any, *, secret: bool = False) -> Any:
    """Return a configuration value as JSON, with the credentials in it masked.

    If `secret` is true, the whole value is masked; in a table or list, every item is masked.
    """
    if isinstance(value, Mapping):
        return {name: masked(item, secret=secret or bool(SECRET_NAME.search(name))) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item, secret=secret) for item in value]
    if secret and value is not None:
        return MASK
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return CREDENTIAL_IN_URL.sub(_masked_match, str(value))


def _masked_match(match: re.Match[str]) -> str:
    start, end = (place - match.start() for place in match.span(match.lastindex or 0))
    return match[0][:start] + MASK + match[0][end:]
