"""Turns text from people and agents into plain text that no service interprets as markup or mentions.

No function needs a unit of work.
"""

from __future__ import annotations

import re
import unicodedata

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
_SPACES = re.compile(r"\s+")
_ANGLES = re.compile(
    r"<(?:(?:[!@#]|users/)[^<>]{0,200}|[^<>]{0,2000}\|[^<>]{0,2000}|(?:https?|mailto|tel|tg):[^<>]{0,2000})>"
)
_MENTION = re.compile(r"(?<!\w)[@＠]+(?=\w)")  # the @ of an address follows a letter or a digit
_LINK = re.compile(r"\[([^\[\]]{0,500})\]\([^()\s]{0,2000}\)")
_MARKUP = re.compile(r"[*`~]|(?<!\w)_|_(?!\w)")
CUT = "…"


def one_line(text: str, limit: int) -> str:
    """Return the text as one line of at most `limit` characters, without control characters."""
    return truncate(_SPACES.sub(" ", _CONTROLS.sub(" ", text)).strip(), limit)


def without_control_characters(text: str, limit: int) -> str:
    """Return at most `limit` characters of the text, without control characters except line breaks."""
    return truncate(_CONTROLS.sub(" ", text.replace("\r\n", "\n")).strip(), limit)


def truncate(text: str, limit: int, tail: str = "") -> str:
    """Return a string of at most `limit` characters. A longer string is cut and ends with an ellipsis and `tail`."""
    if len(text) + len(tail) <= limit:
        return text + tail
    return text[: max(0, limit - len(tail) - len(CUT))].rstrip() + CUT + tail


def without_markup(text: str) -> str:
    """Return a string without markup and mentions, for services that interpret markup and mentions.

    The string contains no `@channel`, `@here` or `@name`, no links whose label hides the address, and no bold or code
    markers.
    """
    text = unicodedata.normalize("NFC", text)
    text = _ANGLES.sub("", text)
    text = _LINK.sub(r"\1", text)
    return _MENTION.sub("", _MARKUP.sub("", text))  # last, because markup may stand between the @ and the name


def length_utf16(text: str) -> int:
    """Return the length of a string in UTF-16 code units, in which some services measure their length limits."""
    return len(text.encode("utf-16-le")) // 2


def truncate_utf16(text: str, limit: int, tail: str = "") -> str:
    """Return a string of at most `limit` UTF-16 units. A longer string is cut and ends with an ellipsis and `tail`."""
    if length_utf16(text) + length_utf16(tail) <= limit:
        return text + tail
    room = limit - length_utf16(tail) - 1
    kept = text.encode("utf-16-le")[: room * 2].decode("utf-16-le", "ignore")
    return kept.rstrip() + CUT + tail
