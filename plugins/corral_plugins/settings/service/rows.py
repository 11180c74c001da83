"""Reads stored settings and writes changes with their history. Every method runs in the caller's unit of work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.crypto import Sealer, associated_data
from corral.errors import Unavailable
from corral.ids import new_id
from corral.plugin import SECRET_CHANGE, Setting
from corral_plugins.settings.models import STATE, ChangeRow, StateRow, ValueRow
from corral_plugins.settings.service.effective import StoredSetting

UNREADABLE = "The stored value cannot be decrypted with the master keys of this process."


class SettingChange(msgspec.Struct, frozen=True, kw_only=True):
    """A change to one setting, from the effective value `before` to `value`. For a reset, `is_set` is false."""

    setting: Setting[Any]
    before: Any
    value: Any
    version: int
    is_set: bool = True


class SettingRows:
    """Reads and writes stored settings. No other class writes to their tables."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def stored_version(self) -> int:
        """Return the version of all stored settings."""
        row = StateRow.get_or_none(StateRow.id == STATE)
        return 0 if row is None else int(row.version)

    def lock_settings(self) -> None:
        """Prevent other units of work from changing settings until this unit of work ends.

        The lock ensures that rules involving several settings still hold when the changes are written.
        """
        StateRow.insert(id=STATE, version=0).on_conflict_ignore().execute()
        StateRow.update(version=StateRow.version).where(StateRow.id == STATE).execute()

    def all_rows(self) -> dict[str, StoredSetting]:
        """Return all stored settings, keyed by name."""
        return {row.name: self._stored_value(row) for row in ValueRow.select()}

    def write_changes(self, changes: Iterable[SettingChange], by: Principal) -> int:
        """Store the changes with their history, and return the new version of all stored settings."""
        now, rows, history = clock.now(), [], []
        for change in changes:
            name, secret = change.setting.name, change.setting.secret
            category, _, key = name.partition(".")
            sealed = self._seal_value(change) if secret else None
            rows.append(
                {
                    "name": name,
                    "is_set": change.is_set,
                    "value": None if secret else to_plain_json(change.value),
                    "sealed": sealed,
                    "version": change.version,
                    "updated_at": now,
                    "updated_by": by.user_id,
                }
            )
            before, after = SECRET_CHANGE if secret else (to_plain_json(change.before), to_plain_json(change.value))
            history.append(
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
        ChangeRow.insert_many(history).execute()
        StateRow.update(version=StateRow.version + 1).where(StateRow.id == STATE).execute()
        return self.stored_version()

    def _seal_value(self, change: SettingChange) -> str | None:
        if not change.is_set or change.value is None:
            return None
        where = associated_data("settings_values", change.setting.name, change.version)
        return self._sealer.encrypt(change.value.encode(), aad=where).hex()

    def _stored_value(self, row: ValueRow) -> StoredSetting:
        value, problem = row.value, None
        if row.sealed is not None:
            try:
                where = associated_data("settings_values", row.name, row.version)
                value = self._sealer.decrypt(bytes.fromhex(row.sealed), aad=where).decode()
            except (ValueError, Unavailable):  # the value was altered, or its master key is missing here
                problem = UNREADABLE
        return StoredSetting(
            value=value,
            version=row.version,
            updated_at=row.updated_at,
            updated_by=row.updated_by,
            is_set=row.is_set,
            problem=problem,
        )


def to_plain_json(value: Any) -> Any:
    """Convert a value to plain JSON types."""
    return msgspec.to_builtins(value)


def combined_version(names: Iterable[str], stored: Mapping[str, StoredSetting]) -> int:
    """Return the combined version of the given settings, which increases when any of them changes."""
    return sum(stored[name].version for name in set(names) if name in stored)
