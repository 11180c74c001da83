"""Passwords that everybody knows, and what the policy says of them."""

from __future__ import annotations

import secrets
from importlib import resources

import pytest

from corral.errors import Invalid
from corral.plugin import Setting
from corral_core.accounts.service.passwords import PasswordPolicy, is_breached
from corral_core.accounts.settings import BREACHED_CHECK, CONTEXT_WORDS, MIN_LENGTH


def test_the_list_holds_the_most_usual_ones_and_every_line_is_found() -> None:
    lines = resources.files("corral_core.accounts").joinpath("breached_passwords.txt").read_text("utf-8").split()
    assert len(set(lines)) == len(lines) == 30_000
    assert lines == [line.casefold() for line in lines]
    assert all(is_breached(line) for line in lines[::50])
    assert is_breached(lines[0])
    assert is_breached(lines[-1])


@pytest.mark.parametrize(
    "password",
    [
        "Password1234",
        "P@ssw0rd2024!",
        "passwordpassword",
        "iloveyou!!!!!!",
        "MonkeyMonkeyMonkey",
        "123456789012",
        "qwertyuiopqwe",
        "zyxwvutsrqponm",
        "............",
        "abababababab",
        "--dragon--",
        "890123456789",
    ],
)
def test_what_people_make_of_them_is_known_too(password: str) -> None:
    assert is_breached(password)


@pytest.mark.parametrize(
    "password",
    [
        "correct horse battery staple",
        "zebra-lantern-93-omega",
        "Tr0ub4dor&3xyz",
        "the monkey eats dragons",
        "ein ganz langer Satz",
    ],
)
def test_what_only_resembles_them_is_not(password: str) -> None:
    assert not is_breached(password)


def test_random_passwords_pass() -> None:
    assert not any(is_breached(secrets.token_urlsafe(12)) for _ in range(500))


def _codes(password: str, **values: object) -> list[str]:
    declared = {setting.name.partition(".")[2]: setting for setting in (BREACHED_CHECK, CONTEXT_WORDS, MIN_LENGTH)}

    class Values:
        def get(self, setting: Setting[object]) -> object:
            name = setting.name.partition(".")[2]
            return values.get(name, setting.default) if name in declared else setting.default

    policy = PasswordPolicy(Values())  # type: ignore[arg-type]  # of the values that the test names
    try:
        policy.check_password(password, email="ada@example.org", full_name="Ada Lovelace", pointer="/password")
    except Invalid as problem:
        return [problem.code, *(f"{fault.pointer} {fault.code}" for fault in problem.errors)]
    return []


def test_every_broken_rule_is_told_at_once() -> None:
    def broken(*codes: str) -> list[str]:
        return ["weak_password", *(f"/password {code}" for code in codes)]

    assert _codes("password") == broken("too_short", "core.breached")
    assert _codes("password", breached_check=False) == broken("too_short")
    assert _codes("Password1234") == broken("core.breached")
    assert _codes("lovelace is my name") == broken("core.context_word")
    assert _codes("a corral of horses") == broken("core.context_word")
    assert _codes("the ox is in the field", context_words=["ox"]) == broken("core.context_word")
    assert _codes("zebra-lantern-93-omega") == []
