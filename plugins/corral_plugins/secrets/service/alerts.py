"""Raises alerts for leaked secrets in machine-generated text, for damaged values and for a sealed vault."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Collection

import msgspec

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.event import SystemAlert, emit
from corral.redact.matcher import Hit
from corral.redact.redactor import machine_text_object
from corral_plugins.secrets.models import LastSecretAlert

SOURCE = "secrets"
"""The name of the source under which the vault registers its values in the redactor."""
HOUR = 3600
MAX_REMEMBERED, MAX_PENDING = 10_000, 1000
ENTRY = UnitContext(label="secrets.alerts", actor=SYSTEM)


class _PendingAlert(msgspec.Struct, frozen=True):
    kind: str
    type: str
    id: str
    names: tuple[str, ...]


class VaultAlerts:
    """Reports leaked values, damaged values and a sealed vault to admins.

    Alerts from all threads are collected. `publish_regularly` publishes each kind of alert about the same object at
    most once an hour.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._raised_at: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._pending: list[_PendingAlert] = []
        self._lock = threading.Lock()
        self._wake_up = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def report_leaks(self, hits: Collection[Hit]) -> None:
        """Raise an alert for secret values that the redactor found in machine-generated text.

        Text written by users or by Corral itself raises no alert.
        """
        made_by = machine_text_object()
        if made_by is not None:
            names = tuple(sorted({secret_name_of_label(hit.name) for hit in hits if hit.source == SOURCE}))
            if names:
                self._queue_alert(_PendingAlert("secret_detected", *made_by, names))

    def report_damaged(self, secret_id: str, name: str) -> None:
        """Raise an alert for a stored value that cannot be decrypted."""
        self._queue_alert(_PendingAlert("secret_damaged", "secret", secret_id, (name,)))

    def report_sealed(self) -> None:
        """Publish an alert for a missing or wrong master key. Runs in the caller's unit of work."""
        _publish_alert(_PendingAlert("vault_sealed", "vault", "vault", ()))

    async def publish_regularly(self) -> None:
        """Publish the collected alerts. Runs as a supervised task."""
        self._loop = asyncio.get_running_loop()
        if self._pending:
            self._wake_up.set()
        while True:
            await self._wake_up.wait()
            self._wake_up.clear()
            while self._pending:
                alert = self._pending[0]
                await self._work(lambda alert=alert: _publish_alert(alert), entry=ENTRY)  # type: ignore[misc]  # bound in each iteration
                self._pending.pop(0)

    def _queue_alert(self, alert: _PendingAlert) -> None:
        key, now = (alert.kind, alert.type, alert.id), time.monotonic()
        with self._lock:
            if now - self._raised_at.get(key, -HOUR) < HOUR or len(self._pending) >= MAX_PENDING:
                return
            self._raised_at[key] = now
            while len(self._raised_at) > MAX_REMEMBERED:
                self._raised_at.popitem(last=False)
            self._pending.append(alert)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake_up.set)


def redactor_label(name: str, id: str, n: int) -> str:
    """Return the label under which the redactor lists version `n` of a secret, such as `name@<id>.3`.

    The label contains the secret's id, because a deleted, a pinned and a stored secret may have the same name.
    """
    return f"{name}@{id}.{n}"


def secret_name_of_label(text: str) -> str:
    """Return the name of the secret in a redactor label such as `name@<id>.3`."""
    return text.rpartition("@")[0]


def delete_old_alerts(limit: int) -> int:
    """Delete the records of at most `limit` alerts that are more than an hour old.

    Return the number of deleted rows.
    """
    old = LastSecretAlert.select(LastSecretAlert.id).where(LastSecretAlert.raised_at < clock.now(-HOUR)).limit(limit)
    return int(LastSecretAlert.delete().where(LastSecretAlert.id.in_(old)).execute())


def _publish_alert(alert: _PendingAlert) -> None:
    """Publish the alert, unless any process has published the same alert within the last hour."""
    key = f"{alert.kind}:{alert.type}:{alert.id}"[:300]
    insert = LastSecretAlert.insert(id=key, raised_at=clock.now())
    written = insert.on_conflict(
        conflict_target=[LastSecretAlert.id],
        update={LastSecretAlert.raised_at: clock.now()},
        where=LastSecretAlert.raised_at <= clock.now(-HOUR),
    )
    if not written.as_rowcount().execute():
        return
    title, detail = _alert_texts(alert)
    about = {"type": alert.type, "id": alert.id}
    event = SystemAlert(kind=alert.kind, severity="critical", title=title, detail=detail, object=about)
    emit(event, object=(alert.type, alert.id))


def _alert_texts(alert: _PendingAlert) -> tuple[str, str]:
    names = ", ".join(alert.names)
    if alert.kind == "secret_detected":
        text = f"Text from {alert.type} {alert.id} contained the value of {names}. It was redacted; find the leak."
        return f"A secret was found in the text of a {alert.type}: {names}"[:200], text
    if alert.kind == "secret_damaged":
        text = f"The stored value of {names} is damaged or belongs to another secret and is not used. Store it again."
        return f"A stored secret cannot be decrypted: {names}"[:200], text
    text = "The master key of the stored values is missing or wrong. Restart with the right key; no data is lost."
    return "The vault is sealed", text
