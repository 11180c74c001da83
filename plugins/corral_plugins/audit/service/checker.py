"""Checks the hash chain row by row and reports the first defect. Used for the database and for exported files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from corral_plugins.audit.service.chain import GENESIS, Row
from corral_plugins.audit.service.signing import PublicKeys, SignedCheckpoint
from corral_plugins.audit.shapes import Reason


class Link(msgspec.Struct, frozen=True):
    """A position in the hash chain: the number of a row and its hash."""

    seq: int
    hash: str


BEGINNING = Link(0, GENESIS)


class Defect(msgspec.Struct, frozen=True):
    """The number of the first defective row and the reason why it is defective."""

    seq: int
    reason: Reason


class ChainChecker:
    """Checks audit rows in order against their hashes and checkpoints, up to the first defect.

    `after` is the position before the first row. If it is None, the first row is trusted, as in a partial export.
    `sparse` accepts missing rows, as in a filtered export.
    """

    def __init__(
        self, after: Link | None, checkpoints: Mapping[int, SignedCheckpoint], keys: PublicKeys, *, sparse: bool = False
    ) -> None:
        self.last = after
        self.bad: Defect | None = None
        self.checked = self.checkpoints_checked = 0
        self._checkpoints, self._keys, self._sparse = checkpoints, keys, sparse

    def add(self, rows: Iterable[Row]) -> None:
        """Check the next rows, which must be passed in order."""
        for row in rows:
            if self.bad is None:
                self._check(row)

    def report(self, seq: int, reason: Reason) -> None:
        """Record a defect that the caller found, unless an earlier defect is already recorded."""
        if self.bad is None:
            self.bad = Defect(seq, reason)

    def end(self, head: Link | None) -> None:
        """Finish the check: the last row must match `head`, and no checkpoint may sign a later row."""
        last = self.last or BEGINNING
        if head is not None and head.seq > last.seq:
            self.report(last.seq + 1, "tail_truncated")
        if head is not None and head.seq < last.seq:
            self.report(head.seq + 1, "broken_link")
        if head is not None and head.hash != last.hash:
            self.report(last.seq, "hash_mismatch")
        beyond = [checkpoint for seq, checkpoint in sorted(self._checkpoints.items()) if seq > last.seq]
        for checkpoint in beyond:
            self.checkpoints_checked += 1
            signed = self._keys.confirm(checkpoint)
            self.report(last.seq + 1 if signed else checkpoint.seq, "tail_truncated" if signed else "bad_signature")

    def _check(self, row: Row) -> None:
        if not self._in_order(row):
            return None
        try:
            intact = row.digest() == row.hash
        except (TypeError, ValueError):  # a value has a type that a genuine row never contains
            intact = False
        if not intact:
            return self.report(row.seq, "hash_mismatch")
        if self.last is not None and row.prev_hash != self.last.hash and row.seq == self.last.seq + 1:
            return self.report(row.seq, "broken_link")
        checkpoint = self._checkpoints.get(row.seq)
        if checkpoint is not None:
            self.checkpoints_checked += 1
            if not self._keys.confirm(checkpoint):
                return self.report(row.seq, "bad_signature")
            if checkpoint.hash != row.hash:
                return self.report(row.seq, "checkpoint_mismatch")
        self.checked += 1
        self.last = Link(row.seq, row.hash)
        return None

    def _in_order(self, row: Row) -> bool:
        if self.last is None:
            return True
        if row.seq <= self.last.seq:
            self.report(row.seq, "duplicate_seq")
        elif row.seq > self.last.seq + 1 and not self._sparse:
            self.report(self.last.seq + 1, "gap")
        return self.bad is None
