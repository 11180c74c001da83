"""Parses unified diffs, including Git's extended headers.

The parser works on bytes and is strict about hunks: a hunk must have exactly the lines that its header announces.
Otherwise, people could approve lines that the parsed patch does not show.
"""

from __future__ import annotations

import re

import msgspec

MAX_BYTES = 2 * 1024 * 1024
MAX_FILES = 2000
MAX_HUNKS = 20_000
MAX_PATH_BYTES = 4096
NO_FILE = b"/dev/null"

_HUNK = re.compile(rb"@@ -(\d{1,10})(?:,(\d{1,10}))? \+(\d{1,10})(?:,(\d{1,10}))? @@ ?(.*)", re.DOTALL)
_ESCAPE = re.compile(rb"\\([abfnrtv\"\\]|[0-3][0-7]{2})")
_ESCAPED = {b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}
_PREFIXES = re.compile(rb"[a-z]/")
_BINARY = re.compile(rb"Binary files .* differ|GIT binary patch")
_BINARY_PART = re.compile(rb"(?:literal|delta) \d+")
_EXTENDED = (
    b"old mode ",
    b"new mode ",
    b"deleted file mode ",
    b"new file mode ",
    b"copy from ",
    b"copy to ",
    b"rename from ",
    b"rename to ",
    b"similarity index ",
    b"dissimilarity index ",
    b"index ",
)


class PatchError(Exception):
    """Raised if a patch cannot be parsed. `line` is the number of the faulty line, counted from 1."""

    def __init__(self, line: int, detail: str) -> None:
        self.line, self.detail = line, detail
        super().__init__(f"line {line}: {detail}")


class Hunk(msgspec.Struct):
    """A hunk of a patch. Each item of `lines` begins with a space, `-` or `+`.

    Markers of a missing newline at the end of a file are omitted.
    """

    old_start: int
    old_lines: int
    new_start: int
    new_lines: int
    section: bytes
    lines: list[bytes]
    first_line: int  # the number of the line of the patch that follows the header of the hunk


class PatchedFile(msgspec.Struct):
    """The changes that a patch makes to one file."""

    path: str
    old_path: str | None
    status: str
    binary: bool = False
    additions: int = 0
    deletions: int = 0
    hunks: list[Hunk] = []

    def side(self, side: str) -> dict[int, bytes]:
        """Return the lines that the patch shows on the old or new side of the file, keyed by line number."""
        skipped, found = (b"+" if side == "old" else b"-"), {}
        for hunk in self.hunks:
            number = hunk.old_start if side == "old" else hunk.new_start
            for line in hunk.lines:
                if line[:1] != skipped:
                    found[number] = line[1:]
                    number += 1
        return found


class Patch(msgspec.Struct):
    """A parsed patch."""

    files: list[PatchedFile]

    def find(self, path: str, side: str) -> PatchedFile | None:
        """Return the file with this path on the given side, or None if the patch does not change the file.

        If a file changes its type, for example to a symbolic link, the patch contains a deletion and an addition of the
        path. In this case, return the one that exists on the given side.
        """
        absent = "deleted" if side == "new" else "added"
        found = [file for file in self.files if path == (file.path if side == "new" else file.old_path or file.path)]
        return next((file for file in found if file.status != absent), found[0] if found else None)


def parse_patch(data: bytes) -> Patch:
    """Parse a patch. Raise `PatchError` with the number of the faulty line if the patch is malformed."""
    return _Parser(data).parse()


class _Parser:
    """Reads the lines of a patch one by one. `at` is the index of the next line."""

    def __init__(self, data: bytes) -> None:
        self.lines = data.split(b"\n")
        if self.lines[-1] == b"":
            self.lines.pop()
        self.at = self.hunks = 0

    def parse(self) -> Patch:
        files: list[PatchedFile] = []
        seen: set[tuple[str, bool]] = set()
        while self.at < len(self.lines):
            line, began, known = self.lines[self.at], self.at, len(files)
            if line.startswith(b"diff --git "):
                files.append(self._git_file())
            elif line.startswith((b"diff --cc ", b"diff --combined ", b"@@@ ")):
                raise self._error("Combined diffs of merges are not supported; make a diff against one parent.")
            elif line.startswith(b"--- ") and self._peek(1).startswith(b"+++ "):
                files.append(self._plain_file())
            elif line.startswith(b"@@ "):
                raise self._error("A hunk has no file header before it.")
            else:
                self.at += 1
            if len(files) > known:
                self._check_new(files[-1], seen, began)
        if not files:
            raise PatchError(1, "The text contains no unified diff.")
        return Patch(files=files)

    def _check_new(self, file: PatchedFile, seen: set[tuple[str, bool]], line: int) -> None:
        """Raise `PatchError` if the patch changes the same file twice, or changes too many files."""
        key = (file.path, file.status == "deleted")
        if key in seen:
            raise self._error("The patch changes this file twice; send one diff of the whole change.", line)
        seen.add(key)
        if len(seen) > MAX_FILES:
            raise self._error(f"The patch changes more than {MAX_FILES} files.")

    def _peek(self, offset: int) -> bytes:
        return self.lines[self.at + offset] if self.at + offset < len(self.lines) else b""

    def _error(self, detail: str, line: int | None = None) -> PatchError:
        return PatchError((self.at if line is None else line) + 1, detail)

    # -- headers

    def _git_file(self) -> PatchedFile:
        """Parse the part of a patch that begins with `diff --git`."""
        began, header = self.at, self.lines[self.at][len(b"diff --git ") :]
        self.at += 1
        extended = self._extended_headers()
        old, new = self._named_paths(extended) or self._paths_of_header(header, began)
        status = "modified"
        if b"new file mode" in extended or b"copy to" in extended:
            status = "added"
        elif b"deleted file mode" in extended:
            status = "deleted"
        elif b"rename to" in extended:
            status = "renamed"
        file = PatchedFile(path="", old_path=None, status=status)
        if _BINARY.match(self._peek(0)):
            file.binary = True
            self._skip_binary()
        elif self._peek(0).startswith(b"--- ") and self._peek(1).startswith(b"+++ "):
            self._check_same_paths(old, new)
            if NO_FILE in (absent := [_without_time(self._peek(n)[4:]) for n in (0, 1)]):
                status = file.status = "added" if absent[0] == NO_FILE else "deleted"
            self.at += 2
            self._hunks(file)
        kept = old if status == "deleted" else new
        file.path = self._path(kept, began)
        if status in ("renamed",) or b"copy to" in extended:
            file.old_path = self._path(old, began)
        return file

    def _extended_headers(self) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        while name := next((each for each in _EXTENDED if self._peek(0).startswith(each)), None):
            found[name.rstrip()] = self._peek(0)[len(name) :]
            self.at += 1
        return found

    def _named_paths(self, extended: dict[bytes, bytes]) -> tuple[bytes, bytes] | None:
        """Return the old and new paths from the rename or copy headers, or None if there are none.

        The paths in these headers have no prefix.
        """
        for kind in (b"rename", b"copy"):
            if kind + b" from" in extended and kind + b" to" in extended:
                return self._unquote(extended[kind + b" from"]), self._unquote(extended[kind + b" to"])
        return None

    def _paths_of_header(self, header: bytes, line: int) -> tuple[bytes, bytes]:
        """Return the old and the new path in a `diff --git` line. The two paths differ only in their prefixes."""
        if header.startswith(b'"'):
            end = re.match(rb'"(?:[^"\\]|\\.)*"', header)
            if end is None:
                raise self._error("A quoted path has no end.", line)
            old, rest = end[0], header[end.end() :].lstrip(b" ")
            return self._stripped(self._unquote(old), self._unquote(rest))
        if header.endswith(b'"') and b' "' in header:
            at = header.index(b' "')
            return self._stripped(header[:at], self._unquote(header[at + 1 :]))
        for at in _space_positions(header):
            old, new = self._stripped(header[:at], header[at + 1 :])
            if old == new:
                return old, new
        raise self._error("The old path and the new path of the file cannot be separated.", line)

    def _check_same_paths(self, old: bytes, new: bytes) -> None:
        """Raise `PatchError` if the `---` and `+++` lines do not name the same paths as the `diff --git` line."""
        named = [self._unquote(_without_time(self._peek(n)[4:])) for n in (0, 1)]
        shown = [
            each if each in (NO_FILE, kept) else _PREFIXES.sub(b"", each, count=1)
            for each, kept in zip(named, (old, new), strict=True)
        ]
        for index, (each, kept) in enumerate(zip(shown, (old, new), strict=True)):
            if each not in (NO_FILE, kept):
                raise self._error("The path differs from the path in the header of the file.", self.at + index)

    def _plain_file(self) -> PatchedFile:
        """Parse the part of a patch for one file that has no `diff --git` header."""
        began = self.at
        old, new = (self._unquote(_without_time(self._peek(n)[4:])) for n in (0, 1))
        self.at += 2
        status = "added" if old == NO_FILE else "deleted" if new == NO_FILE else "modified"
        if status == "modified":
            old, new = self._stripped(old, new)
            status = "modified" if old == new else "renamed"
        else:
            old, new = (
                _PREFIXES.sub(b"", each, count=1) if each[:2] in (b"a/", b"b/") else each for each in (old, new)
            )
        file = PatchedFile(path=self._path(old if status == "deleted" else new, began), old_path=None, status=status)
        if status == "renamed":
            file.old_path = self._path(old, began)
        self._hunks(file)
        if not file.hunks:
            raise self._error("The file has no hunk.", began)
        return file

    def _stripped(self, old: bytes, new: bytes) -> tuple[bytes, bytes]:
        """Return the paths without the prefixes `a/` and `b/`, if both paths have these prefixes."""
        has_both = _PREFIXES.match(old) is not None and _PREFIXES.match(new) is not None
        return (old[2:], new[2:]) if has_both and old[:2] != new[:2] else (old, new)

    def _unquote(self, text: bytes) -> bytes:
        if len(text) < 2 or not (text.startswith(b'"') and text.endswith(b'"')):
            return text

        def plain(match: re.Match[bytes]) -> bytes:
            code = match[1]
            return bytes([int(code, 8)]) if len(code) == 3 else _ESCAPED.get(code, code)

        return _ESCAPE.sub(plain, text[1:-1])

    def _path(self, raw: bytes, line: int) -> str:
        """Return a path as text. Raise `PatchError` if it is empty, too long, or leads outside the repository."""
        if not raw or len(raw) > MAX_PATH_BYTES or b"\0" in raw:
            raise self._error("The path is empty or too long.", line)
        parts = raw.replace(b"\\", b"/").split(b"/")
        if parts[0] == b"" or b".." in parts or re.match(rb"[A-Za-z]:", raw):
            raise self._error("Paths must be relative and must not contain `..`.", line)
        return raw.decode(errors="replace")

    # -- contents

    def _skip_binary(self) -> None:
        """Skip exactly the lines of a binary change, because the next file may follow immediately."""
        self.at += 1
        while _BINARY_PART.fullmatch(self._peek(0)):
            while self._peek(0):
                self.at += 1
            self.at += 1

    def _hunks(self, file: PatchedFile) -> None:
        file.hunks = []
        while match := _HUNK.fullmatch(self._peek(0)):
            old_start, new_start = int(match[1]), int(match[3])
            old_lines = 1 if match[2] is None else int(match[2])
            new_lines = 1 if match[4] is None else int(match[4])
            self.at += 1
            first = self.at
            lines = self._hunk_lines(old_lines, new_lines)
            file.hunks.append(Hunk(old_start, old_lines, new_start, new_lines, match[5], lines, first + 1))
            added = sum(line[:1] == b"+" for line in lines)
            file.additions += added
            file.deletions += len(lines) - new_lines
            self.hunks += 1
            if self.hunks > MAX_HUNKS:
                raise self._error(f"The patch has more than {MAX_HUNKS} hunks.")
        line = self._peek(0)
        if line.startswith(b"@@"):
            raise self._error("The header of the hunk is malformed.")
        ends = line in (b"-- ", b"--") or (line.startswith(b"--- ") and self._peek(1).startswith(b"+++ "))
        if file.hunks and line[:1] in (b"+", b"-", b" ") and not ends:
            raise self._error("The hunk has more lines than its header announces.")

    def _hunk_lines(self, old: int, new: int) -> list[bytes]:
        """Read the lines of a hunk. Raise `PatchError` unless the hunk has exactly `old` old and `new` new lines."""
        began, found = self.at - 1, []
        while old > 0 or new > 0:
            if self.at >= len(self.lines):
                raise self._error("The hunk has fewer lines than its header announces.", began)
            line = self.lines[self.at] or b" "  # some tools strip the space of empty lines
            kind = line[:1]
            if kind == b"\\":
                self.at += 1
                continue
            old -= kind in (b" ", b"-")
            new -= kind in (b" ", b"+")
            if kind not in (b" ", b"-", b"+") or old < 0 or new < 0:
                raise self._error("The line does not fit the header of the hunk.")
            found.append(line)
            self.at += 1
        if self._peek(0).startswith(b"\\"):
            self.at += 1
        return found


def _space_positions(text: bytes) -> list[int]:
    """Return the positions of the spaces in `text`, those nearest to the middle first.

    If a header names the same path twice, the space in the middle separates the two.
    """
    found = [index for index, byte in enumerate(text) if byte == 0x20]
    return sorted(found, key=lambda index: abs(2 * index - len(text)))[:64]


def _without_time(text: bytes) -> bytes:
    """Return the path in a `---` or `+++` line, without the tab and timestamp that may follow."""
    return text if text.startswith(b'"') else text.split(b"\t")[0]
