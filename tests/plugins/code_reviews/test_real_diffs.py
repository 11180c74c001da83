"""Comments survive revisions of 50 real diffs: each commit of a repository's history, and the same commit revised."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path

import pytest
from tests.plugins.code_reviews.conftest import Desk

from corral_plugins.code_reviews.service.anchors import Place, context_of, find_new_places
from corral_plugins.code_reviews.service.patches import Patch, parse_patch

ROOT = Path(__file__).parents[3]
WANTED = 50


def git(*arguments: str) -> str:
    """Run git in this repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def texts(patch: Patch, path: str) -> dict[int, str]:
    """The lines that a patch shows of a file after the change."""
    file = patch.find(path, "new")
    return {} if file is None else {n: line.decode(errors="replace") for n, line in file.side("new").items()}


def shifted(patch: str, lines: int) -> str:
    """The same diff with this many new lines at the top of each file that exists before and after."""
    found, at_first_hunk = [], False
    for line in patch.splitlines(keepends=True):
        if line.startswith("diff --git "):
            at_first_hunk, offset = True, 0
        if line.startswith("@@ ") and at_first_hunk and not line.startswith(("@@ -0", "@@ -1,", "@@ -1 ")):
            found.append(f"@@ -0,0 +1,{lines} @@\n" + "".join(f"+a new line {n}\n" for n in range(lines)))
            offset = lines
        if line.startswith("@@ "):
            at_first_hunk = False
            old, new = line.split(" ")[1:3]
            start, _, count = new[1:].partition(",")
            moved = f"+{int(start) + offset}{',' + count if count else ''}"
            line = line.replace(f" {old} {new} @@", f" {old} {moved} @@", 1)
        found.append(line)
    return "".join(found)


def real_diffs(wanted: int) -> list[str]:
    """The diffs of the newest commits of this repository that are short enough to be shown."""
    try:
        commits = git("log", "--no-merges", "--format=%H", "-n", "160").split()
    except subprocess.CalledProcessError:
        pytest.skip("The tests do not run in a clone with history.")
    found: list[str] = []
    for commit in commits:
        if len(found) == wanted:
            return found
        text = git("show", "--format=", "-M", commit)
        if text and len(text) <= 200_000 and "\r" not in text and "\nBinary files" not in text:
            found.append(text)
    pytest.skip("The clone has too little history.")


@pytest.mark.one_engine
def test_comments_survive_a_revision_of_50_real_diffs() -> None:
    chance, active, orphaned = random.Random(1), 0, 0
    for text in real_diffs(WANTED):
        first, second = parse_patch(text.encode()), parse_patch(shifted(text, 10).encode())
        others = first.files[1:]
        for file in first.files:
            before, after = texts(first, file.path), texts(second, file.path)
            for line in chance.sample(sorted(before), min(5, len(before))):
                context = context_of(first, file.path, "new", line, line)
                assert context is not None
                place = Place(file=file.path, side="new", line=line, context=context)
                (same,) = find_new_places(first, [place])
                assert (same.anchor, same.line) == (
                    ("active", line) if file.status != "deleted" else ("orphaned", None)
                )
                (found,) = find_new_places(second, [place])
                if found.line is not None:
                    active += 1
                    assert after[found.line] == before[line]
                    assert found.line - line in (0, 10) or before[line] in list(after.values())
                (gone,) = find_new_places(Patch(files=others), [place])
                orphaned += gone.anchor == "orphaned"
    assert active > 200
    assert orphaned > 0


async def test_comments_survive_a_revision_of_real_diffs_through_the_api(desk: Desk, long_form: bool) -> None:
    """Short form: 6 diffs; long form (`--long`): 50."""
    wanted, chance, active, seen = WANTED if long_form else 6, random.Random(2), 0, 0
    for text in real_diffs(wanted):
        second = shifted(text, 10)
        review = await desk.opened(patch=text)
        first, after = parse_patch(text.encode()), parse_patch(second.encode())
        changed = [file.path for file in first.files if texts(first, file.path)]
        said = {}
        for path in chance.sample(changed, min(3, len(changed))):
            line = chance.choice(sorted(texts(first, path)))
            made = await desk.comment(review["id"], "Why?", file=path, line=line)
            said[made["id"]] = texts(first, path)[line]
        revised = await desk.member.post(f"/code-reviews/{review['id']}/revisions", {"patch": second})
        assert (revised.status, revised.json()["revision"]) == (200, 2), revised
        for comment in revised.json()["comments"]:
            if comment["author"]["type"] == "system":  # the diff has a text that looks like a credential
                continue
            seen += 1
            if comment["anchor"] == "active":
                active += 1
                assert comment["revision"] == 2
                assert texts(after, comment["file"])[comment["line"]] == said[comment["id"]]
            else:
                assert (comment["anchor"], comment["revision"]) == ("outdated", 1)
        diff = await desk.member.get(f"/code-reviews/{review['id']}/diff")
        assert hashlib.sha256(diff.body).hexdigest() == revised.json()["patch_sha256"]
    assert active > seen / 2
