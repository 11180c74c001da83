"""A matcher that finds all known values and patterns of credentials in one pass over the text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

from ahocorasick_rs import AhoCorasick, BytesAhoCorasick

from corral.redact.encodings import SHORTEST
from corral.redact.patterns import Pattern

MARK = "[redacted]"
_START = itemgetter(1)


class Hit(NamedTuple):
    """A credential found in text.

    `kind` is `value` if the text matched a known value; otherwise, it is the kind of the pattern that matched. For a
    known value, `source` is the source that registered it, and `name` is its name. For a pattern, both are empty.
    """

    kind: str
    source: str = ""
    name: str = ""


class Span(NamedTuple):
    """A part of the text to replace, and the credentials (`hits`) that were found in it.

    `since` is the position at which the match starts, which may be before `start`.
    """

    start: int
    end: int
    since: int
    hits: frozenset[Hit]


class Matcher:
    """Finds values and patterns of credentials in text.

    `values` contains the encodings of each known value. A matcher is immutable, so threads can continue to use it after
    the redactor has replaced it.

    The encodings are stored as plain strings, because hundreds of thousands of additional objects would slow down the
    garbage collector, which pauses the whole process.
    """

    def __init__(self, values: Iterable[tuple[Hit, Iterable[str]]], patterns: Iterable[Pattern]) -> None:
        begins: dict[str, list[str | tuple[Pattern, frozenset[Hit]]]] = {MARK: []}
        self._hits: dict[str, frozenset[Hit]] = {}  # hits by encoding
        for hit, encodings in values:
            hits = frozenset((hit,))
            for text in encodings:
                if text not in self._hits:
                    begins.setdefault(text[:SHORTEST], []).append(text)
                self._hits[text] = hits | self._hits.get(text, hits)
        for pattern in patterns:
            for anchor in pattern.anchors:
                begins.setdefault(anchor, []).append((pattern, frozenset((Hit(pattern.kind),))))
        self._anchors = sorted(begins)
        self._candidates = [begins[anchor] for anchor in self._anchors]
        self._longest = max(map(len, self._anchors))
        self._automaton = AhoCorasick(self._anchors, store_patterns=False)
        self._detector = BytesAhoCorasick([anchor.encode("utf-8", "replace") for anchor in self._anchors])

    def may_match(self, text: str) -> bool:
        """Return whether a match may begin in the text. This check takes a fraction of the time that `scan` takes."""
        return bool(self._detector.find_matches_as_indexes(text.encode("utf-8", "replace")))

    def scan(self, text: str, *, patterns: bool, final: bool = True) -> tuple[list[Span], int]:
        """Return the spans to replace, and the position in the text up to which the result is final.

        The spans are sorted and do not overlap. Text that arrives later cannot change the result before this position.
        If `final` is set, no more text follows, and the result for the whole text is final. The text must not contain
        `MARK`.
        """
        settled = len(text) if final else self._partial_anchor_start(text)
        try:
            begins = self._automaton.find_matches_as_indexes(text, overlapping=True)
        except UnicodeEncodeError:  # lone surrogates; the replacement does not change positions
            encodable = text.encode("utf-8", "replace").decode()
            begins = self._automaton.find_matches_as_indexes(encodable, overlapping=True)
        if not begins:
            return [], settled
        found: list[Span] = []
        ends: dict[Pattern, int] = {}  # the end of the last match of each pattern
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
        return _merge_overlapping(found), settled

    def _partial_anchor_start(self, text: str) -> int:
        """Return the first position from which the rest of the text could be the beginning of an anchor."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            following = bisect_right(self._anchors, tail)
            if following < len(self._anchors) and self._anchors[following].startswith(tail):
                return len(text) - size
        return len(text)


def replace_spans(text: str, spans: Iterable[Span]) -> str:
    """Return the text with each span replaced by `MARK`."""
    kept, position = [], 0
    for span in spans:
        kept += [text[position : span.start], MARK]
        position = span.end
    return "".join([*kept, text[position:]]) if kept else text


def _merge_overlapping(found: list[Span]) -> list[Span]:
    """Return the spans in order. Overlapping spans are merged, so that all of their text is replaced."""
    joined: list[Span] = []
    for span in sorted(found, key=lambda each: each.start):
        if joined and span.start < joined[-1].end:
            last = joined.pop()
            since = min(last.since, span.since)
            span = Span(last.start, max(last.end, span.end), since, last.hits | span.hits)
        joined.append(span)
    return joined
