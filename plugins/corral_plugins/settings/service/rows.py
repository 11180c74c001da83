"""The rows of settings: reading them, and writing a change with its history. Everything joins the unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.crypto import Keyring, place
from corral.errors import Unavailable
from corral.ids import new_id
from corral.plugin import SECRET_CHANGE, Setting
from corral.settings.registry import StoredSetting
from corral_plugins.settings.models import STATE, ChangeRow, StateRow, ValueRow

UNREADABLE = "The stored value cannot be opened with the master keys of this process."


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one setting. `before`, `value`: what ruled and what is stored; not `is_set`: it is reset."""

    setting: Setting[Any]
    before: Any
    value: Any
    version: int
    is_set: bool = True


class SettingRows:
    """The only writer of the tables."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def version(self) -> int:
        """The version of all stored values together."""
        row = StateRow.get_or_none(StateRow.id == STATE)
        return 0 if row is None else int(row.version)

    def lock(self) -> None:
        """Until the end of the unit no other changes a setting: what is judged together is stored together."""
        StateRow.insert(id=STATE, version=0).on_conflict_ignore().execute()
        StateRow.update(version=StateRow.version).where(StateRow.id == STATE).execute()

    def all(self) -> dict[str, StoredSetting]:
        """Everything that is stored, by name; as many rows as there are settings at most."""
        return {row.name: self._stored(row) for row in ValueRow.select()}

    def write(self, changes: Iterable[Change], by: Principal) -> int:
        """Store the changes with their history; the new version of all values."""
        now, rows, told = clock.now(), [], []
        for change in changes:
            name, secret = change.setting.name, change.setting.secret
            category, _, key = name.partition(".")
            sealed = self._sealed(change) if secret else None
            rows.append(
                {
                    "name": name,
                    "is_set": change.is_set,
                    "value": None if secret else plain(change.value),
                    "sealed": sealed,
                    "version": change.version,
                    "updated_at": now,
                    "updated_by": by.user_id,
                }
            )
            before, after = SECRET_CHANGE if secret else (plain(change.before), plain(change.value))
            told.append(
                {
                    "id": new_id(),
                    "category": category,
                    "key": key,
                    "before": before,
                    "after": after,
                    "by": by.user_id,
                    "at": now,
                }
            )
        kept = [field for field in ValueRow._meta.sorted_fields if field is not ValueRow.name]
        ValueRow.insert_many(rows).on_conflict(conflict_target=[ValueRow.name], preserve=kept).execute()
        ChangeRow.insert_many(told).execute()
        StateRow.update(version=StateRow.version + 1).where(StateRow.id == STATE).execute()
        return self.version()

    def _sealed(self, change: Change) -> str | None:
        if not change.is_set or change.value is None:
            return None
        where = place("settings_values", change.setting.name, change.version)
        return self._keyring.seal(change.value.encode(), aad=where).hex()

    def _stored(self, row: ValueRow) -> StoredSetting:
        value, problem = row.value, None
        if row.sealed is not None:
            try:
                where = place("settings_values", row.name, row.version)
                value = self._keyring.open(bytes.fromhex(row.sealed), aad=where).decode()
            except (ValueError, Unavailable):  # somebody altered it, or its key is not here
                problem = UNREADABLE
        return StoredSetting(
            value=value,
            version=row.version,
            updated_at=row.updated_at,
            updated_by=row.updated_by,
            is_set=row.is_set,
            problem=problem,
        )


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    return msgspec.to_builtins(value)


def versions(names: Iterable[str], stored: Mapping[str, StoredSetting]) -> int:
    """The version of some settings together."""
    return sum(stored[name].version for name in set(names) if name in stored)
