"""Checkpoints and retention: when they are made, who can check them, and what may be removed."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from tests.plugins.audit.conftest import Books

from corral import clock
from corral.errors import Unavailable
from corral.plugin import AuditEntry
from corral_plugins.audit.jobs import sign_hourly_checkpoint, verify_recent_rows
from corral_plugins.audit.models import AuditRow, AuditSigningKey
from corral_plugins.audit.service import queries
from corral_plugins.audit.service.checkpoints import CheckpointSigner
from corral_plugins.audit.service.retention import AuditRetention
from corral_plugins.audit.service.verify import Verification
from corral_plugins.audit.settings import RETENTION_DAYS

DAY = 86_400


@pytest.mark.one_engine
async def test_a_thousand_rows_make_a_checkpoint(books: Books) -> None:
    def some() -> None:
        for number in range(101):
            books.log.record(AuditEntry(action="test.thing.change", object_type="thing", object_id=str(number)))

    for _ in range(10):  # a unit must not take long
        await books.work(some)
    await books.kit.run_jobs()
    (made,) = (await books.auditor.get("/admin/audit/checkpoints")).json()["items"]
    assert made["rows"] >= 1000
    assert made["seq"] == made["rows"]
    await books.kit.run_jobs()
    assert (await books.auditor.get("/admin/audit/checkpoints")).json()["total"] == 1


@pytest.mark.one_engine
async def test_an_hour_without_rows_makes_none(books: Books) -> None:
    service: CheckpointSigner = books.service(CheckpointSigner)
    await books.write(3)
    await sign_hourly_checkpoint(service)
    assert await service.create_checkpoint() is None
    await books.write(2)
    made = await service.create_checkpoint()
    assert made is not None
    assert made.rows == 2


@pytest.mark.one_engine
async def test_anybody_can_check_a_signature(books: Books) -> None:
    """With the public key alone, and by the page's words."""
    await books.write(1)
    await books.sign()
    answer = (await books.auditor.get("/admin/audit/checkpoints")).json()
    made, key = answer["items"][0], Ed25519PublicKey.from_public_bytes(base64.b64decode(answer["public_key"]))
    message = (
        f'{{"hash":"{made["hash"]}","key_id":"{made["key_id"]}","rows":{made["rows"]},"seq":{made["seq"]},'
        f'"ts":"{made["ts"]}"}}'
    )
    key.verify(base64.b64decode(made["signature"]), b"corral.audit.checkpoint.v1" + message.encode())
    event = next(each for each in await books.kit.events() if each.type == "audit.checkpoint")
    assert event.payload()["signature"] == made["signature"]
    assert event.visibility == "admin"


async def test_the_private_key_is_sealed(books: Books) -> None:
    await books.write(1)
    await books.sign()
    row = await books.work(lambda: AuditSigningKey.select().get(), read=True)
    keyring = books.kit.kernel.keyring
    private = keyring.decrypt(bytes.fromhex(row.sealed), aad=f"audit_keys|{row.id}|1|sealed")
    assert len(private) == 32
    assert private.hex() not in row.sealed
    await books.write(1)
    keyring.sealed = True
    with pytest.raises(Unavailable, match="key"):
        await books.service(CheckpointSigner).create_checkpoint()
    assert (await books.verify()).ok, "verifying needs no master key"
    await books.write(1)


async def test_the_daily_look_tells_admins(books: Books) -> None:
    await books.write(4)
    verification: Verification = books.service(Verification)
    await verify_recent_rows(verification)
    assert not [event for event in await books.kit.events() if event.type == "system.alert"]
    books.behind("UPDATE audit_rows SET outcome = 'denied' WHERE seq = 3")
    await verify_recent_rows(verification)
    (alert,) = [event.payload() for event in await books.kit.events() if event.type == "system.alert"]
    assert alert["kind"] == "audit_chain_broken"
    assert "hash_mismatch" in alert["detail"]
    assert "3" in alert["detail"]


@pytest.mark.one_engine
async def test_admins_are_told_of_a_broken_place_once_an_hour(books: Books) -> None:
    async def told() -> list[str]:
        assert (await books.auditor.get("/admin/audit/verify")).json()["ok"] is False
        return [event.payload()["detail"] for event in await books.kit.events() if event.type == "system.alert"]

    await books.write(4)
    books.behind("UPDATE audit_rows SET outcome = 'denied' WHERE seq = 3")
    assert len(await told()) == 1
    assert len(await told()) == 1
    books.behind("UPDATE audit_rows SET outcome = 'denied' WHERE seq = 2")
    assert len(await told()) == 2, "another place is news"
    clock.travel(3601)
    books.auditor = await books.kit.sign_in(books.auditor.user["email"])
    assert len(await told()) == 3


@pytest.mark.one_engine
async def test_a_key_that_is_none_signs_nothing(books: Books) -> None:
    await books.write(2)
    await books.sign()
    books.behind("UPDATE audit_keys SET public_key = 'none at all'")
    found = await books.auditor.get("/admin/audit/verify")
    assert (found.status, found.json().get("reason")) == (200, "bad_signature"), found


async def test_one_verification_at_a_time(books: Books) -> None:
    from corral.database.leases import acquire_lease, release_lease

    await books.work(lambda: acquire_lease("audit.verify", "another", 30))
    answer = await books.auditor.get("/admin/audit/verify")
    assert (answer.status, answer.code) == (409, "batch_in_progress")
    await books.work(lambda: release_lease("audit.verify", "another"))
    assert (await books.auditor.get("/admin/audit/verify")).json()["ok"] is True


async def test_a_part_is_verified_from_where_it_begins(books: Books) -> None:
    await books.write(20)
    head = (await books.verify()).head.seq
    found = (await books.auditor.get(f"/admin/audit/verify?from_seq=5&to_seq={head - 3}")).json()
    assert (found["ok"], found["checked"], found["complete"], found["next_seq"]) == (True, head - 7, True, None)
    assert (await books.auditor.get("/admin/audit/verify?from_seq=1000000")).json()["checked"] == 0
    books.behind("UPDATE audit_rows SET action = 'x' WHERE seq = 4")
    assert (await books.verify(5, None)).ok, "row 4 lies before the part"
    assert (await books.verify(4, None)).first_bad_seq == 4
    verdict = await books.service(Verification).verify(None, None, _nothing_kept(), seconds=-1)
    assert (verdict.complete, verdict.next_seq) == (False, 1)


async def test_retention_removes_a_beginning_that_ends_at_a_checkpoint(books: Books) -> None:
    retention: AuditRetention = books.service(AuditRetention)
    await books.write(700)
    old = await books.sign()
    clock.travel(40 * DAY)
    await books.write(5)
    young = await books.sign()
    await retention.remove_expired_rows()
    assert await _first(books) == 1, "kept for ever by default"
    books.admin = await books.kit.sign_in(books.admin.user["email"])
    await books.set(RETENTION_DAYS, 30)
    await retention.remove_expired_rows()
    assert await _first(books) == old.seq + 1
    verdict = await books.verify()
    assert verdict.ok, verdict
    assert verdict.checked == verdict.head.seq - old.seq
    (told,) = await books.work(lambda: list(AuditRow.select().where(AuditRow.action == queries.RETAINED)), read=True)
    assert (told.object_id, told.actor_type) == (str(old.seq), "system")
    await retention.remove_expired_rows()
    assert await _first(books) == old.seq + 1, "the next checkpoint is not old enough"
    books.behind(f"DELETE FROM audit_rows WHERE seq <= {young.seq}")
    found = await books.verify()
    assert (found.first_bad_seq, found.reason) == (old.seq + 1, "gap")


@pytest.mark.one_engine
async def test_a_removal_that_was_cut_short_goes_on(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    await books.write(30)
    old = await books.sign()
    clock.travel(40 * DAY)
    books.admin = await books.kit.sign_in(books.admin.user["email"])
    await books.set(RETENTION_DAYS, 30)
    retention: AuditRetention = books.service(AuditRetention)
    await books.work(lambda: retention._move_anchor(clock.now(-30 * DAY), 30))
    assert await _first(books) == 1
    assert (await books.verify()).ok, "rows before the anchor are no longer looked at"
    listed = await books.work(queries.chain_ends, read=True)
    assert listed.anchor.seq == old.seq
    await retention.remove_expired_rows()
    assert await _first(books) == old.seq + 1
    assert (await books.verify()).ok


async def test_a_process_without_the_plugin_does_not_serve(make_kit: Callable[..., Any], monkeypatch: Any) -> None:
    from corral.errors import StartupError
    from corral_plugins.audit.plugin import AuditPlugin

    async def fails(self: Any, runtime: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(AuditPlugin, "start", fails)
    with pytest.raises(StartupError, match="audit"):
        await make_kit(plugins=["audit", "admin"])


@pytest.mark.one_engine
async def test_the_plugin_cannot_be_disabled(books: Books) -> None:
    answer = await books.admin.post("/plugins/audit/disable", {})
    assert (answer.status, answer.code) == (409, "plugin_required")


async def _first(books: Books) -> int:
    found: Any = await books.work(lambda: AuditRow.select(AuditRow.seq).order_by(AuditRow.seq).get().seq, read=True)
    return int(found)


def _nothing_kept() -> Any:
    from corral_plugins.audit.service.signing import ExternalCheckpoints

    return ExternalCheckpoints()
