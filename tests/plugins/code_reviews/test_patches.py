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
        (GOOD + "--- c\n", 6, "more lines"),
        (GOOD + "-- c\n", 6, "more lines"),
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


def changes(text: str) -> list[tuple[str, str, int, int]]:
    """What a patch does to each file."""
    files = parse_patch(text.encode()).files
    return [(file.path, file.status, file.additions, file.deletions) for file in files]


@pytest.mark.parametrize("kind", ["named", "literal"])
def test_a_file_that_follows_a_binary_one_is_shown(kind: str) -> None:
    """`git apply` applies both, so a reader must see both."""
    binary = {
        "named": "Binary files a/i.png and b/i.png differ\n",
        "literal": "GIT binary patch\nliteral 1\nIcmZQzU<!\n\nliteral 0\nHcmV?d00001\n\n",
    }[kind]
    patch = f"diff --git a/i.png b/i.png\nindex 1..2 100644\n{binary}{GOOD}"
    assert changes(patch) == [("i.png", "modified", 0, 0), ("x", "modified", 1, 1)]


def test_what_is_around_the_files_of_a_mailed_patch_is_passed_over() -> None:
    mail = "From 1 Mon Sep 17 00:00:00 2001\nSubject: [PATCH] Fix\n\n---\n x | 2 +-\n 1 file changed\n\n"
    other = GOOD.replace("/x", "/y")
    assert [path for path, *_ in changes(f"{mail}{GOOD}-- \n2.40.1\n\n{mail}{other}-- \n2.40.1\n")] == ["x", "y"]


def test_a_file_that_is_changed_twice_is_refused() -> None:
    """Only one of the two changes could be commented on and compared."""
    with pytest.raises(PatchError, match="twice") as caught:
        parse_patch((GOOD + GOOD).encode())
    assert caught.value.line == 6


def test_a_change_of_the_type_of_a_file_is_a_deletion_and_an_addition(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "x").write_text("one\ntwo\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "a file")
    (tmp_path / "x").unlink()
    (tmp_path / "x").symlink_to("target")
    patch = parse_patch(git(tmp_path, "diff"))
    assert [file.status for file in patch.files] == ["deleted", "added"]
    sides = {side: patch.find("x", side) for side in ("old", "new")}
    assert {side: file and file.side(side) for side, file in sides.items()} == {
        "old": {1: b"one", 2: b"two"},
        "new": {1: b"target"},
    }


def test_a_file_is_deleted_or_added_if_a_path_is_dev_null() -> None:
    header = "diff --git a/x b/x\n"
    assert changes(header + "--- a/x\n+++ /dev/null\n@@ -1 +0,0 @@\n-a\n") == [("x", "deleted", 0, 1)]
    assert changes(header + "--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+a\n") == [("x", "added", 1, 0)]


def test_too_many_hunks_are_refused() -> None:
    hunks = "".join(f"@@ -{n} +{n} @@\n-a\n+b\n" for n in range(1, 20_002))
    with pytest.raises(PatchError, match="more than 20000 hunks"):
        parse_patch(f"--- a/x\n+++ b/x\n{hunks}".encode())


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
