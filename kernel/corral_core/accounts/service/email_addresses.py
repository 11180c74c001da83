"""The normal form of email addresses, used to find accounts, to compare addresses and to count sign-in attempts."""

from __future__ import annotations

import re
import unicodedata

from corral.errors import Invalid

MAX_LENGTH = 254
_FORM = re.compile(r"[^\s@]+@[^\s@]+")


def normalize_address(address: str) -> str:
    """Return the normal form of an address (NFKC, stripped, case-folded).

    All spellings of an address have the same normal form. This function never raises an exception: it also normalizes
    strings that are not addresses, but the result matches no account.
    """
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", address).strip().casefold())


def validate_email(address: str, pointer: str = "/email") -> str:
    """Validate an address to be stored, and return its normal form. Raise `Invalid` if the text is not an address."""
    key = normalize_address(address)
    if not _FORM.fullmatch(key) or len(key) > MAX_LENGTH or any(not letter.isprintable() for letter in key):
        raise Invalid.at(pointer, "bad_format", "Give an email address such as name@example.org.")
    return key
