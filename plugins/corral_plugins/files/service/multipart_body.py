"""Reads the parts of an upload as they arrive. The `multipart` library parses them in its strict mode."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import multipart

from corral.errors import Invalid, Malformed, Problem
from corral.http.answers import Request
from corral.schema.conversion import convert
from corral_plugins.files.shapes import UploadFields

MAX_PARTS, MAX_HEADER_BYTES, MAX_HEADERS = 10, 8 * 1024, 8
MAX_FIELD_BYTES = 4096
OTHER_PARTS_BYTES = MAX_PARTS * (MAX_HEADER_BYTES + MAX_FIELD_BYTES)
"""The maximum number of bytes that a body can contain in addition to the file."""
_HEADERS_END = b"\r\n\r\n"


class UploadBody:
    """The body of an upload. Call `begin`, read `file_chunks` to its end, and then read `fields`.

    `size` is the size of the file according to the `Content-Length` header, or None if this header is missing. If text
    parts follow the file, the value is slightly too large.
    """

    def __init__(self, request: Request, chunks: AsyncIterator[bytes]) -> None:
        boundary = _boundary(request)
        length = request.header("content-length")
        self._length = int(length) if length is not None else None
        self._parser = multipart.PushMultipartParser(
            boundary,
            content_length=-1 if self._length is None else self._length,
            max_header_size=MAX_HEADER_BYTES,
            max_header_count=MAX_HEADERS,
            max_segment_count=MAX_PARTS,
            strict=True,
        )
        self._closing = len(boundary) + 8  # \r\n--boundary--\r\n; some clients leave the last line end out
        self._events = self._parse(chunks)
        self._texts: dict[str, bytes] = {}
        self._given = 0
        self._in_file = False
        self.name = ""
        self.content_type: str | None = None
        self.size: int | None = None

    async def begin(self) -> None:
        """Read up to the first byte of the file. Raise `Invalid` if there is no part named `file`."""
        async for event in self._events:
            if await self._is_file(event):
                return
        raise Invalid.at("/file", "required", "Send the file as the part `file`.")

    async def file_chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of the file in chunks.

        After the last chunk, the rest of the body is read and checked. Raise `Invalid` if the rest contains a second
        file or an invalid part, and `Malformed` if the body cannot be parsed.
        """
        async for event in self._events:
            if event is None:
                break
            yield bytes(event)
        async for event in self._events:
            if await self._is_file(event):
                raise Invalid.at("/file", "not_allowed", "Send one file in each upload.")
        self.fields  # noqa: B018  # refuses invalid fields before the file is stored

    @property
    def fields(self) -> UploadFields:
        """The text parts of the upload.

        Raise `Invalid` with an error for each part that is not valid.
        """
        return convert(UploadFields, {name: _text(name, value) for name, value in self._texts.items()})

    async def _is_file(self, event: Any) -> bool:
        """Handle the start of a part. Return whether the part is the file.

        A text part is read completely.
        """
        if event.name == "file":
            if not event.filename:
                raise Invalid.at("/file", "required", "The part `file` needs a file name.")
            self.name, self.content_type = event.filename, _declared_type(event)
            self._in_file = True
            if self._length is not None:
                self.size = max(0, self._length - self._given - self._closing)
            return True
        if event.name in self._texts:
            raise Invalid.at(f"/{event.name}", "not_allowed", "Send this part once.")
        value = b""
        async for part in self._events:
            if part is None:
                break
            value += part
            if len(value) > MAX_FIELD_BYTES:
                raise Invalid.at(f"/{event.name}", "too_long", f"Send at most {MAX_FIELD_BYTES} bytes.")
        self._texts[event.name] = value
        return False

    async def _parse(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[Any, None]:
        try:
            async for chunk in chunks:
                for piece in self._pieces(chunk):
                    self._given += len(piece)
                    for event in self._parser.parse(piece):
                        yield event
            self._parser.close()
        except multipart.MultipartError as error:
            raise Malformed(f"The body cannot be parsed: {error}.", code="malformed_multipart") from None

    def _pieces(self, chunk: bytes) -> Iterator[bytes]:
        """Split a chunk after the headers of each part, until the file begins.

        The number of bytes before the file is thus known when the file begins, so that the size of the file can be
        computed.
        """
        start = 0
        while not self._in_file and (end := chunk.find(_HEADERS_END, start)) >= 0:
            yield chunk[start : end + len(_HEADERS_END)]
            start = end + len(_HEADERS_END)
        if start < len(chunk):
            yield chunk[start:] if start else chunk


def _boundary(request: Request) -> str:
    """Return the boundary in the `Content-Type` header.

    Raise a problem with the code `unsupported_media_type` or `malformed_multipart` if the header is not valid.
    """
    if request.header("content-encoding") not in (None, "identity"):
        raise Problem("Send the body without Content-Encoding.", code="unsupported_media_type")
    try:
        media, options = multipart.parse_options_header(request.header("content-type") or "")
    except multipart.MultipartError:
        media, options = "", {}
    if media != "multipart/form-data":
        detail = "Send the file as multipart/form-data, in a part named `file`."
        raise Problem(detail, code="unsupported_media_type")
    boundary = str(options.get("boundary", ""))
    if not 0 < len(boundary) <= 200 or not boundary.isascii():
        raise Malformed("The Content-Type header names no valid boundary.", code="malformed_multipart")
    return boundary


def _declared_type(part: Any) -> str | None:
    """Return the media type that the client declared for the file, or None if it declared none."""
    declared = part.header("Content-Type")
    text = "".join(sign for sign in (declared or "") if " " <= sign <= "~")[:255]
    return text or None


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Invalid.at(f"/{name}", "bad_format", "Send this part as text in UTF-8.") from None
