"""One automaton of all values and patterns, which finds every place where one may begin in a single pass."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

from ahocorasick_rs import AhoCorasick, BytesAhoCorasick

from corral.redact.encodings import SHORTEST
from corral.redact.patterns import Pattern

MARK = "[redacted]"
_START = itemgetter(1)
_SURROGATES = re.compile("[\ud800-\udfff]")


class Hit(NamedTuple):
    """A credential found in text. `kind` is `value` or a pattern's, `source` registered it, `name` is the value's."""

    kind: str
    source: str
    name: str = ""


class Span(NamedTuple):
    """A part of the text to replace, and the hits in it. `since` is where the match begins, which may be earlier."""

    start: int
    end: int
    since: int
    hits: frozenset[Hit]


class Matcher:
    """Finds values and patterns in text. Immutable, so any thread may use it while its successor is built.

    An encoding is stored as its text alone: hundreds of thousands of further objects would slow down the garbage
    collector, which stops the whole process.
    """

    def __init__(
        self, encodings: Iterable[tuple[str, frozenset[Hit]]], patterns: Iterable[tuple[str, Pattern]]
    ) -> None:
        begins: dict[str, list[str | tuple[Pattern, frozenset[Hit]]]] = {MARK: []}
        self._hits: dict[str, frozenset[Hit]] = {}  # by encoding
        for text, hits in encodings:
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
        """Whether a match may begin in the text. Unlike `scan` it does not let other threads run."""
        return bool(self._detector.find_matches_as_indexes(text.encode("utf-8", "replace")))

    def scan(self, text: str, *, patterns: bool, final: bool = True) -> tuple[list[Span], int]:
        """The spans to replace in a text without marks, in order and disjoint, and the length of its settled part.

        More text could still change what is found beyond the settled part; a `final` text is settled as a whole.
        """
        settled = len(text) if final else self._cut_anchor(text)
        begins = self._automaton.find_matches_as_indexes(_encodable(text), overlapping=True)
        if not begins:
            return [], settled
        found: list[Span] = []
        ends: dict[Pattern, int] = {}  # of each pattern: where its last match ended
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
        return _disjoint(found), settled

    def _cut_anchor(self, text: str) -> int:
        """The position from which the rest of the text may be the beginning of an anchor."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            following = bisect_right(self._anchors, tail)
            if following < len(self._anchors) and self._anchors[following].startswith(tail):
                return len(text) - size
        return len(text)


def replaced(text: str, spans: Iterable[Span]) -> str:
    """The text with each span replaced by the mark."""
    kept, position = [], 0
    for span in spans:
        kept += [text[position : span.start], MARK]
        position = span.end
    return "".join([*kept, text[position:]]) if kept else text


def _disjoint(found: list[Span]) -> list[Span]:
    """The spans in order; overlapping ones are merged, so that no end of either value remains."""
    joined: list[Span] = []
    for span in sorted(found, key=lambda each: each.start):
        if joined and span.start < joined[-1].end:
            last = joined.pop()
            since = min(last.since, span.since)
            span = Span(last.start, max(last.end, span.end), since, last.hits | span.hits)
        joined.append(span)
    return joined


def _encodable(text: str) -> str:
    """The text without lone surrogates, which UTF-8 (read by the automaton) lacks; positions stay the same."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text)
    return text
