"""The encodings in which a credential may appear in text, and the test for values that can be redacted."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

SHORTEST, LONGEST = 8, 4096
SHORTEST_LINE = 24
LONGEST_WORD = 15
LINE_WIDTHS = (64, 76)  # openssl breaks base64 into lines of 64 characters; `base64` and MIME use 76
FEWEST_CHARACTERS = 4
# Characters that URL-encoding functions leave unescaped: in query values, in paths, by encodeURIComponent, by
# encodeURI.
UNESCAPED = ("", "/", "!'()*", "!'()*;,/?:@&=+$#")
GO_JSON_ESCAPES = str.maketrans({"&": "\\u0026", "<": "\\u003c", ">": "\\u003e"})


def is_redactable(value: str) -> bool:
    """Return whether the value can be redacted without damaging ordinary text.

    Short values, repetitive values and single words cannot be redacted.
    """
    value = value.strip()
    if len(value) < SHORTEST or len(set(value)) < FEWEST_CHARACTERS:
        return False
    is_word = value.isalpha() and (value[1:].islower() or value.isupper())
    return not (is_word and len(value) <= LONGEST_WORD)


def encodings(value: str) -> set[str]:
    """Return every string that reveals the value: the value itself and its encoded and escaped forms.

    Each string has 8 to 4096 characters. If the value is longer, its long lines are encoded instead. If an encoding is
    longer, it is split into pieces.
    """
    value = value.strip()
    parts = [value]
    if len(value) > LONGEST:
        parts = [line.strip() for line in value.splitlines() if len(line.strip()) >= SHORTEST_LINE]
    return {piece for part in parts for encoding in _encoded(part) for piece in _fragments(encoding)}


def _encoded(value: str) -> Iterator[str]:
    data = value.encode("utf-8", "surrogatepass")
    yield value
    yield data.hex()
    yield data.hex().upper()
    yield from _base64(data)
    for percent in (*(quote(data, safe=kept) for kept in UNESCAPED), quote_plus(data), _html_form(data)):
        yield from (percent, re.sub("%..", lambda escape: escape[0].lower(), percent))
    for escaped in (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
        in_json = json.dumps(escaped)[1:-1]  # a JSON string inside a JSON string
        for text in (escaped, escaped.translate(GO_JSON_ESCAPES), in_json):
            yield from (text, text.replace("/", "\\/"))
    units = value.encode("utf-16-be", "surrogatepass").hex(" ", 2).split(" ")
    yield from ("".join(f"\\u{unit}" for unit in units), "".join(f"\\u{unit.upper()}" for unit in units))
    yield html.escape(value)
    yield html.escape(value).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")


def _html_form(data: bytes) -> str:
    """Return the data as browsers and Java encode it for `application/x-www-form-urlencoded`."""
    return quote_plus(data, safe="*").replace("~", "%7E")


def _base64(data: bytes) -> Iterator[str]:
    """Yield the base64 encodings that the data can have within longer data, for each of the three byte offsets.

    For each offset, the first string contains only the characters that depend on no neighbouring byte. Two more strings
    extend to the end of the encoding, with and without padding. For offset 0, the lines of the wrapped encoding are
    also yielded.
    """
    for before in range(3):
        padded = b"\0" * before + data
        whole = base64.b64encode(padded).decode()
        first = (0, 2, 3)[before]
        certain = whole[first : len(padded) * 8 // 6]
        for text in (certain, whole[first:].rstrip("="), whole[first:], *(() if before else _wrapped_lines(certain))):
            yield text
            yield text.replace("+", "-").replace("/", "_")


def _wrapped_lines(text: str) -> Iterator[str]:
    """Yield the lines that result when base64 text is wrapped at each of the usual line widths."""
    parts = (text[at : at + width] for width in LINE_WIDTHS if len(text) > width for at in range(0, len(text), width))
    return filter(is_redactable, parts)


def _fragments(text: str) -> Iterator[str]:
    if len(text) < SHORTEST:
        return
    for start in range(0, len(text) - LONGEST, LONGEST):
        yield text[start : start + LONGEST]
    yield text[-LONGEST:]
