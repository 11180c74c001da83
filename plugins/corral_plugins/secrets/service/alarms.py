"""Alarms: a value met in text that a machine made, a stored value that does not open, a start without the key."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Collection

import msgspec

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, Entry
from corral.events.event import SystemAlert, emit
from corral.redact.matcher import Hit
from corral.redact.redactor import maker
from corral_plugins.secrets.models import SecretAlert

SOURCE = "secrets"
"""The name under which the redactor knows the values of the vault."""
HOUR = 3600
REMEMBERED, WAITING = 10_000, 1000
ENTRY = Entry(label="secrets.alarms", actor=SYSTEM)


class _Alarm(msgspec.Struct, frozen=True):
    kind: str
    type: str
    id: str
    names: tuple[str, ...]


class Alarms:
    """Raised from any thread, written by `run`; at most one an hour of a kind and object."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._told: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._waiting: list[_Alarm] = []
        self._changing = threading.Lock()
        self._rung = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def met(self, hits: Collection[Hit]) -> None:
        """For the redactor: what it found. Text that people wrote, and Corral's own, raises nothing."""
        made_by = maker()
        if made_by is not None:
            names = tuple(sorted({label_name(hit.name) for hit in hits if hit.source == SOURCE}))
            if names:
                self._raise(_Alarm("secret_detected", *made_by, names))

    def damaged(self, secret_id: str, name: str) -> None:
        """A stored value does not open where it lies."""
        self._raise(_Alarm("secret_damaged", "secret", secret_id, (name,)))

    def sealed(self) -> None:
        """Corral runs without the key of its stored values; joins the unit."""
        _write(_Alarm("vault_sealed", "vault", "vault", ()))

    async def run(self) -> None:
        """Write what is raised, for ever."""
        self._loop = asyncio.get_running_loop()
        if self._waiting:
            self._rung.set()
        while True:
            await self._rung.wait()
            self._rung.clear()
            while self._waiting:
                alarm = self._waiting[0]
                await self._work(lambda alarm=alarm: _write(alarm), entry=ENTRY)  # type: ignore[misc]  # bound now
                self._waiting.pop(0)

    def _raise(self, alarm: _Alarm) -> None:
        key, now = (alarm.kind, alarm.type, alarm.id), time.monotonic()
        with self._changing:
            if now - self._told.get(key, -HOUR) < HOUR or len(self._waiting) >= WAITING:
                return
            self._told[key] = now
            while len(self._told) > REMEMBERED:
                self._told.popitem(last=False)
            self._waiting.append(alarm)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._rung.set)


def label(name: str, n: int) -> str:
    """Under which the redactor knows a version."""
    return f"{name}@{n}"


def label_name(text: str) -> str:
    """The secret's name in a label."""
    return text.rpartition("@")[0]


def prune(at_once: int) -> int:
    """Forget alerts that no longer hold back others."""
    old = SecretAlert.select(SecretAlert.id).where(SecretAlert.raised_at < clock.now(-HOUR)).limit(at_once)
    return int(SecretAlert.delete().where(SecretAlert.id.in_(old)).execute())


def _write(alarm: _Alarm) -> None:
    """Emit, unless another process did so within the hour."""
    key = f"{alarm.kind}:{alarm.type}:{alarm.id}"[:300]
    insert = SecretAlert.insert(id=key, raised_at=clock.now())
    written = insert.on_conflict(
        conflict_target=[SecretAlert.id],
        update={SecretAlert.raised_at: clock.now()},
        where=SecretAlert.raised_at <= clock.now(-HOUR),
    )
    if not written.as_rowcount().execute():
        return
    title, detail = _words(alarm)
    about = {"type": alarm.type, "id": alarm.id}
    alert = SystemAlert(kind=alarm.kind, severity="critical", title=title, detail=detail, object=about)
    emit(alert, object=(alarm.type, alarm.id))


def _words(alarm: _Alarm) -> tuple[str, str]:
    names = ", ".join(alarm.names)
    if alarm.kind == "secret_detected":
        told = f"What {alarm.type} {alarm.id} wrote held the value of {names}. It was taken out; find out how it came."
        return f"A secret was met in the text of a {alarm.type}: {names}"[:200], told
    if alarm.kind == "secret_damaged":
        told = f"The stored value of {names} was changed or belongs to another secret. It is not used; store it anew."
        return f"A stored secret does not open: {names}"[:200], told
    told = "The master key of the stored values is missing or another one. Start with the right one; nothing is lost."
    return "The vault is sealed", told
