"""Loads the values of the vault into the redactor of this process, at process start and after every change."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from corral.crypto import SealedWrong
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Unavailable
from corral.events.log import LoggedEvent
from corral.redact.redactor import Redactor
from corral_plugins.secrets.models import SecretRow, SecretVersion
from corral_plugins.secrets.service.alerts import SOURCE, VaultAlerts, redactor_label
from corral_plugins.secrets.service.pinned_secrets import PinnedSecrets
from corral_plugins.secrets.service.values import SecretValues

BATCH_SIZE = 500
RETRY_SECONDS = 0.5
CHANGES = frozenset({"secret.created", "secret.updated", "secret.rotated", "secret.deleted"})
GROUP, MAX_GROUP_SECRETS = "worker_group:", 1000
ENTRY = UnitContext(label="secrets.redactor_values", actor=SYSTEM)


class _ListedVersion(NamedTuple):
    id: str
    n: int
    secret_id: str
    name: str


class RedactorValues:
    """Keeps the redactor's copy of all secret values up to date.

    Decrypted values are cached, so that a refresh reads only new values. The cache exposes nothing more, because the
    redactor holds all values in memory anyway.
    """

    def __init__(
        self, work: Work, redactor: Redactor, values: SecretValues, pinned_secrets: PinnedSecrets, alerts: VaultAlerts
    ) -> None:
        self._work, self._redactor, self._values = work, redactor, values
        self._pinned_secrets, self._alerts = pinned_secrets, alerts
        self._opened: dict[str, str | None] = {}  # by version id; None if the value cannot be decrypted
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._known: frozenset[str] = frozenset()  # labels
        self.unreadable = 0
        self.groups: dict[str, list[str]] = {}
        """The names of the secrets that each worker group may receive."""

    def on_events(self, records: Sequence[LoggedEvent]) -> None:
        """Wake up `refresh_on_change` if a secret changed. Called by the event feed."""
        if any(record.type in CHANGES for record in records):
            self._changed.set()

    def expect(self, row: SecretRow) -> None:
        """Refresh at once if the value of a secret that is used now is not known yet. Runs in a unit of work.

        The event about the value may reach this process up to two seconds after the value can be used.
        """
        if self._loop is not None and redactor_label(row.name, row.version) not in self._known:
            self._loop.call_soon_threadsafe(self._changed.set)

    async def refresh_on_change(self) -> None:
        """Refresh the redactor after every change. Runs as a supervised task."""
        self._loop = asyncio.get_running_loop()
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self.refresh_redactor()
            except Unavailable:
                self._changed.set()
                await asyncio.sleep(RETRY_SECONDS)

    async def refresh_redactor(self) -> None:
        """Read new values from the database and pass all values to the redactor."""
        self.groups = await self._work(_secret_names_by_worker_group, entry=ENTRY, read=True)
        listed = await self._list_versions()
        # Values that could not be decrypted are tried again: another process may have rewrapped them.
        missing = [item for item in listed if self._opened.get(item.id) is None]
        for start in range(0, len(missing), BATCH_SIZE):
            some = missing[start : start + BATCH_SIZE]
            read = await self._work(
                functools.partial(_read_versions, [item.id for item in some]), entry=ENTRY, read=True
            )
            self._opened |= await asyncio.to_thread(self._decrypt_versions, read, {item.id: item for item in some})
        now = {item.id for item in listed}
        self._opened = {id: value for id, value in self._opened.items() if id in now}
        self.unreadable = sum(value is None for value in self._opened.values())
        values = {redactor_label(item.name, 1): item.value for item in self._pinned_secrets.all_secrets()}
        for item in listed:
            if (value := self._opened[item.id]) is not None:
                values[redactor_label(item.name, item.n)] = value
        await asyncio.to_thread(self._redactor.set_values, SOURCE, values)
        self._known = frozenset(values)

    async def _list_versions(self) -> list[_ListedVersion]:
        """Return every version that is not destroyed, including versions of deleted secrets."""
        found: list[_ListedVersion] = []
        while True:
            after = found[-1].id if found else ""
            some = await self._work(lambda after=after: _list_batch(after), entry=ENTRY, read=True)  # type: ignore[misc]  # bound in each iteration
            found += some
            if len(some) < BATCH_SIZE:
                return found

    def _decrypt_versions(
        self, versions: Sequence[SecretVersion], listed: dict[str, _ListedVersion]
    ) -> dict[str, str | None]:
        opened: dict[str, str | None] = dict.fromkeys(listed)
        for version in versions:
            with contextlib.suppress(Unavailable):  # without the key this process cannot leak the value either
                try:
                    opened[version.id] = self._values.decrypt_version(version)
                except SealedWrong:
                    self._alerts.report_damaged(version.secret_id, listed[version.id].name)
        return opened


def _list_batch(after: str) -> list[_ListedVersion]:
    fields: tuple[Any, ...] = (SecretVersion.id, SecretVersion.n, SecretVersion.secret_id, SecretRow.name)
    joined = SecretVersion.select(*fields).join(SecretRow, on=(SecretRow.id == SecretVersion.secret_id))
    where = SecretVersion.sealed.is_null(False) & (SecretVersion.id > after)
    found: Any = joined.where(where).order_by(SecretVersion.id).limit(BATCH_SIZE).tuples()
    return [_ListedVersion(*each) for each in found]


def _secret_names_by_worker_group() -> dict[str, list[str]]:
    live = SecretRow.deleted_at.is_null() & SecretRow.allowed_consumers.contains(f'"{GROUP}')
    listed = SecretRow.select(SecretRow.name, SecretRow.allowed_consumers).where(live)
    found: dict[str, list[str]] = {}
    for row in listed.order_by(SecretRow.name_key).limit(MAX_GROUP_SECRETS):
        for consumer in row.allowed_consumers:
            if consumer.startswith(GROUP):
                found.setdefault(consumer.removeprefix(GROUP), []).append(row.name)
    return found


def _read_versions(ids: Sequence[str]) -> list[SecretVersion]:
    return list(SecretVersion.select().where(SecretVersion.id.in_(ids) & SecretVersion.sealed.is_null(False)))
