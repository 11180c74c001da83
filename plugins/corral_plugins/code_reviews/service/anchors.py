"""Anchors comments to lines of a patch, and finds these lines in the next revision by their exact context.

A comment never moves to lines that are merely similar. It stays `active` if its lines and the surrounding lines are
unchanged; otherwise it becomes `outdated` or `orphaned`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from corral_plugins.code_reviews.service.patches import Patch, PatchedFile

AROUND = 3
"""The maximum number of lines that are compared on each side of the commented lines."""
MAX_LINES = 500
"""The maximum number of lines to which a comment can refer."""
MAX_CHECKS = 50_000
"""The maximum number of places in a new revision that are checked, in total for all comments.

Comments that are not found within this limit become outdated.
"""
DIGEST_LENGTH = 64

Numbers = dict[str | None, list[int]]


class Context(msgspec.Struct, frozen=True):
    """The commented lines, and up to three lines that the patch shows before and after them.

    Each item is the text of a line, decoded as Latin-1, so that each byte becomes one character. Lines of 64 bytes or
    more are replaced by their SHA-256 hashes.
    """

    before: list[str]
    lines: list[str]
    after: list[str]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """The place of a comment in the revision for which it was written, or in the revision where it was last found."""

    file: str
    side: str
    line: int | None = None
    context: Context | None = None


class NewPlace(msgspec.Struct, frozen=True):
    """The place of a comment in another revision. `line` is None unless `anchor` is `active`."""

    anchor: str
    line: int | None = None
    file: str | None = None


def context_of(patch: Patch, file: str, side: str, line: int, end_line: int) -> Context | None:
    """Return the context of the given lines of a file, or None if the patch does not show all of these lines."""
    patched = patch.find(file, side)
    shown = {} if patched is None else patched.side(side)
    numbers = range(line, end_line + 1)
    if not all(number in shown for number in numbers):
        return None
    before = _lines_from(shown, line - 1, -1)
    after = _lines_from(shown, end_line + 1, 1)
    return Context(
        [*map(_stored_line, before[::-1])], [_stored_line(shown[n]) for n in numbers], [*map(_stored_line, after)]
    )


def find_new_places(patch: Patch, places: Sequence[Place]) -> list[NewPlace]:
    """Find the places of comments in another revision.

    If the patch shows fewer lines around a comment than before, only the lines that are still shown must be equal. If
    the lines of a comment occur more than once, they are found only at their old line numbers.
    """
    search = _Search(patch, places)
    return [search.find(place) for place in places]


class _Search:
    """Searches a patch for commented lines. The lines of each file are examined only once, even for many comments."""

    def __init__(self, patch: Patch, places: Sequence[Place]) -> None:
        self.patch, self.checks_left = patch, MAX_CHECKS
        wanted: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for place in places:
            if place.context is not None:
                wanted[place.file, place.side].add(place.context.lines[0])
        self.shown = {key: self._lines(*key) for key in wanted}
        self.numbers = {key: _numbers_by_text(self.shown[key], texts) for key, texts in wanted.items()}

    def find(self, place: Place) -> NewPlace:
        """Return the place of a comment in the new revision."""
        patched = self._file(place.file, place.side)
        if patched is None or (place.side == "new" and patched.status == "deleted"):
            return NewPlace("orphaned")
        path = patched.path if place.side == "new" else patched.old_path or patched.path
        if place.line is None or place.context is None:
            return NewPlace("active", None, path)
        line = self._line(place, place.line, place.context)
        return NewPlace("outdated") if line is None else NewPlace("active", line, path)

    def _line(self, place: Place, line: int, context: Context) -> int | None:
        """Return the new line number of a comment: the old number if it still matches, or else the only other match.

        Return None if there is no match, if there are several, or if no more places may be checked.
        """
        shown = self.shown[place.file, place.side]
        if _matches_context(shown, line, context):
            return line
        found = None
        for number in _candidates(self.numbers[place.file, place.side].get(context.lines[0], {}), context):
            self.checks_left -= 1
            if self.checks_left < 0:
                return None
            if _matches_context(shown, number, context):
                if found is not None:
                    return None
                found = number
        return found

    def _file(self, file: str, side: str) -> PatchedFile | None:
        """Return the patched file to which a comment refers, even if the file was renamed only in the new revision."""
        renamed = (each for each in self.patch.files if side == "new" and each.old_path == file)
        return self.patch.find(file, side) or next(renamed, None)

    def _lines(self, file: str, side: str) -> dict[int, bytes]:
        patched = self._file(file, side)
        return {} if patched is None else patched.side(side)


def _numbers_by_text(shown: dict[int, bytes], texts: Iterable[str]) -> dict[str, Numbers]:
    """Map each of the `texts` to the numbers of the lines with this text.

    The numbers are grouped by the text of the preceding line, or by None if the patch does not show the preceding line.
    """
    short = {text.encode("latin-1"): text for text in texts if len(text) < DIGEST_LENGTH}
    long = {text for text in texts if len(text) == DIGEST_LENGTH}
    found: dict[str, Numbers] = {text: defaultdict(list) for text in texts}
    for number, line in shown.items():
        text = short.get(line)
        if text is None and long and len(line) >= DIGEST_LENGTH and (key := _stored_line(line)) in long:
            text = key
        if text is not None:
            previous = shown.get(number - 1)
            found[text][None if previous is None else _stored_line(previous)].append(number)
    return found


def _candidates(numbers: Numbers, context: Context) -> Iterable[int]:
    """Return the line numbers in the new revision at which the lines of a comment could begin.

    At each of them, the preceding line is unchanged, or the patch does not show the preceding line.
    """
    if not context.before:
        return itertools.chain.from_iterable(numbers.values())
    return [*numbers.get(context.before[-1], ()), *numbers.get(None, ())]


def _matches_context(shown: dict[int, bytes], number: int, context: Context) -> bool:
    """Return whether the lines at `number`, and the surrounding lines that the patch shows, match the context."""
    if not all(_has_text(shown, number + index, text) for index, text in enumerate(context.lines)):
        return False
    end = number + len(context.lines)
    before = zip(range(number - 1, number - 1 - AROUND, -1), reversed(context.before), strict=False)
    after = zip(range(end, end + AROUND), context.after, strict=False)
    return all(_has_same_neighbours(shown, pairs) for pairs in (before, after))


def _has_same_neighbours(shown: dict[int, bytes], pairs: Iterable[tuple[int, str]]) -> bool:
    """Return whether the lines next to a comment are unchanged. Lines that the patch does not show are not compared."""
    for number, text in pairs:
        if number not in shown:
            return True
        if not _has_text(shown, number, text):
            return False
    return True


def _has_text(shown: dict[int, bytes], number: int, text: str) -> bool:
    line = shown.get(number)
    return line is not None and _stored_line(line) == text


def _lines_from(shown: dict[int, bytes], start: int, step: int) -> list[bytes]:
    """Return up to three consecutive lines that the patch shows, beginning at `start`. A `step` of -1 goes upwards."""
    found: list[bytes] = []
    while len(found) < AROUND and start in shown:
        found.append(shown[start])
        start += step
    return found


def _stored_line(line: bytes) -> str:
    """Return a line in the form stored in a `Context`.

    Long lines are hashed, because up to 1000 comments may each refer to a line of up to 2 MiB.
    """
    return line.decode("latin-1") if len(line) < DIGEST_LENGTH else hashlib.sha256(line).hexdigest()
