"""The log away from its server: exports and kept checkpoints, read from files row by row."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from corral_plugins.audit.service import chain
from corral_plugins.audit.service.cells import text_of
from corral_plugins.audit.service.chain import Row
from corral_plugins.audit.service.export import NUMBERS
from corral_plugins.audit.service.follow import BEGINNING, Chain, Link
from corral_plugins.audit.service.signing import Kept, PublicKeys, SignedCheckpoint, public_key_of
from corral_plugins.audit.shapes import LinkView, Verdict


class Unreadable(ValueError):
    """A file that is no export, or no list of checkpoints; says which and why."""


class _Listed(msgspec.Struct):
    """What `GET /admin/audit/checkpoints` and `corral audit checkpoints` answer."""

    items: list[SignedCheckpoint]
    public_key: str | None = None


def verify_export(path: Path, kept: Kept, *, sparse: bool) -> Verdict:
    """Follow the chain of an export. `sparse`: it was filtered, so rows between may be absent.

    The first row's word is taken for what came before it, unless that is the beginning or a kept checkpoint.
    """
    rows = _cells(path) if path.suffix.lower() == ".csv" else _lines(path)
    first = next(rows, None)
    signed = {each.seq: each for each in kept.checkpoints}
    following = Chain(_before(first, signed), signed if kept.public_keys else {}, PublicKeys(kept.public_keys))
    if first is not None:
        following.add((first,))
        following.add(rows)
    if following.bad is None and not sparse:
        following.end(None)
    last, bad = following.last or BEGINNING, following.bad
    return Verdict(
        ok=bad is None,
        checked=following.checked,
        complete=True,
        next_seq=None,
        head=LinkView(seq=last.seq, hash=last.hash),
        first_bad_seq=bad.seq if bad else None,
        reason=bad.reason if bad else None,
        checkpoints_checked=following.checkpoints_checked,
    )


def read_checkpoints(path: Path, public_key: str | None) -> Kept:
    """From a saved answer, or from lines with one checkpoint each; then the key must be given."""
    text = path.read_bytes()
    try:
        listed = msgspec.json.decode(text, type=_Listed)
    except msgspec.DecodeError:
        try:
            items = [msgspec.json.decode(line, type=SignedCheckpoint) for line in text.splitlines() if line.strip()]
        except msgspec.DecodeError as error:
            raise Unreadable(f"{path}: no checkpoints: {error}") from None
        listed = _Listed(items)
    key = public_key or listed.public_key
    if key is None:
        raise Unreadable(f"{path} names no public key; give it with --public-key")
    if public_key_of(key) is None:
        source = "--public-key" if public_key else f"{path}: public_key"
        raise Unreadable(f"{source} must be the base64 of 32 bytes")
    return Kept(listed.items, [key])


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
                raise Unreadable(f"{path}: line {number} is no row of an audit log: {error}") from None


def _cells(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            if next(reader, None) != list(chain.COLUMNS):
                raise Unreadable(f"{path}: the first line does not name the columns of an audit log")
            for cells in reader:
                pairs = zip(chain.COLUMNS, cells, strict=True)
                yield chain.row(
                    [int(cell) if name in NUMBERS else text_of(cell) if cell else None for name, cell in pairs]
                )
        except Unreadable:
            raise
        except (TypeError, ValueError, csv.Error) as error:  # of bytes that are no text, too
            told = f"{path}: what follows line {reader.line_num} is no row of an audit log: {error}"
            raise Unreadable(told) from None
