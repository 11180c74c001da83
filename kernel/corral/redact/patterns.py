"""What looks like a credential: shapes that are taken out of machine-made text though nobody stored their values.

An expression is tried where one of its anchors stands. It looks at nothing before the anchor nor after its own match:
what it finds is the same whatever surrounds it, so redacting twice changes nothing and a stream is judged like a whole.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LIMIT = 4096


class Pattern:
    """`expression` begins with one of the `anchors`; its group `secret`, else the whole match, is taken out.

    `unfinished` matches whatever may stand between the anchor and the end of a text that was cut inside a match.
    Neither may look behind, use word boundaries or negative lookahead. At most 4096 characters are matched.
    `nests`: a match that begins inside another may end after it, so it is looked for there too.
    """

    def __init__(
        self, kind: str, anchors: tuple[str, ...], expression: str, unfinished: str, *, nests: bool = False
    ) -> None:
        self.kind, self.anchors, self.nests = kind, anchors, nests
        self._expression = re.compile(expression, re.ASCII)
        self._unfinished = re.compile(unfinished, re.ASCII)
        self._group = "secret" if "secret" in self._expression.groupindex else 0

    def find(self, text: str, start: int) -> tuple[int, int] | None:
        """What is to be taken out, if the text from `start` has this shape."""
        match = self._expression.match(text, start, start + LIMIT)
        return match.span(self._group) if match else None

    def is_open(self, text: str, start: int, anchor: str) -> bool:
        """Whether more text could still change what `find` says."""
        return len(text) - start < LIMIT and bool(self._unfinished.fullmatch(text, start + len(anchor)))


class Token(NamedTuple):
    """A service's credential: its prefix and what follows, characters of one class."""

    prefix: str
    rest: str


_QUOTE = r"\\{0,3}[\"']?"
_BETWEEN = rf"(?:{_QUOTE}[ \t]{{0,4}}%s[ \t]{{0,4}}{_QUOTE}|[\"'], ?b?[\"'])"  # name: value, or ("name", b"value")
_PART = r"[^\s/?#@\"'<>]"
_KEY = r"PRIVATE KEY(?: BLOCK)?-----"
_HEADERS = r"(?:(?:\s|\\[rn]){0,4}[A-Z][A-Za-z]{2,20}-[A-Z][A-Za-z]{2,20}: [\w,-]{1,100}){0,3}"
_MIXED = r"(?=[A-Za-z0-9]*[A-Z])(?=[A-Za-z0-9]*[0-9])"

_TOKENS = (
    *(Token(f"sk-{name}-", r"[\w-]{20,}") for name in ("ant", "proj", "svcacct", "admin", "or-v1")),
    Token("sk-", _MIXED + r"[A-Za-z0-9]{32,}"),
    *(Token(f"gh{kind}_", r"[A-Za-z0-9]{36,}") for kind in "pousr"),
    Token("github_pat_", r"\w{50,}"),
    *(Token(f"glpat{mark}", r"[\w-]{20,}") for mark in "-_"),
    *(Token(f"xox{kind}-", r"[A-Za-z0-9-]{10,}") for kind in "abeoprs"),
    Token("xapp-", r"[A-Za-z0-9-]{20,}"),
    *(Token(prefix, r"[A-Z0-9]{16}") for prefix in ("AKIA", "ASIA")),
    Token("AIza", r"[\w-]{35}"),
    Token("ya29.", r"[\w-]{20,}"),
    Token("GOCSPX-", r"[\w-]{20,}"),
    *(Token(f"{kind}_{mode}_", r"[A-Za-z0-9]{16,}") for kind in ("sk", "rk") for mode in ("live", "test")),
    *(Token(prefix, r"[A-Za-z0-9]{30,}") for prefix in ("hf_", "npm_", "gsk_", "r8_", "xai-", "pplx-")),
    Token("pypi-", r"[\w-]{50,}"),
    *(Token(f"do{kind}_v1_", r"[a-f0-9]{64}") for kind in "por"),
    Token("SG.", r"[\w-]{16,32}\.[\w-]{16,64}"),
    *(Token(f"shp{kind}_", r"[a-fA-F0-9]{32}") for kind in ("at", "ca", "pa", "ss")),
    *(Token(f"hv{kind}.", r"[\w-]{24,}") for kind in "sbr"),
    Token(":AA", r"[\w-]{33}"),  # Telegram: the part of a bot's token that follows its number
    Token("ATATT3", r"[\w=-]{30,}"),
    Token("lin_api_", r"[A-Za-z0-9]{32,}"),
    Token("AGE-SECRET-KEY-1", r"[A-Z0-9]{58}"),
)

BUILT_IN = (
    Pattern("corral", ("crl_", "crw_", "crg_", "cra_"), r"cr[lwga]_[\w-]{16,}", r"[\w-]*"),
    Pattern("corral", ("whsec_",), r"whsec_[\w+/=-]{16,}", r"[\w+/=-]*"),
    Pattern(
        "jwt",
        ("eyJhbGci", "eyJ0eXAi", "eyJraWQi", "eyJlbmMi", "eyJjdHki", "eyJ4NXQi"),
        r"eyJ[\w-]{5,500}\.[\w-]{2,2500}(?:\.[\w-]{0,700}){1,3}",
        r"[\w.-]*",
    ),
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
    *(Pattern("token", (prefix,), re.escape(prefix) + rest, r"[\w.=-]*") for prefix, rest in _TOKENS),
)
