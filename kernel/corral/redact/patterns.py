"""Patterns that recognise credentials by their format, to redact unknown credentials in machine-generated text.

The regular expression of a pattern is tried wherever one of its anchors, which are fixed strings, occurs. The
expression examines no text before the anchor or after its own match, so its result does not depend on the surrounding
text. Therefore, redacting the same text again changes nothing, and redacting a stream gives the same result as
redacting the whole text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

LIMIT = 4096


class Pattern:
    """A pattern that matches one kind of credential.

    `expression` begins with one of the `anchors`. Its group `secret` is redacted, or the whole match if there is no
    such group. `unfinished` matches any text that can follow the anchor if the text is cut off inside a match. Neither
    expression may use lookbehind, word boundaries or negative lookahead. At most 4096 characters are matched. Set
    `nests` if a match that begins inside another match may end after that match.
    """

    def __init__(
        self, kind: str, anchors: tuple[str, ...], expression: str, unfinished: str, *, nests: bool = False
    ) -> None:
        self.kind, self.anchors, self.nests = kind, anchors, nests
        self._expression = re.compile(expression, re.ASCII)
        self._unfinished = re.compile(unfinished, re.ASCII)
        self._group = "secret" if "secret" in self._expression.groupindex else 0

    def find(self, text: str, start: int) -> tuple[int, int] | None:
        """Return the start and end of the part to redact, or None if the text does not match at `start`."""
        match = self._expression.match(text, start, start + LIMIT)
        return match.span(self._group) if match else None

    def is_open(self, text: str, start: int, anchor: str) -> bool:
        """Return whether more text could still change the result of `find`."""
        return len(text) - start < LIMIT and bool(self._unfinished.fullmatch(text, start + len(anchor)))


_QUOTE = r"\\{0,3}[\"']?"
_BETWEEN = rf"(?:{_QUOTE}[ \t]{{0,4}}%s[ \t]{{0,4}}{_QUOTE}|[\"'], ?b?[\"'])"  # name: value, or ("name", b"value")
_PART = r"[^\s/?#@\"'<>]"
_KEY = r"PRIVATE KEY(?: BLOCK)?-----"
_HEADERS = r"(?:(?:\s|\\[rn]){0,4}[A-Z][A-Za-z]{2,20}-[A-Z][A-Za-z]{2,20}: [\w,-]{1,100}){0,3}"
_FORMATS = json.loads(Path(__file__).with_name("token_formats.json").read_bytes())
"""The formats of tokens. Each consists of fixed prefixes and a regular expression for the rest of the token."""

BUILT_IN = (
    Pattern("corral", ("whsec_",), r"whsec_[\w+/=-]{16,}", r"[\w+/=-]*"),
    Pattern(
        "private_key",
        ("-----BEGIN ",),
        rf"-----BEGIN [A-Z0-9 ]{{0,40}}{_KEY}{_HEADERS}"
        rf"[A-Za-z0-9+/=\s\\]{{16,3700}}(?:-----END [A-Z0-9 ]{{0,40}}{_KEY})?",
        r"[A-Za-z0-9+/=\s\\:,_-]*",
    ),
    Pattern(
        "header",
        ("authorization", "Authorization", "AUTHORIZATION"),
        rf"(?i:authorization){_BETWEEN % '[:=]'}(?P<secret>(?:[A-Za-z][\w-]{{1,20}} {{1,2}})?[^\s\"',;\\]{{4,1500}})",
        r"[\"'\\ \t:=,b]*(?:[A-Za-z][\w-]{1,20} {0,2})?[^\s\"',;\\]*",
        nests=True,
    ),
    Pattern(
        "header",
        ("cookie", "Cookie", "COOKIE"),
        rf"(?i:cookie){_BETWEEN % ':'}(?P<secret>[\w.-]{{1,100}}=[^\r\n\"'\\]{{1,3800}})",
        r"[\"'\\ \t:,b]*[^\r\n\"'\\]*",
    ),
    Pattern(
        "url_password",
        ("://",),
        rf"://[^\s/?#@:\"'<>]{{0,256}}:(?P<secret>{_PART}{{1,1024}})@",
        r"[^\s/?#\"'<>]*",
        nests=True,
    ),
    *(
        Pattern(each.get("kind", "token"), (prefix,), re.escape(prefix) + each["rest"], r"[\w.=-]*")
        for each in _FORMATS
        for prefix in each["prefixes"]
    ),
)
