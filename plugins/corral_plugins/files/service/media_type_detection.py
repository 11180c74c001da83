"""Detects the media type of a file from its content. The file name extension is ignored."""

from __future__ import annotations

import codecs
import re

TEXT, UNKNOWN = "text/plain", "application/octet-stream"
HEAD_BYTES = 8192
MARKUP = frozenset({"text/html", "image/svg+xml", "application/xml", "text/xml", "application/xhtml+xml"})
"""Media types that a browser could render as an active page. They are served as plain text."""

_EXECUTABLES = (  # the library knows these only by extension, or not at all
    (b"\x7fELF", "application/x-executable"),
    (b"\xfe\xed\xfa\xce", "application/x-mach-binary"),
    (b"\xfe\xed\xfa\xcf", "application/x-mach-binary"),
    (b"\xce\xfa\xed\xfe", "application/x-mach-binary"),
    (b"\xcf\xfa\xed\xfe", "application/x-mach-binary"),
    (b"L\x00\x00\x00\x01\x14\x02\x00\x00\x00\x00\x00\xc0\x00\x00\x00\x00\x00\x00\x46", "application/x-ms-shortcut"),
)
_COMPOUND = bytes.fromhex("d0cf11e0a1b11ae1")  # the container of MSI and of old Office files
_MSI = bytes.fromhex("84100c0000000000c000000000000046")  # the class id of an installer's root entry
_HTA = re.compile(rb"<\s*hta:application\b", re.IGNORECASE)
_HTML = re.compile(rb"^\s*(<!doctype html|<html\b|<head\b|<body\b|<script\b|<!--)", re.IGNORECASE)
_SVG = re.compile(rb"^\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*|<!doctype svg[^>]*>\s*)*<svg\b", re.IGNORECASE | re.DOTALL)
_XML = re.compile(rb"^\s*<\?xml\b", re.IGNORECASE)


class TypeDetector:
    """Detects the media type of a stream. Pass all chunks to `feed`, and then read `type`.

    Content that is valid UTF-8 without NUL characters is treated as text.
    """

    def __init__(self) -> None:
        self._head = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._is_text = True

    def feed(self, chunk: bytes) -> None:
        """Add the next bytes of the stream."""
        if len(self._head) < HEAD_BYTES:
            self._head += chunk[: HEAD_BYTES - len(self._head)]
        if self._is_text:
            self._is_text = b"\0" not in chunk and self._is_utf8(chunk)

    @property
    def is_head_complete(self) -> bool:
        """Whether enough bytes have arrived to detect types that are identified by their first bytes."""
        return len(self._head) >= HEAD_BYTES

    def signature(self) -> str | None:
        """Return the media type that the first bytes indicate, or None if they match no known signature."""
        return _by_signature(self._head)

    def type(self) -> str:
        """Return the detected media type. Call this only after the detector has received the whole stream."""
        if self._is_text and self._is_utf8(b"", final=True):
            found = self.signature()
            return found if found is not None and _is_text_type(found) else TEXT
        found = self.signature()
        return UNKNOWN if found is None or _is_text_type(found) else found

    def _is_utf8(self, chunk: bytes, *, final: bool = False) -> bool:
        try:
            self._decoder.decode(chunk, final)
        except UnicodeDecodeError:
            return False
        return True


def served_type(detected: str) -> str:
    """Return the media type with which a file of the type `detected` is served."""
    return f"{TEXT}; charset=utf-8" if detected in MARKUP or detected.startswith("text/") else detected


def _is_text_type(type: str) -> bool:
    return type.startswith("text/") or type in MARKUP or type in ("application/hta", "application/json")


def _by_signature(head: bytes) -> str | None:
    for magic, type in _EXECUTABLES:
        if head.startswith(magic):
            return type
    if head.startswith(b"MZ") and _is_portable_executable(head):
        return "application/vnd.microsoft.portable-executable"
    if head.startswith(_COMPOUND):
        return "application/x-msi" if _MSI in head else "application/x-ole-storage"
    text = head.removeprefix(b"\xef\xbb\xbf")
    if _HTA.search(text):
        return "application/hta"
    for pattern, type in ((_SVG, "image/svg+xml"), (_HTML, "text/html"), (_XML, "application/xml")):
        if pattern.match(text):
            return type
    return _by_library(head)


def _is_portable_executable(head: bytes) -> bool:
    """Return whether a file that begins with `MZ` is a Windows or DOS program.

    A check is needed because text files may also begin with these letters.
    """
    return b"\0" in head[:64]


def _by_library(head: bytes) -> str | None:
    import puremagic  # imported on first use: 30 ms

    try:
        found = puremagic.magic_string(head)
    except (puremagic.PureError, ValueError):
        return None
    # The library calls every zip file a document of Word: without looking inside, it is a zip file.
    if head.startswith(b"PK\x03\x04"):
        return "application/zip"
    for each in found:
        if each.mime_type and each.confidence >= 0.4:
            return str(each.mime_type).lower()
    return None
