"""Exports the log in batches, oldest row first, as JSON lines for offline verification or as CSV for spreadsheets."""

from __future__ import annotations

import asyncio
import csv
import functools
import io
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec

from corral.auth.visibility import ALL_ROWS
from corral.database.engine import Work
from corral.errors import Invalid
from corral_plugins.audit.models import AuditRow
from corral_plugins.audit.service import chain, queries
from corral_plugins.audit.shapes import ExportQuery

BATCH_SIZE = 500
NUMBERS = frozenset({"seq"})
MEDIA = {"jsonl": "application/x-ndjson", "csv": "text/csv; charset=utf-8"}
BOM = "\ufeff"
RISKY = frozenset("=+-@＝＋－＠\t\r\n\0'")  # includes the quote itself, so that unescaping is exact
SKIPPED = (
    " \u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u3000\ufeff\u200b\u200c\u200d\u2060"
)

Values = Sequence[Any]


def escape_cell(text: str) -> str:
    """Escape a CSV cell: prefix the text with an apostrophe if a spreadsheet would interpret it as a formula."""
    if not text:
        return text
    first = text.lstrip(SKIPPED)[:1]
    return f"'{text}" if text[0] in RISKY or (first in RISKY and first) else text


def unescape_cell(cell: str) -> str:
    """Return the original text of a cell that `escape_cell` escaped."""
    return cell.removeprefix("'")


class LogExport:
    """One export of the log. It ends at the row that is the newest when `chunks` starts."""

    def __init__(self, work: Work, query: ExportQuery) -> None:
        if query.format not in MEDIA:
            expected = f"one of {', '.join(sorted(MEDIA))}"
            raise Invalid.at("/query/format", "not_in_enum", expected, problem="unsupported_format")
        self._work, self._query = work, query

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the exported file in chunks of bytes. If an error occurs, the stream ends early."""
        ends = await self._work(queries.chain_ends, read=True)
        until = min(ends.head.seq, ends.stored)
        encode: Callable[[list[Values]], bytes] = _json_lines if self._query.format == "jsonl" else _csv_cells
        if self._query.format == "csv":
            yield BOM.encode() + _csv_cells([chain.COLUMNS])
        for after in range(ends.anchor.seq, until, BATCH_SIZE):
            batch = functools.partial(self._read_batch, after, min(after + BATCH_SIZE, until))
            if rows := await self._work(batch, read=True):
                yield await asyncio.to_thread(encode, rows)

    def _read_batch(self, after: int, until: int) -> list[Values]:
        clause = queries.filter_condition(self._query)
        if clause is ALL_ROWS:
            return list(queries.rows_between(after, until))
        columns = [getattr(AuditRow, name) for name in chain.COLUMNS]
        place = (AuditRow.seq > after) & (AuditRow.seq <= until)
        rows: Any = AuditRow.select(*columns).where(place & clause).order_by(AuditRow.seq).tuples()
        return list(rows)


def _json_lines(rows: list[Values]) -> bytes:
    return b"".join(msgspec.json.encode(chain.hashed_row(values)) + b"\n" for values in rows)


def _csv_cells(rows: list[Values]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    names = [name in NUMBERS for name in chain.COLUMNS]
    for values in rows:
        plain = zip(values, names, strict=True)
        writer.writerow(["" if value is None else value if number else escape_cell(value) for value, number in plain])
    return text.getvalue().encode()
