"""Text that no service takes for markup or mentions."""

from __future__ import annotations

import pytest

from corral_plugins.notifications.service.plain_text import without_markup

pytestmark = pytest.mark.one_engine


@pytest.mark.parametrize(
    "text",
    [
        "@name",
        "@@name",
        "＠@name",
        "hello.@name",
        "-@name",
        "+@name",
        "(@name)",
        "@*name*",
        "@`name`",
        "*@*name",
        "@<!x>name",
        "<@U123>",
        "<<!here>@name>",
        "@[na](https://evil.example)me",
    ],
)
def test_nothing_is_a_mention(text: str) -> None:
    assert "@" not in without_markup(text)
    assert "＠" not in without_markup(text)


@pytest.mark.parametrize("text", ["ada@example.org", "a+b@example.org", "snake_case_name", "5 @ 3"])
def test_other_text_stays(text: str) -> None:
    assert without_markup(text) == text
