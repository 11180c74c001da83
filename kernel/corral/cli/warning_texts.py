"""The warnings in responses that several areas share, in words for people."""

from __future__ import annotations

from collections.abc import Iterable

TEXTS = {
    "unresolved_host": "the host name does not resolve now; check its spelling, and the name server that Corral uses",
    "not_redactable": "the value is so short or common that Corral cannot hide it in logs; choose a longer one",
}


def warnings_in_words(warnings: Iterable[str]) -> list[str]:
    """Return a line for each warning, with what to do about it."""
    return [f"Warning: {TEXTS.get(warning, warning)}." for warning in warnings]
