"""Passwords that are known from breaches, and what people make of them. The list is part of the product: no network."""

from __future__ import annotations

import functools
import string
from importlib import resources

SHORTEST = 2
_ROWS = (string.digits, "1234567890", string.ascii_lowercase, "qwertyuiop", "asdfghjkl", "zxcvbnm")
_RUNS = tuple(row[::step] * 128 for row in _ROWS for step in (1, -1))
_SPELLED = str.maketrans("@4310!$57", "aaeioisst")


def is_breached(password: str) -> bool:
    """Whether the password is on the list: as it is, with digits or signs around it, written with signs for letters,
    or said twice. Runs along the keyboard count too, and one or two characters again and again.
    """
    folded = password.casefold()
    if len(_once(folded)) <= SHORTEST or any(folded in run for run in _RUNS):
        return True
    return any(_is_listed(form) for form in _forms(folded))


def _forms(folded: str) -> set[str]:
    said = _once(folded)
    found = set()
    for form in (folded, said):
        stem = form.strip("".join({letter for letter in form if not letter.isalpha()}))
        found |= {form, stem, stem.translate(_SPELLED)}
    return found


def _once(text: str) -> str:
    """What is repeated, if the text is nothing but repetitions."""
    again = (text + text).find(text, 1)
    return text[:again]


def _is_listed(form: str) -> bool:
    return bool(form) and "\n" not in form and f"\n{form}\n".encode() in _listed()


@functools.cache
def _listed() -> bytes:
    """One a line, lower case, the most frequent first: searched as it is, it takes no more memory than the file."""
    return resources.files("corral_core.accounts").joinpath("breached_passwords.txt").read_bytes()
