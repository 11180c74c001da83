"""Replaces credentials that this process knows, and text that looks like a credential, with `[redacted]`."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from corral.redact.encodings import encodings, is_redactable
from corral.redact.matcher import MARK, Hit, Matcher, Span, replace_spans
from corral.redact.patterns import BUILT_IN
from corral.schema.strict_json import map_strings

log = logging.getLogger("corral.redact")

JOINED_CHARACTERS = 16 * 1024  # the texts of a JSON value below this size are searched together first
_NO_TEXT = frozenset((int, float, bool, type(None)))  # common types without text; isinstance(…, Mapping) would be slow
_PATTERNS_ONLY = Matcher((), BUILT_IN)
OnHit = Callable[[Collection[Hit]], None]
_MAKER: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar("corral.redact.maker", default=None)


@contextlib.contextmanager
def redacting_machine_text(type: str, id: str) -> Iterator[None]:
    """Within this context, treat all redacted text as written by a machine on behalf of the given object.

    If a credential is found in such text, an alert is raised.
    """
    token = _MAKER.set((type, id))
    try:
        yield
    finally:
        _MAKER.reset(token)


def machine_text_object() -> tuple[str, str] | None:
    """Return the type and id of the object whose machine-generated text is being redacted, or None."""
    return _MAKER.get()


class Redactor:
    """Redacts text in any thread.

    `counts` contains the number of replacements for each kind of credential. `values` is the number of known
    credentials.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.values = 0
        self._encodings: dict[str, dict[tuple[Hit, str], set[str]]] = {}  # by source, then by hit and value
        self._listeners: list[OnHit] = []
        self._changing = threading.Lock()
        self._matcher = _PATTERNS_ONLY

    def redact(self, text: str, *, patterns: bool = True) -> str:
        """Return the text with each known credential, in any encoding, replaced by `[redacted]`.

        Text that looks like a credential is also replaced. Pass `patterns=False` for text written by a person, to
        replace only known credentials.
        """
        matcher, parts = self._matcher, text.split(MARK)
        for index, part in enumerate(parts):
            if spans := matcher.scan(part, patterns=patterns)[0]:
                self._notify(spans)
                parts[index] = replace_spans(part, spans)
        return MARK.join(parts)

    def redact_json(self, value: Any, *, patterns: bool = True) -> Any:
        """Return the value with all its strings and keys redacted. If two keys become equal, the last item is kept."""
        texts: list[str] = []
        if _collect_strings(value, texts, JOINED_CHARACTERS) >= 0 and not self._matcher.may_match("\n".join(texts)):
            return value
        return map_strings(value, functools.partial(self.redact, patterns=patterns))

    def is_clean(self, json: bytes) -> bool:
        """Return True only if the strings in a JSON document contain no credential.

        Also return False if the document contains escape sequences or non-ASCII characters, because their
        normalised form might contain a credential. This method takes a third of the time that `redact_json` takes.
        """
        return json.isascii() and b"\\" not in json and not self._matcher.may_match(json.decode())

    def stream(self, *, patterns: bool = True) -> RedactorStream:
        """Return a stream that redacts text arriving in pieces, with the same result as for the whole text."""
        return RedactorStream(self, patterns)

    def set_values(self, source: str, values: Mapping[str, str]) -> list[str]:
        """Set the known credentials of a source to `values`. Return the names of the values that cannot be redacted.

        Short values, repetitive values and single words cannot be redacted, because replacing them would damage
        ordinary text. With thousands of values, this method takes up to a second, so call it in a thread.
        """
        with self._changing:
            before = self._encodings.get(source, {})
            wanted = [(Hit("value", source, name), value) for name, value in values.items() if is_redactable(value)]
            now = {item: before.get(item) or encodings(item[1]) for item in wanted}
            if now != before:
                self._encodings[source] = now
                self.values = sum(map(len, self._encodings.values()))
                found = [(hit, texts) for each in self._encodings.values() for (hit, _), texts in each.items()]
                self._matcher = Matcher(found, BUILT_IN)
        return [name for name, value in values.items() if not is_redactable(value)]

    def on_hit(self, listener: OnHit) -> None:
        """Call `listener` whenever credentials are found, in the thread that redacts the text.

        The listener must return quickly and must not log.
        """
        self._listeners.append(listener)

    def _notify(self, spans: list[Span]) -> None:
        for span in spans:
            self.counts.update({hit.kind for hit in span.hits})
        hits = frozenset[Hit]().union(*(span.hits for span in spans))
        for listener in self._listeners:
            try:
                listener(hits)
            except Exception:
                log.exception("a listener of the redactor failed")


def _collect_strings(value: Any, texts: list[str], budget: int) -> int:
    """Append the strings in the value to `texts`, and return `budget` minus their total length.

    Stop appending when the result becomes negative.
    """
    waiting = [value]
    while waiting and budget >= 0:
        value = waiting.pop()
        if isinstance(value, str):
            texts.append(value)
            budget -= len(value)
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, dict) or (type(value) not in _NO_TEXT and isinstance(value, Mapping)):
            waiting += (*value, *value.values())
    return budget


class RedactorStream:
    """Redacts a stream of text.

    The stream holds back the end of the text (at most about 4 KiB) if a match may begin there, and releases the rest.
    """

    def __init__(self, redactor: Redactor, patterns: bool) -> None:
        self._redactor, self._patterns = redactor, patterns
        self._pending = ""
        self._covered = 0  # number of pending characters that a released mark already replaces

    def feed(self, text: str) -> str:
        """Add text, and return the redacted text that can now be sent. The returned text may be empty."""
        *whole, last = (self._pending + text).split(MARK)
        return MARK.join([*(self._settle(part, final=True) for part in whole), self._settle(last, final=False)])

    def end(self) -> str:
        """End the stream and return the rest of the redacted text."""
        return self._settle(self._pending, final=True)

    def _settle(self, text: str, *, final: bool) -> str:
        """Return the part of the redacted text that later text cannot change, and keep the rest.

        A credential that begins in this part and ends after it is replaced by `[redacted]` in this part. The rest of
        the credential is removed later.
        """
        spans, cut = self._redactor._matcher.scan(text, patterns=self._patterns, final=final)
        while open_spans := [span.since for span in spans if span.since < cut <= span.start]:
            cut = min(open_spans)
        if reached := [span for span in spans if span.start < cut]:
            self._redactor._notify(reached)
        shown, covered = [], self._covered
        for span in reached:
            if span.start >= covered:
                shown += [text[covered : span.start], MARK]
            covered = max(covered, span.end)
        shown.append(text[covered:cut])
        self._pending, self._covered = text[cut:], max(0, covered - cut)
        return "".join(shown)
