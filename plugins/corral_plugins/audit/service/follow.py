"""Follows the chain row by row and tells the first place where it is not whole: for the database and for exports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from corral_plugins.audit.service.chain import GENESIS, Row
from corral_plugins.audit.service.signing import PublicKeys, SignedCheckpoint
from corral_plugins.audit.shapes import Reason


class Link(msgspec.Struct, frozen=True):
    """A place of the chain."""

    seq: int
    hash: str


BEGINNING = Link(0, GENESIS)


class Bad(msgspec.Struct, frozen=True):
    """The first row that is not as it must be, and why."""

    seq: int
    reason: Reason


class Chain:
    """`after`: the place before the first row; None takes the first row's own word for it (a part of an export).

    `checkpoints` are held against the rows that they sign. After the first `bad` nothing is looked at any more.
    """

    def __init__(
        self, after: Link | None, checkpoints: Mapping[int, SignedCheckpoint], keys: PublicKeys, *, sparse: bool = False
    ) -> None:
        self.last = after
        self.bad: Bad | None = None
        self.checked = self.checkpoints_checked = 0
        self._checkpoints, self._keys, self._sparse = checkpoints, keys, sparse

    def add(self, rows: Iterable[Row]) -> None:
        """The next rows, in order."""
        for row in rows:
            if self.bad is None:
                self._one(row)

    def refuse(self, seq: int, reason: Reason) -> None:
        """Something else is wrong there."""
        if self.bad is None:
            self.bad = Bad(seq, reason)

    def end(self, head: Link | None) -> None:
        """No more rows come: `head` and the checkpoints tell where the last one must be."""
        last = self.last or BEGINNING
        if head is not None and head.seq > last.seq:
            self.refuse(last.seq + 1, "tail_truncated")
        if head is not None and head.seq < last.seq:
            self.refuse(head.seq + 1, "broken_link")
        if head is not None and head.hash != last.hash:
            self.refuse(last.seq, "hash_mismatch")
        beyond = [checkpoint for seq, checkpoint in sorted(self._checkpoints.items()) if seq > last.seq]
        for checkpoint in beyond:
            self.checkpoints_checked += 1
            signed = self._keys.confirm(checkpoint)
            self.refuse(last.seq + 1 if signed else checkpoint.seq, "tail_truncated" if signed else "bad_signature")

    def _one(self, row: Row) -> None:
        if not self._in_order(row):
            return None
        try:
            whole = row.digest() == row.hash
        except (TypeError, ValueError):  # of a type that no row has
            whole = False
        if not whole:
            return self.refuse(row.seq, "hash_mismatch")
        if self.last is not None and row.prev_hash != self.last.hash and row.seq == self.last.seq + 1:
            return self.refuse(row.seq, "broken_link")
        checkpoint = self._checkpoints.get(row.seq)
        if checkpoint is not None:
            self.checkpoints_checked += 1
            if not self._keys.confirm(checkpoint):
                return self.refuse(row.seq, "bad_signature")
            if checkpoint.hash != row.hash:
                return self.refuse(row.seq, "checkpoint_mismatch")
        self.checked += 1
        self.last = Link(row.seq, row.hash)
        return None

    def _in_order(self, row: Row) -> bool:
        if self.last is None:
            return True
        if row.seq <= self.last.seq:
            self.refuse(row.seq, "duplicate_seq")
        elif row.seq > self.last.seq + 1 and not self._sparse:
            self.refuse(self.last.seq + 1, "gap")
        return self.bad is None
