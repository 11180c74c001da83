"""Display names of files. A display name is never used in a storage path."""

from __future__ import annotations

import unicodedata

MAX_NAME = 255
UNNAMED = "file"
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # control, format (bidi too) and unassigned characters


def clean_name(given: str) -> str:
    """Return a safe display name: the last segment of the given path, in NFC, without invisible characters.

    A name with more than 255 characters is shortened in the middle, so that the extension is kept.
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
    """Return the `Content-Disposition` header for a download.

    The header contains an ASCII version of the name, and the full name in the encoding that RFC 6266 specifies.
    """
    from urllib.parse import quote

    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = "".join(sign if sign.isalnum() or sign in " ._-()" else "_" for sign in plain).strip() or UNNAMED
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
