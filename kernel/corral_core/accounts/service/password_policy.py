"""The password policy: every rule that a new password breaks is told at once."""

from __future__ import annotations

import re
from collections.abc import Iterator

from corral.errors import Fault, Invalid
from corral.plugin import Settings
from corral_core.accounts.service.breached_passwords import is_breached
from corral_core.accounts.settings import (
    BREACHED_CHECK,
    CONTEXT_WORDS,
    MIN_LENGTH,
    REQUIRE_DIGIT,
    REQUIRE_LOWER,
    REQUIRE_SYMBOL,
    REQUIRE_UPPER,
)

PRODUCT = "corral"
SHORTEST_WORD = 4  # shorter names occur in any text

_CLASSES = (
    (REQUIRE_UPPER, str.isupper, "core.no_upper", "an upper-case letter"),
    (REQUIRE_LOWER, str.islower, "core.no_lower", "a lower-case letter"),
    (REQUIRE_DIGIT, str.isdigit, "core.no_digit", "a digit"),
    (REQUIRE_SYMBOL, lambda letter: not letter.isalnum() and not letter.isspace(), "core.no_symbol", "a symbol"),
)


class PasswordPolicy:
    """Judges new passwords; those in use stay valid when it changes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def check(self, password: str, *, email: str, full_name: str, pointer: str) -> None:
        """Raise `Invalid` (`weak_password`) with one fault a broken rule."""
        faults = [Fault(pointer, code, detail) for code, detail in self._broken(password, email, full_name)]
        if faults:
            raise Invalid(
                "Choose another password: " + " ".join(each.detail for each in faults),
                code="weak_password",
                errors=faults,
            )

    def shown(self) -> dict[str, int | bool]:
        """The rules, for screens that ask for a new password."""
        rules: dict[str, int | bool] = {"min_length": self._settings.get(MIN_LENGTH), "max_length": 128}
        rules["breached_check"] = self._settings.get(BREACHED_CHECK)
        for setting, _, _, _ in _CLASSES:
            rules[setting.name.partition(".")[2]] = self._settings.get(setting)
        return rules

    def _broken(self, password: str, email: str, full_name: str) -> Iterator[tuple[str, str]]:
        least = self._settings.get(MIN_LENGTH)
        if len(password) < least:
            yield "too_short", f"Use at least {least} characters."
        folded = password.casefold()
        own = [email, email.partition("@")[0], *re.split(r"\W+", full_name)]
        words = [word for word in (PRODUCT, *own) if len(word) >= SHORTEST_WORD] + self._settings.get(CONTEXT_WORDS)
        if any(word.casefold() in folded for word in words):
            yield "core.context_word", "Leave out your name, your address and the names of this product."
        if self._settings.get(BREACHED_CHECK) and is_breached(password):
            yield "core.breached", "It is a password, or near one, that is known from breaches."
        for setting, matches, code, what in _CLASSES:
            if self._settings.get(setting) and not any(matches(letter) for letter in password):
                yield code, f"Use {what}."
