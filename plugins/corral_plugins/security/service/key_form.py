"""The text of an API key, `crl_<id>_<secret><crc>`: its checksum tells one that is none before any look-up."""

from __future__ import annotations

import secrets
import string
import zlib

PREFIX = "crl_"
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
ID, SECRET, CHECK = 8, 43, 6
LENGTH = len(PREFIX) + ID + 1 + SECRET + CHECK
SHOWN = len(PREFIX) + ID


def new_key(public: str | None = None) -> str:
    """A key of 256 random bits; `public`: with the part that is shown of another one."""
    shown = public or PREFIX + _random(ID)
    body = f"{shown}_{_random(SECRET)}"
    return body + _check(body)


def is_key(text: str) -> bool:
    """Whether the text has the form of a key and its checksum is right."""
    return (
        len(text) == LENGTH
        and text.startswith(PREFIX)
        and text.isascii()
        and text[SHOWN] == "_"
        and text[-CHECK:] == _check(text[:-CHECK])
    )


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _check(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECK):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits
