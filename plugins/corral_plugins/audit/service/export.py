"""The log as a file, oldest row first, piece by piece: as JSON lines that verify by themselves, or for spreadsheets."""

from __future__ import annotations

import asyncio
import csv
import functools
import io
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec

from corral.auth.visibility import ALL
from corral.database.engine import Work
from corral.errors import Invalid
from corral_plugins.audit.models import AuditRow
from corral_plugins.audit.service import chain, reading
from corral_plugins.audit.service.cells import cell
from corral_plugins.audit.shapes import ExportQuery

AT_ONCE = 500
NUMBERS = frozenset({"seq"})
MEDIA = {"jsonl": "application/x-ndjson", "csv": "text/csv; charset=utf-8"}
BOM = "\ufeff"

Values = Sequence[Any]


class Export:
    """One export: `chunks()` reads up to where the log ended when it began."""

    def __init__(self, work: Work, query: ExportQuery) -> None:
        if query.format not in MEDIA:
            told = f"one of {', '.join(sorted(MEDIA))}"
            raise Invalid.at("/query/format", "not_in_enum", told, problem="unsupported_format")
        self._work, self._query = work, query

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes of the file. A failure breaks it off."""
        ends = await self._work(reading.ends, read=True)
        until = min(ends.head.seq, ends.stored)
        encode: Callable[[list[Values]], bytes] = _lines if self._query.format == "jsonl" else _cells
        if self._query.format == "csv":
            yield BOM.encode() + _cells([chain.COLUMNS])
        for after in range(ends.anchor.seq, until, AT_ONCE):
            piece = functools.partial(self._piece, after, min(after + AT_ONCE, until))
            if rows := await self._work(piece, read=True):
                yield await asyncio.to_thread(encode, rows)

    def _piece(self, after: int, until: int) -> list[Values]:
        clause = reading.where(self._query)
        if clause is ALL:
            return list(reading.piece(after, until))
        columns = [getattr(AuditRow, name) for name in chain.COLUMNS]
        place = (AuditRow.seq > after) & (AuditRow.seq <= until)
        rows: Any = AuditRow.select(*columns).where(place & clause).order_by(AuditRow.seq).tuples()
        return list(rows)


def _lines(rows: list[Values]) -> bytes:
    return b"".join(msgspec.json.encode(chain.row(values)) + b"\n" for values in rows)


def _cells(rows: list[Values]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    names = [name in NUMBERS for name in chain.COLUMNS]
    for values in rows:
        plain = zip(values, names, strict=True)
        writer.writerow(["" if value is None else value if number else cell(value) for value, number in plain])
    return text.getvalue().encode()
