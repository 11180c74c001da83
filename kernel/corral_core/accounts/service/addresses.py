"""The one normal form of an email address: it serves look-up, uniqueness and every counter."""

from __future__ import annotations

import re
import unicodedata

from corral.errors import Invalid

MAX_LENGTH = 254
_FORM = re.compile(r"[^\s@]+@[^\s@]+")


def normalise(address: str) -> str:
    """NFKC, strip, casefold: spellings of one address become one string. Never fails; no address finds nobody."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", address).strip().casefold())


def check_address(address: str, pointer: str = "/email") -> str:
    """The normal form of an address that is to be stored; `Invalid` when it is not one."""
    key = normalise(address)
    if not _FORM.fullmatch(key) or len(key) > MAX_LENGTH or any(not letter.isprintable() for letter in key):
        raise Invalid.at(pointer, "bad_format", "Give an email address such as name@example.org.")
    return key
