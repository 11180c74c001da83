"""S8: concurrent audit writes give one linear chain, and all tampering with it is found, a cut tail by a checkpoint."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from tests.plugins.audit.conftest import Books

from corral_plugins.audit.service.chain import COLUMNS
from corral_plugins.audit.service.signing import ExternalCheckpoints
from corral_plugins.audit.service.verify import Verification

WRITERS = 50


async def test_s8_concurrent_writes_then_tampering(
    make_kit: Callable[..., Any], database_url: str, long_form: bool, figure: Callable[[str, dict[str, Any]], None]
) -> None:
    """Writers are admins over HTTP. The full form has 200 changes each and 300 tamperings."""
    each, tamperings = (200, 300) if long_form else (10, 40)
    kit = await make_kit(plugins=["audit", "admin"])
    books = await Books(kit, database_url).build()
    members = [(await kit.as_user("member")).user["id"] for _ in range(WRITERS)]

    async def writer(number: int) -> None:
        for turn in range(each):
            body = {"must_change_password": turn % 2 == 0}
            answer = await books.admin.patch(f"/admin/users/{members[number]}", body)
            assert answer.status == 200, answer

    await asyncio.gather(*[writer(number) for number in range(WRITERS)])
    verdict = await books.verify()
    assert verdict.ok, verdict
    listed = (await books.admin.get("/admin/audit?action=admin.user.update&limit=1")).json()
    assert listed["total"] == WRITERS * each
    kept, key = await books.sign(), (await books.auditor.get("/admin/audit/checkpoints")).json()["public_key"]
    found = await _tamper(books, random.Random(8), tamperings, kept.seq)
    assert found == tamperings
    cut = kept.seq - 1
    books.behind(
        f"DELETE FROM audit_rows WHERE seq > {cut}",
        f"DELETE FROM audit_checkpoints WHERE seq > {cut}",
        f"UPDATE audit_head SET seq = {cut}, hash = (SELECT hash FROM audit_rows WHERE seq = {cut})",
    )
    verification: Verification = books.service(Verification)
    by_checkpoint = await verification.verify(None, None, ExternalCheckpoints([kept], [key]), seconds=25)
    assert (by_checkpoint.ok, by_checkpoint.reason) == (False, "tail_truncated"), by_checkpoint
    figure(
        "S8", {"rows": verdict.checked, "linear": True, "tamperings": tamperings, "found": found, "tail_found": True}
    )


async def _tamper(books: Books, chance: random.Random, times: int, last: int) -> int:
    """Alter, remove or exchange rows, one thing at a time; how often it was found at the right place."""
    books.behind("CREATE TABLE kept AS SELECT * FROM audit_rows")
    columns = [column for column in COLUMNS if column != "seq"]
    found = 0
    for _ in range(times):
        seq = chance.randrange(2, last - 2)
        what = chance.choice(["alter", "remove", "exchange"])
        if what == "alter":
            books.behind(
                f"UPDATE audit_rows SET {chance.choice(columns)} = ? WHERE seq = {seq}", parameters=("tampered",)
            )
        elif what == "remove":
            books.behind(f"DELETE FROM audit_rows WHERE seq = {seq}")
        else:
            moves = ((seq, -1), (seq + 1, seq), (-1, seq + 1))
            books.behind(*[f"UPDATE audit_rows SET seq = {to} WHERE seq = {of}" for of, to in moves])
        verdict = await books.verify(max(1, seq - 50), min(last, seq + 50))
        found += not verdict.ok and verdict.first_bad_seq == seq
        books.behind(
            f"DELETE FROM audit_rows WHERE seq IN ({seq}, {seq + 1})",
            f"INSERT INTO audit_rows SELECT * FROM kept WHERE seq IN ({seq}, {seq + 1})",
        )
    return found
