"""Prepares the patches of reviews outside of units of work: redacts, hashes and parses them."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import FieldError, Invalid, TooLarge
from corral.redact.matcher import MARK
from corral.redact.redactor import Redactor
from corral_plugins.code_reviews.api import PATCH_BYTES, PreparedPatch
from corral_plugins.code_reviews.models import Revision
from corral_plugins.code_reviews.service.patches import Patch, PatchError, parse_patch
from corral_plugins.files.api import Files

Json = dict[str, Any]


class ParsedPatch(msgspec.Struct, frozen=True):
    """The content of `PreparedPatch.parsed`: the parts of a patch that are expensive to compute.

    `files` contains the files as JSON, in the form that the database stores.
    """

    patch: Patch
    files: msgspec.Raw
    stats: Json


class ReviewContents:
    """Reads, checks and parses patches. Every method opens its own units of work."""

    files: Files | None

    def __init__(self, redactor: Redactor, work: Work) -> None:
        self._redactor, self._work = redactor, work

    async def of_request(
        self, patch: str | UnsetType, file_id: str | UnsetType, *, by: Principal, is_marked: bool = False
    ) -> PreparedPatch:
        """Prepare the patch in a request. The request contains either the patch itself or the id of a file.

        `is_marked` means that the credentials in the request have already been replaced. Raise `Invalid` unless the
        request contains exactly one of the two, the caller may read the file, and the patch can be parsed. Raise
        `TooLarge` if the patch is too large.
        """
        if (patch is UNSET) == (file_id is UNSET):
            code = "required" if patch is UNSET else "not_allowed"
            raise Invalid.at("/patch", code, "Give either the patch or the file_id of a file that contains it.")
        if isinstance(patch, str):
            return await self._prepare_in_thread(patch.encode(), "/patch", is_marked)
        assert isinstance(file_id, str)
        return await self._prepare_in_thread(await self._read_file(file_id.lower(), by), "/file_id", is_marked=False)

    async def prepare(self, patch: str, *, pointer: str) -> PreparedPatch:
        """Check, hash and parse a patch whose credentials may already be redacted. Implements `CodeReviews.prepare`."""
        return await self._prepare_in_thread(patch.encode(), pointer, is_marked=True)

    async def parsed(self, review_id: str, number: int) -> Patch | None:
        """Return the parsed patch of a stored revision, or None if there is no revision with this number."""
        data = await self._work(functools.partial(patch_of, review_id, number), read=True)
        return None if data is None else await asyncio.to_thread(parse_patch, data)

    async def _prepare_in_thread(self, data: bytes, pointer: str, is_marked: bool) -> PreparedPatch:
        if len(data) > PATCH_BYTES:
            raise TooLarge(f"The patch is larger than {PATCH_BYTES // 1024**2} MiB.")
        try:
            return await asyncio.to_thread(self._build_prepared_patch, data, pointer, is_marked)
        except PatchError as error:
            detail = f"The patch cannot be parsed at line {error.line}: {error.detail}"
            raise Invalid(detail, errors=[FieldError(pointer, "bad_format", detail)], line=error.line) from None

    def _build_prepared_patch(self, data: bytes, pointer: str, is_marked: bool) -> PreparedPatch:
        redacted, lines = self._redacted(data, pointer, is_marked)
        patch = parse_patch(redacted)
        parsed = ParsedPatch(patch, msgspec.Raw(msgspec.json.encode(_files_of(patch))), _stats_of(patch))
        digest = hashlib.sha256(redacted).hexdigest()
        return PreparedPatch(data=redacted, sha256=digest, parsed=parsed, redacted_lines=tuple(lines))

    def _redacted(self, data: bytes, pointer: str, is_marked: bool) -> tuple[bytes, list[int]]:
        """Replace credentials in a patch. Return the patch, and the line numbers of the replaced credentials.

        The number of lines must stay the same, so that the hunk headers remain correct.
        """
        text = data.decode(errors="surrogateescape")
        lines = text.split("\n")
        marked = [index for index, line in enumerate(lines, 1) if MARK in line] if is_marked and MARK in text else []
        whole = self._redactor.redact(text)  # in one call: a patch may have 2 million lines
        if whole == text:
            return data, marked
        kept = whole.split("\n")
        if len(kept) != len(lines):
            detail = "The patch contains a credential that extends over several lines; remove it."
            raise Invalid.at(pointer, "not_allowed", detail)
        found = [index for index, pair in enumerate(zip(lines, kept, strict=True), 1) if pair[0] != pair[1]]
        return whole.encode(errors="surrogateescape"), sorted({*found, *marked})

    async def _read_file(self, file_id: str, by: Principal) -> bytes:
        files = self.files
        facts = None if files is None else await self._work(lambda: files.readable(file_id, by=by), read=True)
        if files is None or facts is None:
            detail = (
                "There is no file with this id." if files else "Files require the plugin files, which is not active."
            )
            raise Invalid.at("/file_id", "unknown_reference", detail, problem="unknown_reference")
        if facts.size_bytes > PATCH_BYTES:
            raise TooLarge(f"The file is larger than {PATCH_BYTES // 1024**2} MiB.")
        return b"".join([chunk async for chunk in await files.open(file_id)])


def patch_of(review_id: str, number: int) -> bytes | None:
    """Return the stored patch of a revision, or None if there is no such revision.

    Runs in the caller's unit of work.
    """
    found: Any = Revision.select(Revision.patch)
    row = found.where((Revision.review_id == review_id) & (Revision.number == number)).tuples().first()
    return None if row is None else bytes(row[0])


def _files_of(patch: Patch) -> list[Json]:
    """Return the files of a patch in the form in which they are stored and returned in responses."""
    return [
        {
            **{
                name: getattr(file, name) for name in ("path", "old_path", "status", "binary", "additions", "deletions")
            },
            "hunks": [
                {
                    **{name: getattr(hunk, name) for name in ("old_start", "old_lines", "new_start", "new_lines")},
                    "section": hunk.section.decode(errors="replace")[:200].replace("\0", ""),
                    "patch_line": hunk.first_line,
                }
                for hunk in file.hunks
            ],
        }
        for file in patch.files
    ]


def _stats_of(patch: Patch) -> Json:
    """Return the number of files and lines that a patch changes."""
    return {
        "files": len(patch.files),
        "additions": sum(file.additions for file in patch.files),
        "deletions": sum(file.deletions for file in patch.files),
    }
