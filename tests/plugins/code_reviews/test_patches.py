"""The parser of patches agrees with git about real diffs, and refuses what it cannot show completely."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corral_plugins.code_reviews.service.patches import Patch, PatchedFile, PatchError, parse_patch

pytestmark = pytest.mark.one_engine

STATUS = {"A": "added", "M": "modified", "D": "deleted", "R": "renamed", "C": "added", "T": "modified"}


def git(where: Path, *arguments: str) -> bytes:
    """Run git in a folder."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "core.autocrlf=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=where, check=True, capture_output=True).stdout


def numstat(where: Path, *range_: str) -> dict[str, tuple[str, str]]:
    """What `git diff --numstat` says, by the new path."""
    fields = git(where, "diff", "--numstat", "-z", "-M", *range_).split(b"\0")
    found: dict[str, tuple[str, str]] = {}
    at = 0
    while at < len(fields) - 1:
        added, deleted, path = fields[at].split(b"\t", 2)
        if not path:  # a rename: the old and the new path follow
            path, at = fields[at + 2], at + 2
        found[path.decode(errors="replace")] = (added.decode(), deleted.decode())
        at += 1
    return found


def raw(where: Path, *range_: str) -> dict[str, tuple[str, str | None]]:
    """What `git diff --raw` says: status and old path, by the new path."""
    fields = git(where, "diff", "--raw", "-z", "-M", *range_).split(b"\0")
    found: dict[str, tuple[str, str | None]] = {}
    at = 0
    while at < len(fields) - 1:
        letter = fields[at].split(b" ")[-1].decode()[0]
        first = fields[at + 1].decode(errors="replace")
        if letter in "RC":
            found[fields[at + 2].decode(errors="replace")] = (STATUS[letter], first)
            at += 3
        else:
            found[first] = (STATUS[letter], None)
            at += 2
    return found


def check_against_git(where: Path, *range_: str) -> Patch:
    """Parse a real diff, and compare each file, number and hunk with what git says. Return the parsed patch."""
    data = git(where, "diff", "-M", *range_)
    patch = parse_patch(data)
    assert {file.path: (file.status, file.old_path) for file in patch.files} == raw(where, *range_)
    shown = {f.path: ("-", "-") if f.binary else (str(f.additions), str(f.deletions)) for f in patch.files}
    assert shown == numstat(where, *range_)
    rebuilt = [line for file in patch.files for line in hunk_texts(file)]
    assert rebuilt == hunk_lines_of(data)
    return patch


def hunk_texts(file: PatchedFile) -> Iterator[bytes]:
    """The lines of all hunks of a file."""
    for hunk in file.hunks:
        assert sum(line[:1] != b"+" for line in hunk.lines) == hunk.old_lines
        assert sum(line[:1] != b"-" for line in hunk.lines) == hunk.new_lines
        yield from hunk.lines


def hunk_lines_of(data: bytes) -> list[bytes]:
    """The lines of hunks, found in another way: all lines that are not in a header."""
    found, inside = [], False
    for line in data.split(b"\n")[:-1]:
        if line.startswith(b"@@ "):
            inside = True
        elif line.startswith(b"diff --git "):
            inside = False
        elif inside and not line.startswith(b"\\"):
            found.append(line)
    return found


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with 60 commits: edits, renames, copies, modes, binary files, and paths that git quotes."""
    where = tmp_path_factory.mktemp("history")
    git(where, "init", "-q", "-b", "main")
    names = ["plain.py", "with space.txt", "täbé\t.txt", 'quo"te.txt', "b/a b/a.txt", "CRLF.txt", "deep/er/file.md"]
    lines: dict[str, list[str]] = {name: [f"{name} line {n}" for n in range(60)] for name in names}
    for commit in range(60):
        _change(where, lines, names[commit % len(names)], commit)
        git(where, "add", "-A")
        git(where, "commit", "-q", "--allow-empty", "-m", f"commit {commit}")
    return where


def _change(where: Path, lines: dict[str, list[str]], name: str, commit: int) -> None:
    """Make one of several kinds of changes."""
    text = lines[name]
    at = (commit * 7) % len(text)
    text[at : at + commit % 3] = [f"-- {commit}", "+++ b/other", "", f"@@ -1 +1 @@ {commit}"][: 1 + commit % 4]
    path = where / name
    path.parent.mkdir(parents=True, exist_ok=True)
    end = "" if commit % 5 == 0 else "\n"
    path.write_bytes((("\r\n" if name == "CRLF.txt" else "\n").join(text) + end).encode())
    (where / "image.png").write_bytes(bytes([commit]) * 500 + b"\0")
    (where / "empty.txt").write_bytes(b"" if commit % 2 else b"x\n")
    script = where / "plain.py"
    if script.exists():
        script.chmod(0o755 if commit % 4 else 0o644)
    moved, back = where / "deep/er/file.md", where / "moved to/file.md"
    if commit % 13 == 12 and moved.exists():
        back.parent.mkdir(exist_ok=True)
        moved.rename(back)


def test_real_diffs_are_parsed_as_git_counts_them(history: Path) -> None:
    commits = git(history, "log", "--format=%H", "--reverse").decode().split()
    parsed = 0
    for old, new in [*itertools.pairwise(commits), (commits[0], commits[-1])]:
        if git(history, "diff", old, new):
            check_against_git(history, old, new)
            parsed += 1
    assert parsed >= 50


def test_the_history_of_this_repository_is_parsed_as_git_counts_it() -> None:
    root = Path(__file__).parents[3]
    shallow = subprocess.run(["git", "log", "--format=%H", "-n", "61"], cwd=root, capture_output=True, text=True)
    commits = shallow.stdout.split()
    if len(commits) < 61:
        pytest.skip("The tests do not run in a clone with history.")
    parsed = 0
    for new, old in itertools.pairwise(commits):
        if git(root, "diff", old, new):
            check_against_git(root, old, new)
            parsed += 1
    check_against_git(root, commits[-1], commits[0])
    assert parsed >= 50


def test_a_binary_patch_is_passed_over(history: Path) -> None:
    commits = git(history, "log", "--format=%H", "-n", "2").decode().split()
    patch = parse_patch(git(history, "diff", "--binary", commits[1], commits[0]))
    assert [file.binary for file in patch.files if file.path == "image.png"] == [True]


GOOD = "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n"


@pytest.mark.parametrize(
    ("text", "line", "detail"),
    [
        ("", 1, "no unified diff"),
        ("hello\n", 1, "no unified diff"),
        ("diff --cc x\nindex 1,2..3\n", 1, "Combined"),
        ("--- a/x\n+++ b/x\n@@@ -1 -1 +1 @@@\n", 3, "malformed"),
        ("--- a/x\n+++ b/x\n@@ -1,2 +1 @@\n-a\n+b\n", 3, "fewer lines"),
        (GOOD + "+c\n", 6, "more lines"),
        ("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n?b\n", 5, "does not fit"),
        ("--- a/x\n+++ b/x\n", 1, "no hunk"),
        ("--- a/../x\n+++ b/../x\n@@ -1 +1 @@\n-a\n+b\n", 1, "relative"),
        ("--- /etc/x\n+++ /etc/x\n@@ -1 +1 @@\n-a\n+b\n", 1, "relative"),
        ('--- "a/\\056\\056/x"\n+++ "b/\\056\\056/x"\n@@ -1 +1 @@\n-a\n+b\n', 1, "relative"),
        ("diff --git a/x b/x\n--- a/x\n+++ b/y\n@@ -1 +1 @@\n-a\n+b\n", 3, "differs"),
    ],
)
def test_what_cannot_be_shown_completely_is_refused(text: str, line: int, detail: str) -> None:
    with pytest.raises(PatchError, match=detail) as caught:
        parse_patch(text.encode())
    assert caught.value.line == line


def test_code_reviews_8_paths_that_lead_out_of_the_repository_are_refused() -> None:
    for path in ("../../etc/passwd", "/etc/passwd", "a/../../b", "..\\x"):
        patches: Any = (
            f"diff --git a/{path} b/{path}\nold mode 100644\nnew mode 100755\n",
            f"diff --git a/y b/{path}\nsimilarity index 100%\nrename from y\nrename to {path}\n",
            f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+b\n",
        )
        for text in patches:
            with pytest.raises(PatchError, match="relative"):
                parse_patch(text.encode())


def test_too_many_files_are_refused() -> None:
    with pytest.raises(PatchError, match="more than 2000 files"):
        parse_patch("".join(GOOD.replace("/x", f"/x{n}") for n in range(2001)).encode())
