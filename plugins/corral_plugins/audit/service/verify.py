"""Proves that nothing was altered, dropped or cut off. Rows never change, so those up to a head are a snapshot."""

from __future__ import annotations

import asyncio
import functools
import logging
import time

import msgspec

from corral.database.engine import Work
from corral.database.unit import Entry
from corral.events.event import SystemAlert
from corral_plugins.audit.service import chain, reading
from corral_plugins.audit.service.follow import BEGINNING, Bad, Chain, Link
from corral_plugins.audit.service.log import raise_alarm
from corral_plugins.audit.service.reading import Ends
from corral_plugins.audit.service.signing import Kept, PublicKeys
from corral_plugins.audit.shapes import LinkView, Verdict

log = logging.getLogger("corral.audit")

AT_ONCE = 2000
SECONDS = 25.0
RECENT = 10_000
END = 2**62


class _Part(msgspec.Struct, frozen=True):
    """What is to be checked: the rows after `start`, up to `until`. `bad`: it cannot even begin."""

    ends: Ends
    start: Link
    until: int
    bad: Bad | None = None


class Verification:
    """Reads in pieces, so that neither writers nor the limit of a unit's time are in the way."""

    def __init__(self, work: Work) -> None:
        self._work = work

    async def run(self, from_seq: int | None = None, to_seq: int | None = None) -> Verdict:
        """Check a part of the log, by default all that is kept; tells admins when it is not whole."""
        verdict = await self.look(from_seq, to_seq, Kept(), seconds=SECONDS)
        if not verdict.ok:
            await self._alarm(verdict)
        return verdict

    async def look(self, from_seq: int | None, to_seq: int | None, kept: Kept, *, seconds: float) -> Verdict:
        """Check against checkpoints that were kept elsewhere, too; tells nobody, and writes nothing."""
        deadline = time.monotonic() + seconds
        part, verdict = await self._once(from_seq, to_seq, kept, deadline)
        if not verdict.ok and (await self._work(reading.ends, read=True)).anchor != part.ends.anchor:
            _, verdict = await self._once(from_seq, to_seq, kept, deadline)  # its beginning was removed meanwhile
        return verdict

    async def _once(
        self, from_seq: int | None, to_seq: int | None, kept: Kept, deadline: float
    ) -> tuple[_Part, Verdict]:
        part, keys = await self._work(lambda: (_part(from_seq, to_seq), reading.public_keys()), read=True)
        last = END if to_seq is None else part.until
        signed = await self._work(lambda: reading.checkpoints(part.start.seq, last), read=True)
        signed |= kept.between(part.start.seq, last)
        following = Chain(part.start, signed, PublicKeys(kept.public_keys or keys))
        if part.bad is not None:
            following.refuse(part.bad.seq, part.bad.reason)
        is_over = await self._follow(following, part, deadline)
        if is_over and to_seq is None:
            following.end(part.ends.head)
        elif is_over and following.last is not None and following.last.seq < part.until:
            following.refuse(following.last.seq + 1, "tail_truncated" if part.ends.stored < part.until else "gap")
        return part, _verdict(following, part, is_over=is_over)

    async def recent(self) -> Verdict:
        """The newest rows and how they end."""
        head = (await self._work(reading.ends, read=True)).head
        return await self.run(max(1, head.seq - RECENT + 1))

    async def _follow(self, following: Chain, part: _Part, deadline: float) -> bool:
        """Whether the end was reached, or the first bad row."""
        after = part.start.seq
        while following.bad is None and after < part.until:
            if time.monotonic() > deadline:
                return False
            last = min(after + AT_ONCE, part.until)
            rows = await self._work(functools.partial(reading.piece, after, last), read=True)
            if not rows:  # the end, unless there is something behind it
                if part.ends.stored > last:
                    following.refuse((following.last or BEGINNING).seq + 1, "gap")
                break
            await asyncio.to_thread(_add, following, rows)
            after = last
        return True

    async def _alarm(self, verdict: Verdict) -> None:
        log.error("the audit log is not whole", extra={"seq": verdict.first_bad_seq, "reason": verdict.reason})
        alert = SystemAlert(
            kind="audit_chain_broken",
            severity="critical",
            title="The audit log was tampered with",
            detail=f"Row {verdict.first_bad_seq} is not as it was written: {verdict.reason}.",
        )
        about = f".{verdict.reason}.{verdict.first_bad_seq}"
        await self._work(lambda: raise_alarm(alert, about), entry=Entry("audit.alarm"))


def _add(following: Chain, rows: list[tuple[object, ...]]) -> None:
    for values in rows:
        try:
            row = chain.row(values)
        except TypeError:  # a column of a type that no row has
            following.refuse(int(str(values[0])), "hash_mismatch")
            return
        following.add((row,))


def _part(from_seq: int | None, to_seq: int | None) -> _Part:
    ends = reading.ends()
    newest = max(ends.head.seq, ends.stored)
    until = newest if to_seq is None else min(to_seq, newest)
    kept = ends.anchor
    if (bad := _anchor(kept, newest)) is not None:
        return _Part(ends, kept, until, bad)
    if from_seq is None or from_seq <= kept.seq + 1:
        return _Part(ends, kept, until)
    if from_seq > newest:
        return _Part(ends, ends.head, until)
    before = reading.hash_at(from_seq - 1)
    return _Part(ends, Link(from_seq - 1, before or ""), until, Bad(from_seq - 1, "gap") if before is None else None)


def _anchor(kept: Link, newest: int) -> Bad | None:
    """What is missing at the beginning must have been removed by the product: the log tells so, and it was signed."""
    told = reading.told_anchor(newest)
    if kept.seq != told:
        return Bad(min(kept.seq, told) + 1, "gap")
    signed = reading.checkpoints(kept.seq - 1, kept.seq).get(kept.seq)
    if kept.seq and (signed is None or signed.hash != kept.hash):
        return Bad(kept.seq, "checkpoint_mismatch")
    if signed is not None and not PublicKeys(reading.public_keys()).confirm(signed):
        return Bad(kept.seq, "bad_signature")
    return None


def _verdict(following: Chain, part: _Part, *, is_over: bool) -> Verdict:
    bad, last = following.bad, following.last or BEGINNING
    return Verdict(
        ok=bad is None,
        checked=following.checked,
        complete=is_over,
        next_seq=None if is_over else last.seq + 1,
        first_bad_seq=bad.seq if bad else None,
        reason=bad.reason if bad else None,
        head=LinkView(seq=part.ends.head.seq, hash=part.ends.head.hash),
        checkpoints_checked=following.checkpoints_checked,
    )
