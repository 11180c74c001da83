"""The fields that commands take: text, JSON, and text from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.cli.request_body import parse_fields

pytestmark = pytest.mark.one_engine


@pytest.mark.parametrize("field", ["password", "value", "api_key", "bot_token", "webhook_secret", "code", "passphrase"])
def test_a_secret_from_a_file_loses_the_line_break_at_its_end(tmp_path: Path, field: str) -> None:
    (tmp_path / "secret").write_text("of one line\r\n")
    assert parse_fields((f"{field}=@{tmp_path}/secret",)) == {field: "of one line"}


@pytest.mark.parametrize("field", ["content", "description", "system_prompt", "source", "stdin"])
def test_other_text_from_a_file_is_kept_as_it_is(tmp_path: Path, field: str) -> None:
    (tmp_path / "notes.md").write_text("first\nlast\n")
    assert parse_fields((f"{field}=@{tmp_path}/notes.md",)) == {field: "first\nlast\n"}
