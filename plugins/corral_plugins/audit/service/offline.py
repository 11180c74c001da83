"""Verifies exported files without a server, optionally against checkpoints saved in a file."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from corral_plugins.audit.service import chain
from corral_plugins.audit.service.chain import Row
from corral_plugins.audit.service.checker import BEGINNING, ChainChecker, Link
from corral_plugins.audit.service.export import NUMBERS, unescape_cell
from corral_plugins.audit.service.signing import ExternalCheckpoints, PublicKeys, SignedCheckpoint, public_key_of
from corral_plugins.audit.shapes import LinkView, Verdict


class Unreadable(ValueError):
    """Raised if a file is neither an export nor a list of checkpoints. The message contains the file and the reason."""


class _Listed(msgspec.Struct):
    """A saved list of checkpoints.

    The list is the response of `GET /admin/audit/checkpoints` or the output of `corral audit checkpoints`.
    """

    items: list[SignedCheckpoint]
    public_key: str | None = None


def verify_export(path: Path, external: ExternalCheckpoints, *, sparse: bool) -> Verdict:
    """Verify an export. `sparse` accepts missing rows, as in a filtered export. Raises `Unreadable`.

    The `prev_hash` of the first row is trusted, unless that row is the first of the log or follows a saved checkpoint.
    """
    rows = _cells(path) if path.suffix.lower() == ".csv" else _lines(path)
    first = next(rows, None)
    signed = {each.seq: each for each in external.checkpoints}
    checker = ChainChecker(
        _before(first, signed), signed if external.public_keys else {}, PublicKeys(external.public_keys)
    )
    if first is not None:
        checker.add((first,))
        checker.add(rows)
    if checker.bad is None and not sparse:
        checker.end(None)
    last, bad = checker.last or BEGINNING, checker.bad
    return Verdict(
        ok=bad is None,
        checked=checker.checked,
        complete=True,
        next_seq=None,
        head=LinkView(seq=last.seq, hash=last.hash),
        first_bad_seq=bad.seq if bad else None,
        reason=bad.reason if bad else None,
        checkpoints_checked=checker.checkpoints_checked,
    )


def read_checkpoints(path: Path, public_key: str | None) -> ExternalCheckpoints:
    """Read checkpoints from a file that contains a saved list, or one checkpoint per line.

    `public_key` is required if the file contains none. Raises `Unreadable`.
    """
    text = path.read_bytes()
    try:
        listed = msgspec.json.decode(text, type=_Listed)
    except msgspec.DecodeError:
        try:
            items = [msgspec.json.decode(line, type=SignedCheckpoint) for line in text.splitlines() if line.strip()]
        except msgspec.DecodeError as error:
            raise Unreadable(f"{path}: not a list of checkpoints: {error}") from None
        listed = _Listed(items)
    key = public_key or listed.public_key
    if key is None:
        raise Unreadable(f"{path} contains no public key; pass it with --public-key")
    if public_key_of(key) is None:
        source = "--public-key" if public_key else f"{path}: public_key"
        raise Unreadable(f"{source} must be the base64 of 32 bytes")
    return ExternalCheckpoints(listed.items, [key])


def _before(first: Row | None, signed: dict[int, SignedCheckpoint]) -> Link | None:
    if first is None or first.seq == 1:
        return BEGINNING
    checkpoint = signed.get(first.seq - 1)
    return None if checkpoint is None else Link(checkpoint.seq, checkpoint.hash)


def _lines(path: Path) -> Iterator[Row]:
    decoder = msgspec.json.Decoder(Row, strict=True)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise Unreadable(f"{path}: line {number} is not a row of an audit log: {error}") from None


def _cells(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            if next(reader, None) != list(chain.COLUMNS):
                raise Unreadable(f"{path}: the first line is not the header of an audit log export")
            for cells in reader:
                pairs = zip(chain.COLUMNS, cells, strict=True)
                yield chain.row(
                    [int(cell) if name in NUMBERS else unescape_cell(cell) if cell else None for name, cell in pairs]
                )
        except Unreadable:
            raise
        except (TypeError, ValueError, csv.Error) as error:  # also raised for bytes that are not UTF-8
            message = f"{path}: the record after line {reader.line_num} is not a row of an audit log: {error}"
            raise Unreadable(message) from None
