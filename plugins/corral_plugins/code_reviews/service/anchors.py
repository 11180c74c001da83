"""Binds comments to lines of a patch, and finds the lines again in the next revision by their exact context.

A comment is never moved to lines that only resemble its own: it stays `active` where its lines and the lines around
them are unchanged, and is `outdated` or `orphaned` otherwise.
"""

from __future__ import annotations

from typing import Any

import msgspec

from corral_plugins.code_reviews.service.patches import Patch, PatchedFile

AROUND = 3
"""The number of lines before and after a comment that must be unchanged."""
MAX_LINES = 500
"""The maximum number of lines of one comment."""


class Context(msgspec.Struct, frozen=True):
    """The lines of a comment, and up to three lines that the patch shows before and after them."""

    before: list[str]
    lines: list[str]
    after: list[str]


class Found(msgspec.Struct, frozen=True):
    """Where a comment is in another revision. `line` is None unless it is active."""

    anchor: str
    line: int | None = None
    file: str | None = None


def context_of(patch: Patch, file: str, side: str, line: int, end_line: int) -> Context | None:
    """Return the context of lines of a file, or None if the patch does not show all of them."""
    patched = patch.find(file, side)
    shown = {} if patched is None else patched.side(side)
    numbers = range(line, end_line + 1)
    if not all(number in shown for number in numbers):
        return None
    before = _run(shown, line - 1, -1)
    after = _run(shown, end_line + 1, 1)
    return Context([_text(each) for each in before[::-1]], [_text(shown[n]) for n in numbers], [*map(_text, after)])


def find_again(patch: Patch, *, file: str, side: str, line: int | None, context: Context | None) -> Found:
    """Find a comment in another revision.

    Where the contexts differ in length, because one hunk begins or ends nearer to the lines, the lines that both show
    must be equal. If the lines occur more than once, they are found only at their old numbers.
    """
    patched = patch.find(file, side) or _renamed(patch, file, side)
    if patched is None or (side == "new" and patched.status == "deleted"):
        return Found("orphaned")
    path = patched.path if side == "new" else patched.old_path or patched.path
    if line is None or context is None:
        return Found("active", None, path)
    shown = {number: _text(text) for number, text in patched.side(side).items()}
    candidates = [
        number for number, text in shown.items() if text == context.lines[0] and _fits(shown, number, context)
    ]
    if line in candidates:
        return Found("active", line, path)
    return Found("active", candidates[0], path) if len(candidates) == 1 else Found("outdated")


def _renamed(patch: Patch, file: str, side: str) -> PatchedFile | None:
    """Return the file that the new revision renames, although the earlier one did not."""
    return next((each for each in patch.files if side == "new" and each.old_path == file), None)


def _fits(shown: dict[int, str], number: int, context: Context) -> bool:
    end = number + len(context.lines)
    if any(shown.get(number + index) != text for index, text in enumerate(context.lines)):
        return False
    before = zip(range(number - 1, number - 1 - AROUND, -1), reversed(context.before), strict=False)
    after = zip(range(end, end + AROUND), context.after, strict=False)
    return all(_same_run(shown, pairs) for pairs in (before, after))


def _same_run(shown: dict[int, str], pairs: Any) -> bool:
    """Return whether the lines next to a comment are equal, as far as the patch shows them."""
    for number, text in pairs:
        if number not in shown:
            return True
        if shown[number] != text:
            return False
    return True


def _run(shown: dict[int, bytes], start: int, step: int) -> list[bytes]:
    """Return up to three lines from a line on, as far as the patch shows them without a gap."""
    found: list[bytes] = []
    while len(found) < AROUND and start in shown:
        found.append(shown[start])
        start += step
    return found


def _text(line: bytes) -> str:
    return line.decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
