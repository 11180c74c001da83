"""Spellings of one address are one address."""

from __future__ import annotations

import pytest

from corral.errors import Invalid
from corral_core.accounts.service.email_addresses import normalize_address, validate_email

SPELLINGS = ["Ann@Example.ORG", " ann@example.org ", "ａｎｎ@example.org", "ANN@EXAMPLE.ORG\u00a0"]
WRONG = ["", "ann", "@example.org", "ann@", "a b@example.org", "a@b@c", "a\x00@b", "\ufdfa" * 20 + "@b"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_have_one_normal_form(spelling: str) -> None:
    assert normalize_address(spelling) == "ann@example.org"


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        validate_email(text)


def test_normalising_twice_changes_nothing() -> None:
    for letter in map(chr, range(0xA0, 0x3000)):
        assert normalize_address(normalize_address(letter)) == normalize_address(letter)
