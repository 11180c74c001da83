"""Validates changes to settings, and stores, audits and publishes them.

A change to several settings takes effect as a whole or not at all.
"""

from __future__ import annotations

import asyncio
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.crypto import Sealer, refuse_mask
from corral.database.unit import after_commit
from corral.egress.client import Egress
from corral.errors import Conflict, FieldError, Forbidden, Invalid, NotFound
from corral.events.event import emit
from corral.http.answers import ANY_VERSION, IfMatch
from corral.plugin import SECRET_CHANGE, Audit, AuditEntry, Setting, Settings
from corral.redact.redactor import Redactor
from corral.settings.registry import DeclaredSetting, SettingsRegistry, SettingValues
from corral.settings.store import SettingsChange
from corral.settings.validation import SettingRefused, WebUrl, convert_value
from corral_plugins.settings.api import SettingChanged
from corral_plugins.settings.service.effective import EffectiveSetting, EffectiveSettings, Stored, StoredSetting
from corral_plugins.settings.service.rows import SettingChange, SettingRows, combined_version, to_plain_json

MAX_VALUE_BYTES = 64 * 1024
Check = Callable[[Settings, Principal], None]


class SettingsService:
    """Reads and changes settings. Implements `corral.settings.store.SettingsStore`."""

    audit: Audit | None = None

    def __init__(
        self,
        registry: SettingsRegistry,
        effective: EffectiveSettings,
        sealer: Sealer,
        redactor: Redactor,
        egress: Egress,
    ) -> None:
        self._registry, self._effective, self._redactor, self._egress = registry, effective, redactor, egress
        self.rows = SettingRows(sealer)
        self._checks: list[tuple[frozenset[str], Check]] = []
        self._secrets: dict[str, str] = {}

    async def check_urls(self, values: Mapping[str, Any], *, pointer: Callable[[str], str] = "/{}".format) -> None:
        for name, value in values.items():
            item = self._registry.find(name)
            if item is not None and isinstance(value, str) and _is_url(item.setting):
                await self._egress.check_saved_url(value, pointer=pointer(name))

    def change(
        self,
        values: Mapping[str, Any],
        *,
        by: Principal,
        if_match: IfMatch = ANY_VERSION,
        version_of: Iterable[str] = (),
        pointer: Callable[[str], str] = "/{}".format,
    ) -> SettingsChange:
        self.rows.lock_settings()
        stored = self.rows.all_rows()
        if_match.check(combined_version(version_of or values, stored))
        found = self._convert_values(values, pointer)
        changes = [
            SettingChange(
                setting=item.setting, before=item.value, value=value, version=_next_version(stored, item.setting.name)
            )
            for item, value in ((self._preview(name, stored), value) for name, value in found.items())
            if item.problem is not None or value != item.value
        ]
        self._refuse_locked([change.setting.name for change in changes])
        self._store_changes(changes, stored, by, lambda name: pointer(name) if name in values else "")
        touched = sorted(change.setting.name for change in changes)
        return SettingsChange(updated=touched, unchanged=sorted(set(values) - set(touched)))

    def reset(self, name: str, *, by: Principal, if_match: IfMatch = ANY_VERSION) -> EffectiveSetting:
        """Reset a setting to its default.

        Raise `NotFound` for an unknown setting, `Conflict` (`setting_locked`) if an environment variable or a file sets
        its value, or `Invalid` if the change breaks a rule that involves several settings.
        """
        self.refuse_locked(name)
        self.rows.lock_settings()
        stored = self.rows.all_rows()
        if_match.check(combined_version([name], stored))
        item = self._preview(name, stored)
        if item.stored is not None and item.stored.is_set:
            default, version = item.setting.default, _next_version(stored, name)
            change = SettingChange(
                setting=item.setting, before=item.value, value=default, version=version, is_set=False
            )
            self._store_changes([change], stored, by, lambda name: "")
        return self.read(name)

    def read(self, name: str) -> EffectiveSetting:
        """Return a setting, including changes made in this unit of work. Raise `NotFound` for an unknown setting."""
        return self._preview(name, self.rows.all_rows())

    def read_all(self) -> list[EffectiveSetting]:
        """Return the settings of active plugins, sorted by name, including changes made in this unit of work."""
        stored = self.rows.all_rows()
        return [self._effective.preview(item, stored) for item in self._registry.settings_in_service()]

    def refuse_locked(self, name: str) -> None:
        """Raise an error if the setting cannot be changed.

        Raise `NotFound` for an unknown setting, and `Conflict` if an environment variable or a file sets its value.
        """
        self._find_declared(name)
        self._refuse_locked([name])

    def all_names(self) -> list[str]:
        """Return the names of all declared settings, including those of plugins that are not active."""
        return [item.setting.name for item in self._registry.all()]

    def version(self, names: Iterable[str]) -> int:
        return combined_version(names, self.rows.all_rows())

    def values(self) -> Settings:
        return self._preview_values(self.rows.all_rows())

    def apply_stored(self) -> None:
        self.apply_values(self.rows.stored_version(), self.rows.all_rows())

    def add_check(self, settings: Iterable[Setting[Any]], check: Check) -> None:
        self._checks.append((frozenset(setting.name for setting in settings), check))

    def apply_values(self, version: int, stored: Stored) -> None:
        """Apply stored values in this process. Runs on the event loop."""
        self._effective.apply(version, stored)

    async def update_redactor(self) -> None:
        """Pass the effective values of secret settings to the redactor.

        Rebuilding the redactor's matcher is slow, so it runs in a thread.
        """
        secrets = {
            item.setting.name: item.value
            for item in self._effective.current
            if item.setting.secret and item.source == "database" and item.value
        }
        if secrets != self._secrets:
            await asyncio.to_thread(self._redactor.set_values, "settings", secrets)
            self._secrets = secrets

    def _preview(self, name: str, stored: Stored) -> EffectiveSetting:
        return self._effective.preview(self._find_declared(name), stored)

    def _find_declared(self, name: str) -> DeclaredSetting:
        item = self._registry.find(name)
        if item is None:
            raise NotFound("There is no setting with this name; GET /settings lists all settings.")
        return item

    def _convert_values(self, values: Mapping[str, Any], pointer: Callable[[str], str]) -> dict[str, Any]:
        """Convert the values to the types of their settings.

        Raise a single `Invalid` that lists every invalid value.
        """
        faults: list[FieldError] = []
        found: dict[str, Any] = {}
        code: str | None = None
        for name, value in values.items():
            item = self._registry.find(name)
            if item is None:
                faults.append(FieldError(pointer(name), "unknown_setting", f"There is no setting {name}."))
                continue
            try:
                if item.setting.secret and isinstance(value, str):
                    refuse_mask(value, pointer(name))
                found[name] = convert_value(item.setting, value)
                if len(msgspec.json.encode(found[name])) > MAX_VALUE_BYTES:
                    raise SettingRefused(f"{name} must not exceed 64 KiB when it is encoded as JSON", "too_long")
            except Invalid as masked:
                code, faults = masked.code, [*faults, *masked.errors]
            except SettingRefused as refusal:
                faults.append(FieldError(pointer(name), refusal.code, f"{refusal}."))
        if faults:
            if all(fault.code == "unknown_setting" for fault in faults):
                code = "unknown_setting"
            raise Invalid(" ".join(fault.detail for fault in faults[:3]), code=code, errors=faults)
        return found

    def _refuse_locked(self, names: Sequence[str]) -> None:
        pins = {name: item.pinned_by for name in names if (item := self._registry.find(name)) and item.pinned_by}
        if pins:
            pinned = ", ".join(f"{name} is set by {by}" for name, by in pins.items())
            raise Conflict(
                f"{pinned}; change the value there.", code="setting_locked", pinned_by=sorted(set(pins.values()))
            )

    def _store_changes(
        self, changes: Sequence[SettingChange], stored: Stored, by: Principal, pointer: Callable[[str], str]
    ) -> None:
        if not changes:
            return
        touched = {change.setting.name for change in changes}
        guards = sorted(change.setting.name for change in changes if change.setting.own_session)
        if guards and by.session_id is None and by.kind != "system":
            raise Forbidden(
                f"Sign in to change {', '.join(guards)}; an API key is not sufficient.", code="insufficient_scope"
            )
        self._check_related_settings(touched, stored, _stored_after(changes, stored), pointer)
        version = self.rows.write_changes(changes, by)
        fresh = self.rows.all_rows()
        for names, check in self._checks:
            if names & touched:
                check(self._preview_values(fresh), by)
        for change in changes:
            self._publish_change(change)
        after_commit(lambda: self.apply_values(version, fresh))

    def _check_related_settings(
        self, touched: set[str], before: Stored, after: Stored, pointer: Callable[[str], str]
    ) -> None:
        """Check the rules that involve several settings.

        A rule that was already broken before the change does not block changes to other settings.
        """
        broken = self._check_values(self._preview_values(after))
        known = self._check_values(self._preview_values(before)) if broken else {}
        faults = [
            FieldError(pointer(name), "not_allowed", f"{sentence}.")
            for name, sentence in broken.items()
            if name in touched or name not in known
        ]
        if faults:
            raise Invalid(" ".join(fault.detail for fault in faults[:3]), errors=faults)

    def _preview_values(self, stored: Stored) -> SettingValues:
        """Return all effective values as they would be if the values in `stored` were applied."""
        found = [self._effective.preview(item, stored) for item in self._registry.all()]
        return SettingValues({item.setting.name: item.value for item in found})

    def _check_values(self, values: Settings) -> dict[str, str]:
        """Run the checks of all settings on these values. Return the problems found, keyed by setting name."""
        checks = [(item.setting, item.setting.check) for item in self._registry.settings_in_service()]
        problems = {each.name: check(values.get(each), values) for each, check in checks if check is not None}
        return {name: f"{name} {sentence}" for name, sentence in problems.items() if sentence is not None}

    def _publish_change(self, change: SettingChange) -> None:
        name = change.setting.name
        category, _, key = name.partition(".")
        event = SettingChanged(category=category, key=key, source="database" if change.is_set else "default")
        emit(event, object=("setting", name))
        if self.audit is not None:
            verb = "update" if change.is_set else "reset"
            values = (
                SECRET_CHANGE if change.setting.secret else (to_plain_json(change.before), to_plain_json(change.value))
            )
            entry = AuditEntry(
                action=f"settings.setting.{verb}", object_type="setting", object_id=name, changes={name: values}
            )
            self.audit.record(entry)


def _next_version(stored: Stored, name: str) -> int:
    return stored[name].version + 1 if name in stored else 1


def _stored_after(changes: Iterable[SettingChange], stored: Stored) -> Stored:
    """Return the stored settings with the changes applied."""
    return dict(stored) | {
        change.setting.name: StoredSetting(
            value=to_plain_json(change.value),
            version=change.version,
            updated_at="",
            updated_by=None,
            is_set=change.is_set,
        )
        for change in changes
    }


def _is_url(setting: Setting[Any]) -> bool:
    """Return whether the setting's type is `WebUrl` or `WebUrl | None`."""
    return any(WebUrl == kind for kind in (setting.kind, *typing.get_args(setting.kind)))
