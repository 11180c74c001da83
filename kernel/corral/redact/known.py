"""What is looked for, compiled into one automaton that finds where anything may begin in one pass over the text."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

from ahocorasick_rs import AhoCorasick, BytesAhoCorasick

from corral.redact.forms import SHORTEST
from corral.redact.patterns import Pattern

MARK = "[redacted]"
_START = itemgetter(1)
_SURROGATES = re.compile("[\ud800-\udfff]")


class Hit(NamedTuple):
    """What was found: `kind` is `value` or that of a pattern, `source` who told of it, `name` that of the value."""

    kind: str
    source: str
    name: str = ""


class Span(NamedTuple):
    """A piece of text to take out, and what was found in it; `since`: where what shows that it is one begins."""

    start: int
    end: int
    since: int
    hits: frozenset[Hit]


class Known:
    """Immutable: any thread may use one while its successor is made.

    Of each form there is nothing but its text: hundreds of thousands of objects would keep the collector of garbage
    busy, and everybody waiting for it.
    """

    def __init__(self, forms: Iterable[tuple[str, frozenset[Hit]]], patterns: Iterable[tuple[str, Pattern]]) -> None:
        begins: dict[str, list[str | tuple[Pattern, frozenset[Hit]]]] = {MARK: []}
        self._hits: dict[str, frozenset[Hit]] = {}  # of forms
        for text, hits in forms:
            if text in self._hits:
                hits |= self._hits[text]
            else:
                begins.setdefault(text[:SHORTEST], []).append(text)
            self._hits[text] = hits
        for source, pattern in patterns:
            for anchor in pattern.anchors:
                begins.setdefault(anchor, []).append((pattern, frozenset((Hit(pattern.kind, source),))))
        self._anchors = sorted(begins)
        self._candidates = [begins[anchor] for anchor in self._anchors]
        self._longest = max(map(len, self._anchors))
        self._automaton = AhoCorasick(self._anchors, store_patterns=False)
        self._detector = BytesAhoCorasick([anchor.encode("utf-8", "replace") for anchor in self._anchors])

    def may_hold(self, text: str) -> bool:
        """Whether anything that is looked for may begin in a text. No other thread gets a turn, as `scan` gives one."""
        return bool(self._detector.find_matches_as_indexes(text.encode("utf-8", "replace")))

    def scan(self, text: str, *, patterns: bool, final: bool = True) -> tuple[list[Span], int]:
        """What to take out of a text without marks, in order and apart; and how much of the text is settled.

        That is all of it, if the text is `final`: no more will come that could make something of its end.
        """
        settled = len(text) if final else self._cut_anchor(text)
        begins = self._automaton.find_matches_as_indexes(_encodable(text), overlapping=True)
        if not begins:
            return [], settled
        found: list[Span] = []
        ends: dict[Pattern, int] = {}  # of the last match of each
        for index, start, _ in sorted(begins, key=_START):
            for candidate in self._candidates[index]:
                if isinstance(candidate, str):
                    if text.startswith(candidate, start):
                        found.append(Span(start, start + len(candidate), start, self._hits[candidate]))
                    elif not final and start < settled and candidate.startswith(text[start:]):
                        settled = start
                    continue
                pattern, hits = candidate
                if not patterns or not (pattern.nests or start >= ends.get(pattern, 0)):
                    continue
                span = pattern.find(text, start)
                if span is not None:
                    found.append(Span(*span, start, hits))
                    ends[pattern] = span[1]
                if not final and start < settled and pattern.is_open(text, start, self._anchors[index]):
                    settled = start
        return _apart(found), settled

    def _cut_anchor(self, text: str) -> int:
        """Where the end of the text begins to look like an anchor."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            following = bisect_right(self._anchors, tail)
            if following < len(self._anchors) and self._anchors[following].startswith(tail):
                return len(text) - size
        return len(text)


def replaced(text: str, spans: Iterable[Span]) -> str:
    """The text with the mark in place of each span."""
    kept, position = [], 0
    for span in spans:
        kept += [text[position : span.start], MARK]
        position = span.end
    return "".join([*kept, text[position:]]) if kept else text


def _apart(found: list[Span]) -> list[Span]:
    """In order, those that overlap made one: of two values that share characters neither end stays."""
    joined: list[Span] = []
    for span in sorted(found, key=lambda each: each.start):
        if joined and span.start < joined[-1].end:
            last = joined.pop()
            since = min(last.since, span.since)
            span = Span(last.start, max(last.end, span.end), since, last.hits | span.hits)
        joined.append(span)
    return joined


def _encodable(text: str) -> str:
    """The automaton reads UTF-8, which has no lone surrogates; positions stay the same."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text)
    return text
