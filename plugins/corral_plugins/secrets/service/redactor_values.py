"""Loads the values in the vault into the redactor of this process, at process start and after every change."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from corral.crypto import InvalidSealedValue
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Unavailable
from corral.redact.redactor import Redactor
from corral_core.event_log.api import BATCH_SIZE, TableRedactorValues
from corral_plugins.secrets.models import SecretRow, SecretVersion
from corral_plugins.secrets.service.alerts import SOURCE, VaultAlerts, redactor_label
from corral_plugins.secrets.service.pinned_secrets import PinnedSecrets
from corral_plugins.secrets.service.values import SecretValues

GROUP, MAX_GROUP_SECRETS = "worker_group:", 1000


class RedactorValues(TableRedactorValues[SecretVersion]):
    """Keeps the redactor's copy of secret values up to date.

    The copy contains all secret versions that have not been destroyed, including those of deleted secrets. The base
    class detects changes by row version. This class uses the secret's revision as the row version, because the revision
    also changes when a secret is renamed.
    """

    source = SOURCE
    model = SecretVersion
    changes = ("secret.created", "secret.updated", "secret.rotated", "secret.deleted")
    entry = UnitContext(label="secrets.redactor_values", actor=SYSTEM)

    def __init__(
        self, work: Work, redactor: Redactor, values: SecretValues, pinned_secrets: PinnedSecrets, alerts: VaultAlerts
    ) -> None:
        super().__init__(work, redactor)
        self._values, self._pinned_secrets, self._alerts = values, pinned_secrets, alerts
        self._loop: asyncio.AbstractEventLoop | None = None
        self.groups: dict[str, list[str]] = {}
        """The names of the secrets that each worker group may receive."""

    def ensure_known(self, row: SecretRow) -> None:
        """Refresh the copy at once if the redactor does not yet know the current value of this secret.

        A new value can be used up to two seconds before the event about the change reaches this process. Runs in a unit
        of work.
        """
        if self._loop is not None and redactor_label(row.name, row.id, row.version) not in self.known:
            self._loop.call_soon_threadsafe(self._changed.set)

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        await super().run()

    async def refresh(self) -> None:
        self.groups = await self._work(_secret_names_by_worker_group, entry=self.entry, read=True)
        await super().refresh()

    def _open(self, row: SecretVersion) -> Mapping[str, str]:
        found: Any = row
        try:
            value = self._values.decrypt_version(row)
        except InvalidSealedValue:
            self._alerts.report_damaged(row.secret_id, found.name)
            raise Unavailable("The stored value of a secret is damaged.") from None
        return {redactor_label(found.name, row.secret_id, row.n): value}

    def _fixed_values(self) -> Mapping[str, str]:
        return {redactor_label(pinned.name, "pinned", 1): pinned.value for pinned in self._pinned_secrets.all_secrets()}

    def _list_batch(self, after: str) -> list[tuple[str, int]]:
        joined: Any = SecretVersion.select(SecretVersion.id, SecretRow.revision).join(SecretRow, on=_OF_SECRET)
        where = SecretVersion.sealed.is_null(False) & (SecretVersion.id > after)
        return list(joined.where(where).order_by(SecretVersion.id).limit(BATCH_SIZE).tuples())

    def _read(self, ids: Sequence[str]) -> list[SecretVersion]:
        names = (SecretRow.name, SecretRow.revision.alias("version"))
        joined = SecretVersion.select(SecretVersion, *names).join(SecretRow, on=_OF_SECRET)
        return list(joined.where(SecretVersion.id.in_(ids) & SecretVersion.sealed.is_null(False)).objects())


_OF_SECRET = SecretRow.id == SecretVersion.secret_id


def _secret_names_by_worker_group() -> dict[str, list[str]]:
    live = SecretRow.deleted_at.is_null() & SecretRow.allowed_consumers.contains(f'"{GROUP}')
    listed = SecretRow.select(SecretRow.name, SecretRow.allowed_consumers).where(live)
    found: dict[str, list[str]] = {}
    for row in listed.order_by(SecretRow.name_key).limit(MAX_GROUP_SECRETS):
        for consumer in row.allowed_consumers:
            if consumer.startswith(GROUP):
                found.setdefault(consumer.removeprefix(GROUP), []).append(row.name)
    return found
