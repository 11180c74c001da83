"""Verifies that no audit row was altered or removed, in the database or in exported files.

Rows never change, so all rows up to a given head form a snapshot. Exported files can be verified without a server,
optionally against checkpoints saved in a file.
"""

from __future__ import annotations

import asyncio
import csv
import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.events.event import SystemAlert
from corral_plugins.audit.service import chain, queries
from corral_plugins.audit.service.chain import BEGINNING, ChainChecker, ChainDefect, ChainLink, HashedRow
from corral_plugins.audit.service.export import NUMBERS, unescape_cell
from corral_plugins.audit.service.log import raise_alert
from corral_plugins.audit.service.queries import ChainEnds
from corral_plugins.audit.service.signing import ExternalCheckpoints, PublicKeys, SignedCheckpoint, decode_public_key
from corral_plugins.audit.shapes import ChainLinkView, VerificationResult

log = logging.getLogger("corral.audit")
T = TypeVar("T")

BATCH_SIZE = 2000
SECONDS = 25.0
RECENT = 10_000
END = 2**62


class _Range(msgspec.Struct, frozen=True):
    """The range of rows to check, from the row after `start` up to `until`.

    `defect` is set if `start` itself is defective.
    """

    ends: ChainEnds
    start: ChainLink
    until: int
    defect: ChainDefect | None = None


class Verification:
    """Verifies the log in batches, which do not block writers and stay within the time limit of a unit of work."""

    def __init__(self, work: Work) -> None:
        self._work = work

    async def run(self, from_seq: int | None = None, to_seq: int | None = None) -> VerificationResult:
        """Verify a range of rows, by default all retained rows. Alert admins if the log is not intact."""
        verdict = await self.verify(from_seq, to_seq, ExternalCheckpoints(), seconds=SECONDS)
        if not verdict.ok:
            await self._alert(verdict)
        return verdict

    async def verify(
        self, from_seq: int | None, to_seq: int | None, external: ExternalCheckpoints, *, seconds: float
    ) -> VerificationResult:
        """Verify a range of rows for at most `seconds`, and compare them with checkpoints saved outside the database.

        This method raises no alert and writes nothing.
        """
        deadline = time.monotonic() + seconds
        span, verdict = await self._verify(from_seq, to_seq, external, deadline)
        if not verdict.ok and (await self._work(queries.chain_ends, read=True)).anchor != span.ends.anchor:
            # Retention removed the start of the range in the meantime.
            _, verdict = await self._verify(from_seq, to_seq, external, deadline)
        return verdict

    async def _verify(
        self, from_seq: int | None, to_seq: int | None, external: ExternalCheckpoints, deadline: float
    ) -> tuple[_Range, VerificationResult]:
        span, keys = await self._work(lambda: (_range(from_seq, to_seq), queries.public_keys()), read=True)
        last = END if to_seq is None else span.until
        signed = await self._work(lambda: queries.checkpoints_between(span.start.seq, last), read=True)
        signed |= external.between(span.start.seq, last)
        checker = ChainChecker(span.start, signed, PublicKeys(external.public_keys or keys))
        if span.defect is not None:
            checker.report_defect(span.defect.seq, span.defect.reason)
        is_over = await self._check(checker, span, deadline)
        if is_over and to_seq is None:
            checker.finish(span.ends.head)
        elif is_over and checker.last is not None and checker.last.seq < span.until:
            checker.report_defect(checker.last.seq + 1, "tail_truncated" if span.ends.stored < span.until else "gap")
        return span, _verdict(checker, span, is_over=is_over)

    def after_restore(self, by: Principal) -> str | None:
        """Verify the whole restored log in the restore transaction.

        Return a message if the log is not intact, otherwise None.
        """

        async def within_transaction(fn: Callable[[], T], **_: Any) -> T:
            return fn()

        restored = Verification(within_transaction)
        verdict = asyncio.run(restored.verify(None, None, ExternalCheckpoints(), seconds=math.inf))
        if verdict.ok:
            return None
        return f"The audit log is NOT intact: row {verdict.first_bad_seq}: {verdict.reason}."

    async def verify_recent(self) -> VerificationResult:
        """Verify the newest 10,000 rows, and alert admins if they are not intact."""
        head = (await self._work(queries.chain_ends, read=True)).head
        return await self.run(max(1, head.seq - RECENT + 1))

    async def _check(self, checker: ChainChecker, span: _Range, deadline: float) -> bool:
        """Check rows until the end, the first defect or the deadline. Return False if the deadline was reached."""
        after = span.start.seq
        while checker.bad is None and after < span.until:
            if time.monotonic() > deadline:
                return False
            last = min(after + BATCH_SIZE, span.until)
            rows = await self._work(functools.partial(queries.rows_between, after, last), read=True)
            if not rows:  # the end of the log, unless more rows follow after a gap
                if span.ends.stored > last:
                    checker.report_defect((checker.last or BEGINNING).seq + 1, "gap")
                break
            await asyncio.to_thread(_check_batch, checker, rows)
            after = last
        return True

    async def _alert(self, verdict: VerificationResult) -> None:
        log.error("audit log verification failed", extra={"seq": verdict.first_bad_seq, "reason": verdict.reason})
        alert = SystemAlert(
            kind="audit_chain_broken",
            severity="critical",
            title="The audit log was tampered with",
            detail=f"Row {verdict.first_bad_seq} failed verification: {verdict.reason}.",
        )
        about = f".{verdict.reason}.{verdict.first_bad_seq}"
        await self._work(lambda: raise_alert(alert, about), entry=UnitContext("audit.alert"))


def _check_batch(checker: ChainChecker, rows: list[tuple[object, ...]]) -> None:
    for values in rows:
        try:
            row = chain.hashed_row(values)
        except TypeError:  # a column has a type that a genuine row never contains
            checker.report_defect(int(str(values[0])), "hash_mismatch")
            return
        checker.check_rows((row,))


def _range(from_seq: int | None, to_seq: int | None) -> _Range:
    ends = queries.chain_ends()
    newest = max(ends.head.seq, ends.stored)
    until = newest if to_seq is None else min(to_seq, newest)
    kept = ends.anchor
    if (bad := _anchor_defect(kept, newest)) is not None:
        return _Range(ends, kept, until, bad)
    if from_seq is None or from_seq <= kept.seq + 1:
        return _Range(ends, kept, until)
    if from_seq > newest:
        return _Range(ends, ends.head, until)
    before = queries.hash_at(from_seq - 1)
    return _Range(
        ends, ChainLink(from_seq - 1, before or ""), until, ChainDefect(from_seq - 1, "gap") if before is None else None
    )


def _anchor_defect(kept: ChainLink, newest: int) -> ChainDefect | None:
    """Verify that retention, and not tampering, moved the anchor. Return the defect, or None.

    The log must contain a row that records the removal, and a signed checkpoint must confirm the anchor.
    """
    recorded = queries.recorded_anchor(newest)
    if kept.seq != recorded:
        return ChainDefect(min(kept.seq, recorded) + 1, "gap")
    signed = queries.checkpoints_between(kept.seq - 1, kept.seq).get(kept.seq)
    if kept.seq and (signed is None or signed.hash != kept.hash):
        return ChainDefect(kept.seq, "checkpoint_mismatch")
    if signed is not None and not PublicKeys(queries.public_keys()).verify_signature(signed):
        return ChainDefect(kept.seq, "bad_signature")
    return None


def _verdict(checker: ChainChecker, span: _Range, *, is_over: bool) -> VerificationResult:
    bad, last = checker.bad, checker.last or BEGINNING
    return VerificationResult(
        ok=bad is None,
        checked=checker.checked,
        complete=is_over,
        next_seq=None if is_over else last.seq + 1,
        first_bad_seq=bad.seq if bad else None,
        reason=bad.reason if bad else None,
        head=ChainLinkView(seq=span.ends.head.seq, hash=span.ends.head.hash),
        checkpoints_checked=checker.checkpoints_checked,
    )


# -- exported files


class UnreadableFile(ValueError):
    """Raised if an export, a list of checkpoints or a public key is missing or not valid. The message says why."""


class _CheckpointList(msgspec.Struct):
    """A saved list of checkpoints.

    The list is a response from `GET /admin/audit/checkpoints`, or the output of `corral audit checkpoints`.
    """

    items: list[SignedCheckpoint]
    public_key: str | None = None


def verify_export(path: Path, external: ExternalCheckpoints, *, sparse: bool) -> VerificationResult:
    """Verify an export. Raise `UnreadableFile` if the file is not an export.

    If `sparse` is true, missing rows are accepted, as in a filtered export. The `prev_hash` of the first row is
    trusted, unless that row is the first of the log or follows a saved checkpoint.
    """
    rows = _read_csv_rows(path) if path.suffix.lower() == ".csv" else _read_json_rows(path)
    first = next(rows, None)
    signed = {each.seq: each for each in external.checkpoints}
    checker = ChainChecker(
        _link_before(first, signed), signed if external.public_keys else {}, PublicKeys(external.public_keys)
    )
    if first is not None:
        checker.check_rows((first,))
        checker.check_rows(rows)
    if checker.bad is None and not sparse:
        checker.finish(None)
    last, bad = checker.last or BEGINNING, checker.bad
    return VerificationResult(
        ok=bad is None,
        checked=checker.checked,
        complete=True,
        next_seq=None,
        head=ChainLinkView(seq=last.seq, hash=last.hash),
        first_bad_seq=bad.seq if bad else None,
        reason=bad.reason if bad else None,
        checkpoints_checked=checker.checkpoints_checked,
    )


def read_checkpoints(path: Path, public_key: str | None) -> ExternalCheckpoints:
    """Read checkpoints from a file that contains either a saved list or one checkpoint per line.

    `public_key` is required if the file contains no public key. Raise `UnreadableFile` if the content of the file is
    not valid, or if the public key is missing or not valid.
    """
    text = path.read_bytes()
    try:
        listed = msgspec.json.decode(text, type=_CheckpointList)
    except msgspec.DecodeError:
        try:
            items = [msgspec.json.decode(line, type=SignedCheckpoint) for line in text.splitlines() if line.strip()]
        except msgspec.DecodeError as error:
            raise UnreadableFile(f"{path}: not a list of checkpoints: {error}") from None
        listed = _CheckpointList(items)
    key = public_key or listed.public_key
    if key is None:
        raise UnreadableFile(f"{path} contains no public key; pass it with --public-key")
    if decode_public_key(key) is None:
        source = "--public-key" if public_key else f"{path}: public_key"
        raise UnreadableFile(f"{source} must be 32 bytes in base64")
    return ExternalCheckpoints(listed.items, [key])


def _link_before(first: HashedRow | None, signed: dict[int, SignedCheckpoint]) -> ChainLink | None:
    if first is None or first.seq == 1:
        return BEGINNING
    checkpoint = signed.get(first.seq - 1)
    return None if checkpoint is None else ChainLink(checkpoint.seq, checkpoint.hash)


def _read_json_rows(path: Path) -> Iterator[HashedRow]:
    decoder = msgspec.json.Decoder(HashedRow, strict=True)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise UnreadableFile(f"{path}: line {number} is not a row of an audit log: {error}") from None


def _read_csv_rows(path: Path) -> Iterator[HashedRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            if next(reader, None) != list(chain.COLUMNS):
                raise UnreadableFile(f"{path}: the first line is not the header of an audit log export")
            for cells in reader:
                pairs = zip(chain.COLUMNS, cells, strict=True)
                yield chain.hashed_row(
                    [int(cell) if name in NUMBERS else unescape_cell(cell) if cell else None for name, cell in pairs]
                )
        except UnreadableFile:
            raise
        except (TypeError, ValueError, csv.Error) as error:  # also raised for bytes that are not UTF-8
            message = f"{path}: the record after line {reader.line_num} is not a row of an audit log: {error}"
            raise UnreadableFile(message) from None
