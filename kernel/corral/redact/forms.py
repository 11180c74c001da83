"""The forms in which a credential may turn up in text, and which values are worth looking for."""

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
WIDTHS = (64, 76)  # of the lines that openssl, and base64 and MIME, make of base64
FEWEST_CHARACTERS = 4
UNESCAPED = ("", "/", "!'()*", "!'()*;,/?:@&=+$#")  # in values and paths of URLs; by encodeURIComponent and encodeURI
FIT_FOR_HTML = str.maketrans({"&": "\\u0026", "<": "\\u003c", ">": "\\u003e"})  # the JSON of Go


def redactable(value: str) -> bool:
    """Whether blotting out the value leaves ordinary text alone: it is neither short, monotonous nor one plain word."""
    value = value.strip()
    if len(value) < SHORTEST or len(set(value)) < FEWEST_CHARACTERS:
        return False
    is_word = value.isalpha() and (value[1:].islower() or value.isupper())
    return not (is_word and len(value) <= LONGEST_WORD)


def forms(value: str) -> set[str]:
    """Every text that gives the value away: as it is, encoded and escaped; each of 8 to 4096 characters.

    A value beyond 4096 characters is known by its long lines; a form beyond that by pieces of this length.
    """
    value = value.strip()
    parts = [value]
    if len(value) > LONGEST:
        parts = [line.strip() for line in value.splitlines() if len(line.strip()) >= SHORTEST_LINE]
    return {piece for part in parts for form in _encoded(part) for piece in _pieces(form)}


def _encoded(value: str) -> Iterator[str]:
    data = value.encode("utf-8", "surrogatepass")
    yield value
    yield data.hex()
    yield data.hex().upper()
    yield from _base64(data)
    for percent in (*(quote(data, safe=kept) for kept in UNESCAPED), quote_plus(data), _of_html_form(data)):
        yield from (percent, re.sub("%..", lambda escape: escape[0].lower(), percent))
    for escaped in (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
        for form in (escaped, escaped.translate(FIT_FOR_HTML), json.dumps(escaped)[1:-1]):  # the last: JSON in JSON
            yield from (form, form.replace("/", "\\/"))
    units = value.encode("utf-16-be", "surrogatepass").hex(" ", 2).split(" ")
    yield from ("".join(f"\\u{unit}" for unit in units), "".join(f"\\u{unit.upper()}" for unit in units))
    yield html.escape(value)
    yield html.escape(value).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")


def _of_html_form(data: bytes) -> str:
    """As browsers and Java write it into `application/x-www-form-urlencoded`."""
    return quote_plus(data, safe="*").replace("~", "%7E")


def _base64(data: bytes) -> Iterator[str]:
    """For each place that it can have in a longer text what it alone decides, and its end; if it is all, in lines."""
    for before in range(3):
        padded = b"\0" * before + data
        whole = base64.b64encode(padded).decode()
        first = (0, 2, 3)[before]
        sure = whole[first : len(padded) * 8 // 6]
        for form in (sure, whole[first:].rstrip("="), whole[first:], *(() if before else _lines(sure))):
            yield form
            yield form.replace("+", "-").replace("/", "_")


def _lines(form: str) -> Iterator[str]:
    """What stands in each line where the form is written in several."""
    parts = (form[at : at + width] for width in WIDTHS if len(form) > width for at in range(0, len(form), width))
    return filter(redactable, parts)


def _pieces(form: str) -> Iterator[str]:
    if len(form) < SHORTEST:
        return
    for start in range(0, len(form) - LONGEST, LONGEST):
        yield form[start : start + LONGEST]
    yield form[-LONGEST:]
