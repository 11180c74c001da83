"""The one redactor. It knows every live credential of this process and what credentials look like."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from corral.redact.forms import forms, redactable
from corral.redact.known import MARK, Hit, Known, Span, replaced
from corral.redact.patterns import BUILT_IN, Pattern

log = logging.getLogger("corral.redact")

AT_ONCE = 16 * 1024  # of a value with fewer characters the texts are searched together first
_NO_TEXT = frozenset((int, float, bool, type(None)))  # the commonest: to ask them for a Mapping would take long
OnHit = Callable[[Collection[Hit]], None]
_MAKER: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar("corral.redact.maker", default=None)


@contextlib.contextmanager
def made_by(type: str, id: str) -> Iterator[None]:
    """What is redacted meanwhile was made by a machine: for, or in, this object. A credential in it is an alarm."""
    token = _MAKER.set((type, id))
    try:
        yield
    finally:
        _MAKER.reset(token)


def maker() -> tuple[str, str] | None:
    """Type and id of the object whose machine-made text is redacted now; None: people's text, or Corral's own."""
    return _MAKER.get()


class Redactor:
    """Any thread may redact. `counts` has the replacements by kind, `values` the number of credentials known."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.values = 0
        self._forms: dict[str, dict[Hit, tuple[str, set[str]]]] = {}  # by source: value and forms of each name
        self._patterns: dict[str, tuple[Pattern, ...]] = {"corral": BUILT_IN}
        self._listeners: list[OnHit] = []
        self._changing = threading.Lock()
        self._known = self._compiled()

    def redact(self, text: str, *, patterns: bool = True) -> str:
        """The text with `[redacted]` for every known credential in any form, and for what looks like one.

        Text that a person writes is redacted with `patterns=False`: only stored credentials are taken out.
        """
        known, parts = self._known, text.split(MARK)
        for index, part in enumerate(parts):
            spans, _ = known.scan(part, patterns=patterns)
            if spans:
                self._tell(spans)
                parts[index] = replaced(part, spans)
        return MARK.join(parts)

    def redact_json(self, value: Any, *, patterns: bool = True) -> Any:
        """The value with all strings and keys redacted; of keys that become equal the last one's value stays."""
        texts: list[str] = []
        if _gather(value, texts, AT_ONCE) >= 0 and not self._known.may_hold("\n".join(texts)):
            return value
        return self._redacted(value, patterns=patterns)

    def _redacted(self, value: Any, *, patterns: bool) -> Any:
        if isinstance(value, str):
            return self.redact(value, patterns=patterns)
        if isinstance(value, Mapping):
            return {
                self._redacted(name, patterns=patterns): self._redacted(item, patterns=patterns)
                for name, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._redacted(item, patterns=patterns) for item in value]
        return value

    def stream(self, *, patterns: bool = True) -> RedactorStream:
        """For text that comes in pieces: what is fed comes out redacted as if it had come at once."""
        return RedactorStream(self, patterns)

    def set_values(self, source: str, values: Mapping[str, str]) -> list[str]:
        """Replace the credentials that a source has told of, by name; returns the names that are not redactable.

        Those are short, monotonous or one plain word: looking for them would blot out ordinary text. With thousands of
        values this takes a moment: call it in a thread.
        """
        with self._changing:
            before = self._forms.get(source, {})
            now: dict[Hit, tuple[str, set[str]]] = {}
            for name, value in values.items():
                hit = Hit("value", source, name)
                old = before.get(hit)
                if redactable(value):
                    now[hit] = old if old is not None and old[0] == value else (value, forms(value))
            self._forms[source] = now
            self.values = sum(map(len, self._forms.values()))
            self._known = self._compiled()
        return [name for name in values if Hit("value", source, name) not in now]

    def register(self, source: str, patterns: Iterable[Pattern]) -> None:
        """Add shapes of credentials; a second call replaces those of the source."""
        with self._changing:
            self._patterns[source] = tuple(patterns)
            self._known = self._compiled()

    def on_hit(self, listener: OnHit) -> None:
        """Call `listener` with what was found, in whatever thread redacts; it must be quick and must not log it."""
        self._listeners.append(listener)

    def _compiled(self) -> Known:
        return Known(
            (
                (form, hits)
                for told in self._forms.values()
                for hit, (_, each) in told.items()
                for hits in (frozenset((hit,)),)
                for form in each
            ),
            ((source, pattern) for source, patterns in self._patterns.items() for pattern in patterns),
        )

    def _tell(self, spans: list[Span]) -> None:
        for span in spans:
            self.counts.update({hit.kind for hit in span.hits})
        hits = frozenset[Hit]().union(*(span.hits for span in spans))
        for listener in self._listeners:
            try:
                listener(hits)
            except Exception:
                log.exception("a listener of the redactor failed")


def _gather(value: Any, texts: list[str], room: int) -> int:
    """Add all texts in a value; how much of `room` characters they leave, below 0 when they are more."""
    waiting = [value]
    while waiting and room >= 0:
        value = waiting.pop()
        if isinstance(value, str):
            texts.append(value)
            room -= len(value)
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, dict) or (type(value) not in _NO_TEXT and isinstance(value, Mapping)):
            waiting += (*value, *value.values())
    return room


class RedactorStream:
    """Holds back the tail that could begin something known, at most about 4 KiB; what it let go is settled."""

    def __init__(self, redactor: Redactor, patterns: bool) -> None:
        self._redactor, self._patterns = redactor, patterns
        self._held = ""
        self._covered = 0  # so many characters of it belong to a mark that was let go

    def feed(self, text: str) -> str:
        """What may be sent now; it may be empty."""
        *whole, last = (self._held + text).split(MARK)
        return MARK.join([*(self._settle(part, final=True) for part in whole), self._settle(last, final=False)])

    def end(self) -> str:
        """The rest; nothing more can come."""
        return self._settle(self._held, final=True)

    def _settle(self, text: str, *, final: bool) -> str:
        """Let go what more text cannot change; a span that reaches beyond that goes on without a mark of its own."""
        spans, cut = self._redactor._known.scan(text, patterns=self._patterns, final=final)
        while held := [span.since for span in spans if span.since < cut <= span.start]:
            cut = min(held)
        reached = [span for span in spans if span.start < cut]
        if reached:
            self._redactor._tell(reached)
        shown, covered = [], self._covered
        for span in reached:
            if span.start >= covered:
                shown += [text[covered : span.start], MARK]
            covered = max(covered, span.end)
        shown.append(text[covered:cut])
        self._held, self._covered = text[cut:], max(0, covered - cut)
        return "".join(shown)
