"""Display names of files. No name is ever part of a path."""

from __future__ import annotations

import unicodedata

MAX_NAME = 255
UNNAMED = "file"
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # control, format (bidi too) and unassigned characters


def clean_name(given: str) -> str:
    """Return a harmless display name: the last segment of the given path, in NFC, without invisible characters.

    A name with more than 255 characters is shortened in the middle, so that it keeps its extension.
    """
    base = given.replace("\\", "/").rstrip("/").rpartition("/")[2]
    text = unicodedata.normalize("NFC", "".join(sign for sign in base if unicodedata.category(sign) not in _HIDDEN))
    text = text.strip()
    if len(text) > MAX_NAME:
        stem, dot, extension = text.rpartition(".")
        tail = dot + extension if stem and len(extension) <= 20 else ""
        text = text[: MAX_NAME - len(tail)] + tail
    return UNNAMED if not text.strip(".") else text


def content_disposition(name: str) -> str:
    """Return the `Content-Disposition` of a download: an ASCII name, and the whole name as RFC 6266 encodes it."""
    from urllib.parse import quote

    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = "".join(sign if sign.isalnum() or sign in " ._-()" else "_" for sign in plain).strip() or UNNAMED
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
