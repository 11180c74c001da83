"""The template scanner, which divides a string into text and `{{ expression }}` parts.

The tokens of an expression determine where it ends, so braces in its strings and objects do not close it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from corral_core.expressions.service.tokens import scan


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a string: either text, or an expression without its braces.

    `source` is the original text of the part.
    """

    source: str
    expression: str | None = None
    is_closed: bool = True


@functools.lru_cache(maxsize=1024)
def split_template(text: str) -> tuple[Part, ...]:
    """Return the parts of a string. An unclosed expression becomes the last part."""
    parts, offset = [], 0
    while (start := text.find("{{", offset)) >= 0:
        if start > offset:
            parts.append(Part(text[offset:start]))
        end = _end_of_expression(text, start + 2)
        if end is None:
            return (*parts, Part(text[start:], text[start + 2 :], is_closed=False))
        parts.append(Part(text[start : end + 2], text[start + 2 : end].strip()))
        offset = end + 2
    if offset < len(text):
        parts.append(Part(text[offset:]))
    return tuple(parts)


def _end_of_expression(text: str, start: int) -> int | None:
    """Return the offset of the braces that close an expression, or None if they are missing.

    If a character cannot begin a token, the expression is invalid and ends at the next pair of closing braces.
    """
    depth = 0
    for token in scan(text, start):
        if token.kind == "unknown":
            found = text.find("}}", token.start)
            return found if found >= 0 else None
        if token.text == "{":
            depth += 1
        elif token.text == "}":
            if depth == 0:
                return token.start if text.startswith("}}", token.start) else None
            depth -= 1
    return None


def walk_strings(value: Any, pointer: str = "") -> Iterator[tuple[str, str]]:
    """Yield the JSON pointer and the text of each string that contains an expression, within a JSON value."""
    if isinstance(value, str):
        if "{{" in value:
            yield pointer, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from walk_strings(item, f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk_strings(item, f"{pointer}/{index}")
