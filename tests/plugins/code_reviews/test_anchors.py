"""Comments find their lines again in real diffs, and are never moved to other lines; revisions can be compared."""

from __future__ import annotations

import difflib
import random
import time

import msgspec
import pytest

from corral_plugins.code_reviews.service.anchors import Context, NewPlace, Place, context_of, find_new_places
from corral_plugins.code_reviews.service.interdiffs import interdiff
from corral_plugins.code_reviews.service.patches import Patch, parse_patch

pytestmark = pytest.mark.one_engine

BASE = [f"line {n}" for n in range(1, 41)]


def patch_of(new: list[str] | None, old: list[str] | None = None, path: str = "x.py") -> Patch:
    """The patch from `old` (by default 40 lines) to `new`."""
    return parse_patch(text_of(new, old, path).encode())


def text_of(new: list[str] | None, old: list[str] | None = None, path: str = "x.py") -> str:
    """The same as text; None is a file that does not exist."""
    old = BASE if old is None else old
    to = "/dev/null" if new is None else f"b/{path}"
    return "".join(f"{line.rstrip()}\n" for line in difflib.unified_diff(old, new or [], f"a/{path}", to, lineterm=""))


def edited(at: int, *lines: str) -> list[str]:
    """The base, with lines in place of one line."""
    return [*BASE[: at - 1], *lines, *BASE[at:]]


FIRST = edited(20, "changed")


def moved(new: Patch, line: int = 20, end: int | None = None) -> tuple[str, int | None]:
    """What becomes of a comment on the changed line of the first revision."""
    context = context_of(patch_of(FIRST), "x.py", "new", line, end or line)
    assert context is not None
    found = again(new, line, context)
    return found.anchor, found.line


def again(new: Patch, line: int, context: Context | None) -> NewPlace:
    """Where a comment on x.py is in a revision."""
    return find_new_places(new, [Place(file="x.py", side="new", line=line, context=context)])[0]


def test_code_reviews_4_lines_are_found_again_by_their_exact_context() -> None:
    assert moved(patch_of(FIRST)) == ("active", 20)
    assert moved(patch_of([*(["new"] * 10), *FIRST])) == ("active", 30)
    assert moved(patch_of(edited(20, "changed again"))) == ("outdated", None)
    assert moved(patch_of([*FIRST[:20], "inserted", *FIRST[20:]])) == ("outdated", None)
    assert moved(patch_of(None)) == ("orphaned", None)
    assert moved(patch_of(["else"], ["what"], "other.py")) == ("orphaned", None)


def test_a_comment_on_several_lines_needs_all_of_them() -> None:
    assert moved(patch_of([*(["new"] * 3), *FIRST]), 19, 22) == ("active", 22)
    assert moved(patch_of([*FIRST[:20], "other", *FIRST[21:]]), 19, 22) == ("outdated", None)


def test_lines_that_occur_twice_are_not_guessed() -> None:
    block = ["a", "b", "c", "x", "d", "e", "f"]
    first = patch_of([*BASE, *block], BASE)
    context = context_of(first, "x.py", "new", 44, 44)
    twice = patch_of([*block, *BASE, "between", *block], BASE)
    assert again(twice, 44, context).anchor == "outdated"


def test_lines_that_the_patch_does_not_show_have_no_context() -> None:
    first = patch_of(FIRST)
    assert context_of(first, "x.py", "new", 5, 5) is None
    assert context_of(first, "x.py", "new", 22, 25) is None
    assert context_of(first, "y.py", "new", 20, 20) is None
    old = context_of(first, "x.py", "old", 20, 20)
    assert old is not None
    assert (old.before, old.lines, old.after) == (BASE[16:19], ["line 20"], BASE[20:23])


def test_a_context_is_small_however_long_the_lines_are() -> None:
    """Bytes that are no text are compared exactly too."""
    long = [("x" * 100_000) + str(n) for n in range(7)]
    first, second = patch_of([*BASE, *long], BASE), patch_of(["above", *BASE, *long], BASE)
    context = context_of(first, "x.py", "new", 44, 44)
    assert context is not None
    assert len(msgspec.json.encode(context)) < 1000
    assert again(second, 44, context).line == 45
    data = [b"--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a\n+" + each + b"\n" for each in (b"\xe9\xff", b"\xe8\xff")]
    context = context_of(parse_patch(data[0]), "x.py", "new", 1, 1)
    assert [again(parse_patch(each), 1, context).anchor for each in data] == ["active", "outdated"]


def test_1000_comments_on_a_large_file_are_found_in_a_moment() -> None:
    """The search runs in the unit of work that adds the revision, whose time is limited."""
    lines = [*(text for n in range(40_000) for text in (f"    number({n})", "")), "end"]
    first, second = patch_of(lines, []), patch_of(["above", *lines], [])
    places = [
        Place(file="x.py", side="new", line=line, context=context_of(first, "x.py", "new", line, line))
        for line in (1, 2, 40_000)
    ]
    places += [
        Place(file="x.py", side="new", line=2 * n, context=Context([], [""], [f"    other({n})"])) for n in range(997)
    ]
    began = time.process_time()
    found = find_new_places(second, places)
    seconds = time.process_time() - began
    assert [each.line for each in found[:3]] == [2, 3, 40_001]
    assert {each.anchor for each in found[3:]} == {"outdated"}
    print(f"1000 comments were found in {seconds:.3f} s")
    assert seconds < 10


def test_a_renamed_file_keeps_its_comments() -> None:
    text = text_of([*(["new"] * 10), *FIRST]).split("\n", 2)[2]
    header = "diff --git a/x.py b/y.py\nsimilarity index 90%\nrename from x.py\nrename to y.py\n"
    renamed = parse_patch((header + "--- a/x.py\n+++ b/y.py\n" + text).encode())
    context = context_of(patch_of(FIRST), "x.py", "new", 20, 20)
    found = again(renamed, 20, context)
    assert (found.anchor, found.line, found.file) == ("active", 30, "y.py")


def test_comments_survive_revisions_of_random_diffs_only_on_unchanged_lines() -> None:
    """A comment that is found again is on the same text with the same neighbours, in 200 random pairs of revisions."""
    chance, active = random.Random(7), 0
    for _ in range(200):
        revisions = []
        for _ in range(2):
            lines = list(BASE)
            for _ in range(chance.randint(1, 5)):
                at = chance.randrange(len(lines))
                lines[at : at + chance.randint(0, 2)] = [f"new {chance.randint(0, 3)}"] * chance.randint(0, 3)
            revisions.append(lines)
        if BASE in revisions:
            continue
        patches = [patch_of(lines) for lines in revisions]
        for number in patches[0].files[0].side("new"):
            context = context_of(patches[0], "x.py", "new", number, number)
            assert context is not None
            found = again(patches[1], number, context)
            if found.line is not None:
                active += 1
                at = found.line - 1
                assert revisions[1][at] == revisions[0][number - 1]
                after = revisions[1][at + 1 : at + 1 + len(context.after)]
                assert context.after[: len(after)] == after or not _is_shown(patches[1], found.line + 1)
    assert active > 100


def _is_shown(patch: Patch, line: int) -> bool:
    shown = patch.files[0].side("new")
    return all(line + n in shown for n in range(3))


def test_revisions_are_compared_as_they_leave_the_files() -> None:
    first, second = patch_of(FIRST), patch_of([*FIRST[:4], "early", *FIRST[4:30], "late", *FIRST[31:]])
    shown = interdiff(first, second).decode()
    changed = [line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == ["+early", "-line 31", "+late"]
    assert parse_patch(shown.encode()).files[0].hunks[0].new_start == 2
    assert interdiff(first, first) == b""
    assert b"-changed" in interdiff(first, patch_of(["else"], ["what"], "other.py"))


def test_files_that_have_little_in_common_are_compared_in_a_moment() -> None:
    """The comparison of lines that differ everywhere grows with the third power of their number."""

    def made(kind: str, step: int, files: int) -> Patch:
        lines = [text for n in range(3000) for text in (f"{kind}{n}", f"x{n * step % 101}", f"{kind} {n}")]
        one = "".join(f"+{line}\n" for line in lines)
        names = [f"--- /dev/null\n+++ b/{n}.py\n@@ -0,0 +1,{len(lines)} @@\n" for n in range(files)]
        return parse_patch("".join(name + one for name in names).encode())

    before, after = made("u", 7, 10), made("v", 11, 10)
    began = time.process_time()
    shown = parse_patch(interdiff(before, after))
    seconds = time.process_time() - began
    print(f"ten files were compared in {seconds:.3f} s")
    assert seconds < 10
    assert [(file.additions, file.deletions) for file in shown.files] == [(9000, 9000)] * 10


def test_a_change_in_the_middle_of_a_large_file_is_shown_alone() -> None:
    lines = [f"line {n}" for n in range(30_000)]
    first, second = patch_of(lines, []), patch_of([*lines[:15_000], "new", *lines[15_001:]], [])
    (file,) = parse_patch(interdiff(first, second)).files
    (hunk,) = file.hunks
    assert (hunk.new_start, hunk.new_lines, file.additions, file.deletions) == (14_998, 7, 1, 1)


def test_a_path_with_a_line_break_adds_no_line_to_a_comparison() -> None:
    head = b'--- "a/evil\\n+++ b/x"\n+++ "b/evil\\n+++ b/x"\n@@ -1 +1 @@\n-one\n+'
    shown = interdiff(parse_patch(head + b"two\n"), parse_patch(head + b"three\n"))
    assert shown.splitlines()[:2] == [rb'--- "a/evil\012+++ b/x"', rb'+++ "b/evil\012+++ b/x"']
    assert [file.path for file in parse_patch(shown).files] == ["evil\n+++ b/x"]
