"""Compares two revisions of a patch by computing the diff between the files that the revisions produce."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from corral_plugins.code_reviews.service.patches import Hunk, Patch, PatchedFile

CONTEXT = 3
MAX_COMPARED_LINES, MAX_COMPARED_IN_ALL = 4000, 20_000
"""The maximum number of differing lines that are compared, per file and for all files together.

Beyond these limits, lines are shown as replaced. Comparing them could take minutes, because the time grows with the
cube of their number.
"""

_SPECIAL = re.compile(rb"[\x00-\x1f\x7f\"\\]")
Line = tuple[int, bytes]
Opcode = tuple[str, int, int, int, int]


def interdiff(before: Patch, after: Patch) -> bytes:
    """Return the unified diff between the files as patched by `before` and the same files as patched by `after`.

    Only lines that at least one of the patches shows are compared. If both patches start from the same lines, a line
    that only one patch shows is assumed to be unchanged by the other.
    """
    old = {file.path: file for file in before.files}
    new = {file.path: file for file in after.files}
    comparison = _Comparison()
    parts = [_file_diff(path, old.get(path), new.get(path), comparison) for path in sorted({*old, *new})]
    return b"".join(parts)


def _file_diff(path: str, before: PatchedFile | None, after: PatchedFile | None, comparison: _Comparison) -> bytes:
    old_lines, new_lines = _patched_lines(before, after)
    names = _quoted(f"a/{path}"), _quoted(f"b/{path}")
    if before is not None and after is not None and (before.binary or after.binary):
        return b"Binary files %s and %s may differ\n" % names if before != after else b""
    hunks = b"".join(_hunks(old_lines, new_lines, comparison))
    return b"--- %s\n+++ %s\n%s" % (*names, hunks) if hunks else b""


def _quoted(path: str) -> bytes:
    """Return a path as Git writes it: in quotes if it contains special characters, such as a line break."""
    data = path.encode()
    if not _SPECIAL.search(data):
        return data
    return b'"%s"' % _SPECIAL.sub(lambda match: b"\\%03o" % match[0][0], data)


def _patched_lines(before: PatchedFile | None, after: PatchedFile | None) -> tuple[list[Line], list[Line]]:
    """Return the numbered lines of a file after each of two patches is applied to it.

    If both patches start from the same lines, both results cover every part of the file that at least one patch shows.
    """
    bases = [{} if file is None else file.side("old") for file in (before, after)]
    shared = bases[0].keys() & bases[1].keys()
    if any(bases[0][number] != bases[1][number] for number in shared):  # the patches start from different files
        return _lines_of_new_side(before), _lines_of_new_side(after)
    base = {**bases[0], **bases[1]}
    return _lines_after_patch(base, before), _lines_after_patch(base, after)


def _lines_of_new_side(file: PatchedFile | None) -> list[Line]:
    return [] if file is None else sorted(file.side("new").items())


def _lines_after_patch(base: dict[int, bytes], file: PatchedFile | None) -> list[Line]:
    """Return the lines of a file after a patch, with their new numbers.

    These are the lines that the patch shows, and the lines of `base` that are outside its hunks.
    """
    hunks = [] if file is None else file.hunks
    covered: set[int] = set()
    found: list[Line] = []
    for hunk in hunks:
        covered.update(range(hunk.old_start, hunk.old_start + hunk.old_lines))
    if file is not None:
        found += file.side("new").items()
    shift, pending = 0, list(hunks)
    for number in sorted(base.keys() - covered):
        while pending and _ends_before(pending[0], number):
            shift += pending[0].new_lines - pending[0].old_lines
            pending.pop(0)
        found.append((number + shift, base[number]))
    return sorted(found)


def _ends_before(hunk: Hunk, number: int) -> bool:
    """Return whether a hunk ends before the line with this number.

    A hunk without old lines begins after the line named in its header.
    """
    return hunk.old_start + max(hunk.old_lines, 1) <= number or (hunk.old_lines == 0 and hunk.old_start < number)


class _Comparison:
    """Compares the lines of files one by one, up to a maximum number of lines in total."""

    def __init__(self) -> None:
        self.lines_left = MAX_COMPARED_IN_ALL

    def groups(self, old: list[bytes], new: list[bytes]) -> list[list[Opcode]]:
        """Return the groups of changes between two lists of lines, with the context lines around each group.

        Equal lines at both ends are skipped first, to save time.
        """
        head = _equal_lines(old, new)
        tail = _equal_lines(old[head:][::-1], new[head:][::-1])
        size = len(old) + len(new) - 2 * (head + tail)
        if size > min(MAX_COMPARED_LINES, self.lines_left):
            return [[("replace", head, len(old) - tail, head, len(new) - tail)]]
        self.lines_left -= size
        start, end = max(head - CONTEXT, 0), max(tail - CONTEXT, 0)
        compared = old[start : len(old) - end], new[start : len(new) - end]
        groups = difflib.SequenceMatcher(None, *compared).get_grouped_opcodes(CONTEXT)
        return [
            [(tag, i1 + start, i2 + start, j1 + start, j2 + start) for tag, i1, i2, j1, j2 in group] for group in groups
        ]


def _equal_lines(old: list[bytes], new: list[bytes]) -> int:
    """Return the number of equal lines at the start of both lists."""
    pairs = enumerate(zip(old, new, strict=False))
    return next((index for index, (before, after) in pairs if before != after), min(len(old), len(new)))


def _hunks(old: list[Line], new: list[Line], comparison: _Comparison) -> Iterator[bytes]:
    texts = [text for _, text in old], [text for _, text in new]
    if texts[0] == texts[1]:
        return
    for group in comparison.groups(*texts):
        first, last = group[0], group[-1]
        yield b"@@ -%s +%s @@\n" % (_range(old[first[1] : last[2]]), _range(new[first[3] : last[4]]))
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                yield from (b" " + text + b"\n" for text in texts[0][i1:i2])
                continue
            yield from (b"-" + text + b"\n" for text in texts[0][i1:i2])
            yield from (b"+" + text + b"\n" for text in texts[1][j1:j2])


def _range(lines: list[Line]) -> bytes:
    return b"%d,%d" % (lines[0][0] if lines else 0, len(lines))
