"""The commands of code reviews: what a person reads before a decision."""

from __future__ import annotations

from typing import Any

import pytest

from corral_plugins.code_reviews.commands import _print_diff

PATCH = "--- a/f\n+++ b/f\n@@ -1 +1,2 @@\n a\n+b"


class _NoNames:
    def name(self, path: str, identifier: str | None) -> str:
        return str(identifier)


def test_the_last_line_is_shown_with_its_comments_if_the_patch_has_no_final_newline(
    capsys: pytest.CaptureFixture[str],
) -> None:
    comment = {
        "file": "f",
        "line": 2,
        "end_line": 2,
        "side": "new",
        "anchor": "active",
        "revision": 1,
        "resolved": False,
        "severity": "issue",
        "suggestion": None,
        "author": {"type": "agent", "id": "one"},
        "body": "Why?",
        "id": "c1",
    }
    hunk = {"patch_line": 4, "old_start": 1, "old_lines": 1, "new_start": 1, "new_lines": 2}
    files = [{"path": "f", "old_path": None, "hunks": [hunk]}]
    names: Any = _NoNames()
    _print_diff(names, PATCH, {"files": files, "comments": [comment]})
    shown = capsys.readouterr().out.splitlines()
    assert shown[4] == "+b"
    assert "Why?" in shown[5]
