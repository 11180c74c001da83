"""Tables that commands print."""

from __future__ import annotations

from typing import Any

import pytest

from corral.cli import output

ROWS: list[dict[str, Any]] = [
    {
        "email": "someone.with.a.long.name@example.org",
        "text": "a sentence that goes on " * 4,
        "is_active": True,
        "at": "2026-11-26T14:14:51.351Z",
    },
    {"email": "a@example.org", "text": None, "is_active": False, "at": None},
]


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    output.print_table(ROWS, ("email", "text", "is_active", "at"), as_json=False)
    return capsys.readouterr().out.splitlines()


def test_on_a_narrow_terminal_names_and_short_words_stay_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed(capsys)
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("someone.with.a.long.name@example.org  a sentence") for line in lines)
    assert any("yes" in line for line in lines)


AGENT = {
    "name": "Postmaster",
    "status": "completed",
    "model": "scripted/echo",
    "detail": "a sentence that goes on " * 4,
    "url": "https://example.org/" + "x" * 100,
    "at": "2026-11-26T14:14:51.351Z",
    "task_id": "01a22881-e652-7494-8b93-272f77f8be0a",
    "id": "01a22890-b2fe-76e2-b75c-24218c5ebbc2",
}


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_narrow_terminal_breaks_no_id_and_no_word(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    output.print_table([AGENT], ("name", "status", "detail", "id"), as_json=False)
    few = capsys.readouterr().out
    assert max(map(len, few.splitlines())) <= width
    output.print_table([AGENT], tuple(AGENT), as_json=False)
    everything = capsys.readouterr().out
    assert {"2026-11-26", "14:14Z", AGENT["task_id"]} <= {*everything.split()}
    for shown in (few, everything):
        assert {"Postmaster", "completed", "sentence", AGENT["id"]} <= {*shown.split()}


def test_what_goes_to_a_file_is_a_line_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    heading, first, second = printed(capsys)
    assert heading.split() == ["email", "text", "is", "active", "at"]
    assert first.rstrip().endswith("yes        2026-11-26 14:14Z")
    assert second.split() == ["a@example.org", "-", "no", "-"]


@pytest.mark.parametrize("name", ["Bob [/x]", "[red]Bob[/red]", "[link=file:///etc/passwd]Bob[/link]", ":warning: Bob"])
def test_names_are_text_whatever_they_look_like(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table([{"full_name": name}], ("full_name",), as_json=False)
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (None, "unknown"),
        (0.0, "$0.00"),
        (0.000312, "$0.000312"),
        (0.05, "$0.05"),
        (0.0149, "$0.0149"),
        (1.5, "$1.50"),
        (1234.567, "$1234.57"),
        (-0.05, "-$0.05"),
    ],
)
def test_amounts_are_readable(amount: float | None, shown: str) -> None:
    assert output.format_usd(amount) == shown


def test_durations_are_readable() -> None:
    shown = [output.format_ms(each) for each in (None, 250, 2_900, 180_000, 7_200_000)]
    assert shown == ["-", "250 ms", "2.9 s", "3 min", "2 h"]


def test_fields_are_aligned_and_empty_ones_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_fields({}, {"name": "Echo", "prompt": "One\ntwo", "reason": None, "tools": []}, as_json=False)
    assert capsys.readouterr().out == "name:   Echo\nprompt: One\n        two\n"
