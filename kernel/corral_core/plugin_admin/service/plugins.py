"""Administration of plugins. The database stores which plugins admins have disabled."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.cli.masked_config import masked
from corral.database.engine import Work
from corral.database.unit import after_commit, current
from corral.errors import Conflict, FieldError, Invalid, NotFound
from corral.events.event import SystemAlert, emit
from corral.events.log import LoggedEvent
from corral.plugin import Audit, AuditEntry
from corral.plugins.quarantine import PluginQuarantine
from corral.plugins.record import PluginRecord
from corral.plugins.registry import PluginError, PluginRegistry
from corral.schema.fields import Instant
from corral.settings.store import SettingsChange, SettingsStore
from corral_core.plugin_admin.api import PluginStateChanged
from corral_core.plugin_admin.models import PluginStateRow
from corral_core.plugin_admin.service import quarantine
from corral_core.plugin_admin.service.schedules import ScheduleView, schedule_views, stored_schedules

OFF = "admin"


class MigrationNames(msgspec.Struct, kw_only=True):
    """The names of a plugin's migration scripts, in the order in which they run."""

    applied: list[str]
    pending: list[str]


class PluginView(msgspec.Struct, kw_only=True):
    """A plugin with its metadata, contributions, state and errors."""

    name: str
    title: str
    description: str
    version: str
    distribution: str
    author: str
    license: str
    protected: bool
    state: str
    reason: str | None
    since: Instant
    requires: list[str]
    wants: list[str]
    required_by: list[str]
    permissions: list[str]
    routes: list[str]
    events: list[str]
    jobs: list[str]
    schedules: list[ScheduleView]
    settings: list[str]
    migrations: MigrationNames
    errors_60s: int
    errors_total: int
    last_error: PluginError | None
    pending_reload: bool = False


class PluginAdministration:
    """Lists, configures, enables and disables plugins. Every process applies the stored decisions of admins."""

    audit: Audit | None = None

    def __init__(self, registry: PluginRegistry, quarantines: PluginQuarantine, work: Work) -> None:
        self._registry, self._quarantines, self._work = registry, quarantines, work
        self._changed = asyncio.Event()
        self._decisions = 0  # made in this process

    def list_plugins(self, states: Sequence[str] = ()) -> list[PluginView]:
        """Return the plugins in the given states, sorted by name. If `states` is empty, return every plugin."""
        stored = _StoredFacts()
        return [self._plugin_view(item, stored) for item in self._registry.all() if not states or item.state in states]

    def get_plugin(self, name: str) -> PluginView:
        """Return a plugin by name. Raise `NotFound` for an unknown name."""
        return self._plugin_view(self._find_plugin(name), _StoredFacts())

    def list_errors(self, name: str) -> list[PluginError]:
        """Return the last 100 errors of a plugin, newest first. Raise `NotFound` for an unknown name."""
        self._find_plugin(name)
        return self._registry.errors(name)

    def get_configuration(self, name: str) -> dict[str, Any]:
        """Return the effective configuration section `[plugins.<name>]`, with secrets masked."""
        loaded = self._find_plugin(name)
        section = loaded.plugin.section if loaded.plugin is not None else None
        table = self._registry.configuration.tables.get(name, {}) if section is None else msgspec.to_builtins(section)
        shown: dict[str, Any] = masked(table)
        return shown

    def change_settings(
        self, name: str, values: Mapping[str, Any], store: SettingsStore, *, by: Principal
    ) -> SettingsChange:
        """Change run-time settings of a plugin. Raise `Invalid` (`unknown_setting`) for settings of another plugin."""
        own = {setting.name for setting in self._find_plugin(name).contributions_to("corral_settings")}
        foreign = [
            FieldError(f"/settings/{each}", "unknown_setting", f"{name} has no setting {each}.")
            for each in values
            if each not in own
        ]
        if foreign:
            raise Invalid(foreign[0].detail, code="unknown_setting", errors=foreign)
        change = store.change(values, by=by, pointer="/settings/{}".format)
        if change.updated and self.audit is not None:
            action, details = "plugins.plugin.config", {"settings": change.updated}
            self.audit.record(AuditEntry(action=action, object_type="plugin", object_id=name, details=details))
        return change

    def disable(self, name: str, reason: str | None) -> PluginView:
        """Disable a plugin in every process, now and at later starts.

        Raise `Conflict` if the plugin is protected, enabled in corral.toml, or required by another plugin.
        """
        loaded = self._find_plugin(name)
        if loaded.protected:
            raise Conflict("This plugin is protected and cannot be disabled.", code="plugin_required")
        if name in self._registry.configuration.enabled:
            raise Conflict(
                "corral.toml enables this plugin; first remove it from `enabled` in the section [plugins].",
                code="setting_locked",
            )
        dependants = self._required_by(name)
        if dependants:
            raise Conflict(
                f"Other plugins require this plugin; disable those plugins first: {', '.join(dependants)}.",
                code="in_use",
                references=dependants,
            )
        if loaded.state != "disabled" or not (self._is_off_by_file(loaded) or name in self.disabled_by_admins()):
            row = {"state": "disabled", "reason": reason, "since": clock.now()}
            PluginStateRow.insert(name=name, **row).on_conflict(
                conflict_target=[PluginStateRow.name], update=row
            ).execute()
            before = "active" if loaded.state == "disabled" else loaded.state  # another process has just enabled it
            self._publish_state(name, before, "disabled", reason or OFF)
            after_commit(lambda: self._disable_in_process(name, reason or OFF))
        return msgspec.structs.replace(self.get_plugin(name), state="disabled", reason=loaded.reason or reason or OFF)

    def enable(self, name: str) -> PluginView:
        """Enable a plugin.

        A plugin that is not loaded becomes active at the next start. In this case, the view has `pending_reload` set.
        Raise `Conflict` if the plugin is blocked or failed, if corral.toml disables it, or if it is a third-party
        plugin that corral.toml does not enable.
        """
        loaded = self._find_plugin(name)
        if name in self._registry.configuration.disabled:
            raise Conflict(
                "corral.toml disables this plugin; first remove it from `disabled` in the section [plugins].",
                code="setting_locked",
            )
        if not loaded.found.built_in and name not in self._registry.configuration.enabled:
            raise Conflict(
                f"The plugin is not enabled in corral.toml; run `corral plugins enable {name}`.", code="setting_locked"
            )
        if loaded.state in ("blocked", "failed"):
            raise Conflict(
                f"The plugin cannot be enabled, because it is {loaded.state}: {loaded.reason}",
                current_status=loaded.state,
            )
        was_disabled = bool(PluginStateRow.delete().where(PluginStateRow.name == name).execute())
        was_quarantined = quarantine.release_plugin(loaded)
        is_loaded = loaded.plugin is not None
        if was_disabled or was_quarantined or (is_loaded and not loaded.active):
            before = "disabled" if was_disabled else "quarantined" if was_quarantined else loaded.state
            self._publish_state(name, before, "active", None)  # other processes may have loaded the plugin
            after_commit(lambda: self._enable_in_process(name))
        if not is_loaded:
            return msgspec.structs.replace(self.get_plugin(name), pending_reload=True)
        return msgspec.structs.replace(self.get_plugin(name), state="active", reason=None)

    def _disable_in_process(self, name: str, reason: str) -> None:
        self._decisions += 1
        self._registry.change_state(name, "disabled", reason)

    def _enable_in_process(self, name: str) -> None:
        self._decisions += 1
        self._quarantines.tracker(name).failures.clear()
        self._registry.change_state(name, "active")

    def disabled_by_admins(self) -> dict[str, str]:
        """Return the names of the plugins that admins disabled, mapped to the reasons."""
        return {row.name: row.reason or OFF for row in PluginStateRow.select()}

    def apply_decisions(self, stored: Mapping[str, str]) -> None:
        """Enable and disable plugins in this process to match the stored decisions. Runs on the event loop."""
        for loaded in self._registry.all():
            reason = stored.get(loaded.name)
            stays = loaded.protected or loaded.name in self._registry.configuration.enabled
            if (
                reason is not None and loaded.in_service and not stays
            ):  # corral.toml takes precedence over stored decisions
                self._registry.change_state(loaded.name, "disabled", reason)
            elif reason is None and loaded.state == "disabled" and loaded.plugin is not None:
                self._registry.change_state(loaded.name, "active")

    async def apply_changes(self) -> None:
        """Apply the stored decisions, now and whenever an event reports that they changed, until cancelled.

        The kernel supervises this task in every process.
        """
        while True:
            self._changed.clear()
            made = -1
            while made != self._decisions:  # rows that were read before a decision of this process are out of date
                made, stored = self._decisions, await self._work(self.disabled_by_admins, read=True)
            self.apply_decisions(stored)
            await self._changed.wait()

    def on_events(self, records: Sequence[LoggedEvent]) -> None:
        """If the state of a plugin changed, let `apply_changes` read the stored decisions again.

        The event feed calls this method, also for events from other processes.
        """
        if any(record.type == PluginStateChanged.event for record in records):
            self._changed.set()

    def _find_plugin(self, name: str) -> PluginRecord:
        loaded = self._registry.get(name)
        if loaded is None:
            raise NotFound("There is no plugin with this name.")
        return loaded

    def _is_off_by_file(self, loaded: PluginRecord) -> bool:
        """Return whether corral.toml disables a built-in plugin, or does not enable a third-party plugin."""
        given = self._registry.configuration
        return loaded.name in given.disabled if loaded.found.built_in else loaded.name not in given.enabled

    def _publish_state(self, name: str, before: str, after: str, reason: str | None) -> None:
        emit(PluginStateChanged(name=name, from_=before, to=after, reason=reason), object=("plugin", name))
        if self.audit is not None:
            verb = "enable" if after == "active" else "disable"
            entry = AuditEntry(
                action=f"plugins.plugin.{verb}",
                object_type="plugin",
                object_id=name,
                changes={"state": (before, after)},
                details={"reason": reason},
            )
            self.audit.record(entry)

    def _required_by(self, name: str) -> list[str]:
        """Return the names of the active or quarantined plugins that require the named plugin."""
        return [other.name for other in self._registry.all() if other.in_service and name in other.requires]

    def _plugin_view(self, item: PluginRecord, stored: _StoredFacts) -> PluginView:
        kind, found = item.kind, item.found
        recent, total = self._registry.error_counts(item.name)
        errors = self._registry.errors(item.name)
        return PluginView(
            name=item.name,
            title=kind.title() if kind else item.name,
            description=kind.description() if kind else "",
            version=found.version,
            distribution=found.distribution,
            author=found.author,
            license=found.license,
            protected=item.protected,
            state=item.state,
            reason=item.reason,
            since=item.since,
            requires=sorted(item.requires),
            wants=sorted(kind.wants) if kind else [],
            required_by=self._required_by(item.name),
            permissions=sorted(each.name for each in kind.permissions) if kind else [],
            routes=[route.label for group in item.contributions_to("corral_routes") for route in group],
            events=sorted(each.event for each in item.contributions_to("corral_events")),
            jobs=sorted(each.name for each in item.contributions_to("corral_jobs")),
            schedules=schedule_views(item.contributions_to("corral_schedules"), stored.schedules),
            settings=sorted(each.name for each in item.contributions_to("corral_settings")),
            migrations=_migrations_of(item, stored.tables),
            errors_60s=recent,
            errors_total=total,
            last_error=errors[0] if errors else None,
        )


def safe_mode_alert() -> None:
    """Raise an alert about safe mode, in which only protected plugins are loaded.

    Runs in the caller's unit of work.
    """
    alert = SystemAlert(
        kind="safe_mode",
        severity="critical",
        title="Safe mode: only protected plugins are loaded",
        detail="Three starts in a row ended early, or CORRAL_SAFE_MODE is set. Fix or disable the faulty plugin, "
        "then restart.",
    )
    emit(alert, object=("plugin", "plugin_admin"))


class _StoredFacts:
    """The stored data about all plugins, read once in the current unit of work."""

    def __init__(self) -> None:
        self.tables = frozenset(current().database.engine.get_tables())
        self.schedules = stored_schedules()


def _migrations_of(item: PluginRecord, tables: frozenset[str]) -> MigrationNames:
    home = item.migrations()
    scripts = sorted(path.stem for path in home.directory.glob("[0-9]*.py")) if home else []
    applied: set[str] = set()
    if f"{item.name}_migrations" in tables:  # safe in SQL: the loader refuses plugin names that are not identifiers
        rows = current().connection.execute(f"SELECT name FROM {item.name}_migrations").fetchall()  # noqa: S608
        applied = {row[0] for row in rows}
    return MigrationNames(
        applied=[name for name in scripts if name in applied], pending=[name for name in scripts if name not in applied]
    )
