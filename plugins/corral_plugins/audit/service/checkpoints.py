"""Creates signed checkpoints.

The signing key is generated for the first checkpoint, and stored encrypted under the master key.
"""

from __future__ import annotations

import base64
import logging

from corral import clock
from corral.crypto import Sealer, associated_data
from corral.database.engine import Work
from corral.database.unit import UnitContext, after_commit
from corral.events.event import emit
from corral_plugins.audit.api import AuditCheckpointSigned
from corral_plugins.audit.models import AuditSigningKey, CheckpointRow
from corral_plugins.audit.service import queries, signing
from corral_plugins.audit.service.chain import ChainLink
from corral_plugins.audit.service.log import lock_chain_head
from corral_plugins.audit.service.signing import SignedCheckpoint, SignedFields

log = logging.getLogger("corral.audit")

EVERY_SECONDS = 3600
ENTRY = UnitContext("job audit.checkpoint")


class CheckpointSigner:
    """Creates checkpoints.

    The signature is computed outside a unit of work. If two processes sign at the same time, both checkpoints are
    valid.
    """

    def __init__(self, work: Work, sealer: Sealer) -> None:
        self._work, self._sealer = work, sealer

    async def create_checkpoint(self, *, least: int = 1) -> SignedCheckpoint | None:
        """Sign and return a checkpoint, or return None if fewer than `least` rows were added since the previous one.

        Raise `Unavailable` (`vault_sealed`) if the master key is not loaded.
        """
        head, last = await self._work(lambda: (queries.chain_ends().head, _last_checkpoint_row()), read=True)
        since = last.seq if last is not None else 0
        if head.seq - since < least:
            return None
        private, key_id = await self._signing_key()
        signed = SignedFields(hash=head.hash, key_id=key_id, rows=head.seq - since, seq=head.seq, ts=clock.now())
        made = SignedCheckpoint(
            seq=head.seq,
            hash=head.hash,
            rows=signed.rows,
            ts=signed.ts,
            key_id=key_id,
            signature=signing.sign_checkpoint(private, signed),
        )
        await self._work(lambda: _store_checkpoint(made), entry=ENTRY)
        return made

    async def _signing_key(self) -> tuple[bytes, str]:
        row = await self._work(_newest_key, read=True)
        if row is None:
            private, public = signing.generate_key()
            fresh = self._create_key(private, public)
            await self._work(lambda: _store_key(fresh), entry=ENTRY)
            row = await self._work(_newest_key, read=True)
            assert row is not None
        return self._sealer.decrypt(bytes.fromhex(row.sealed), aad=_key_associated_data(row.id)), row.id

    def _create_key(self, private: bytes, public: bytes) -> AuditSigningKey:
        key_id = signing.key_id_of(public)
        sealed = self._sealer.encrypt(private, aad=_key_associated_data(key_id)).hex()
        encoded = base64.b64encode(public).decode()
        return AuditSigningKey(id=key_id, public_key=encoded, sealed=sealed, created_at=clock.now())


def newest_checkpoint() -> tuple[ChainLink, str] | None:
    """Return the position and the time of the newest checkpoint, or None if there is none.

    Runs in the caller's unit of work.
    """
    last = _last_checkpoint_row()
    return None if last is None else (ChainLink(last.seq, last.hash), last.ts)


def _last_checkpoint_row() -> CheckpointRow | None:
    return CheckpointRow.select().order_by(CheckpointRow.seq.desc()).first()  # type: ignore[no-any-return]  # peewee is untyped


def _newest_key() -> AuditSigningKey | None:
    return AuditSigningKey.select().order_by(AuditSigningKey.created_at.desc()).first()  # type: ignore[no-any-return]  # peewee is untyped


def _store_key(fresh: AuditSigningKey) -> None:
    """Store the key unless another process stored one first. The lock on the `audit_head` row prevents a race."""
    lock_chain_head()
    if not AuditSigningKey.select().exists():
        AuditSigningKey.insert(fresh.__data__).on_conflict_ignore().execute()


def _store_checkpoint(made: SignedCheckpoint) -> None:
    values = {name: getattr(made, name) for name in made.__struct_fields__}
    if CheckpointRow.insert(values).on_conflict_ignore().as_rowcount().execute():
        emit(AuditCheckpointSigned(**values), object=("audit_log", str(made.seq)))
        after_commit(lambda: log.warning("audit checkpoint", extra=values))


def _key_associated_data(key_id: str) -> str:
    return associated_data("audit_keys", key_id, 1, "sealed")
