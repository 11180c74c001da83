"""Wires plugins at boot: creates their services, binds their contributions to services, and adds guards."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from corral.auth.permissions import Permissions
from corral.database.model import PRIVATE, PRIVATE_AND_ADMIN, VISIBILITIES
from corral.errors import StartupError
from corral.events.event import EventTypes
from corral.plugins.conflicts import refuse_conflicts
from corral.plugins.container import Container
from corral.plugins.guard import WORK, Guards
from corral.plugins.hooks import offered_hooks
from corral.plugins.record import PluginRecord, block_dependants
from corral.settings.registry import SettingsRegistry

INJECTED = {hook: field for hook, field, _ in WORK} | {"corral_metrics": "collect"}
"""The hooks whose contributions contain a function that takes services, and the field that contains it."""


@dataclasses.dataclass(eq=False)
class PluginWiring:
    """Wires the plugins of one kernel.

    If a plugin fails, it is marked as `failed`, and its services and event types are removed.
    """

    _records: Sequence[PluginRecord]
    _container: Container
    _settings: SettingsRegistry
    _event_types: EventTypes
    _guards: Guards

    def wire(self) -> None:
        """Wire all active plugins.

        The services, settings and events of all plugins are created first, followed by the contributions that use
        services. Raise `StartupError` if the environment or the configuration file contains invalid values for
        settings.
        """
        refuse_conflicts(self._active())
        block_dependants(self._records)
        self._container.sections |= {record.kind.config for record in self._active() if record.kind} - {None}
        self._each(self._make_services)
        if self._settings.faults:
            raise StartupError(*self._settings.faults)
        self._container.get(Permissions).declare(
            permission for record in self._active() if record.kind for permission in record.kind.permissions
        )
        self._each(self._bind)
        hooks: dict[str, tuple[str, Any]] = {}
        self._each(lambda record: hooks.update(offered_hooks(record)))
        self._each(lambda record: self._guards.wrap_contributions(record, hooks))

    def refresh(self, changed: PluginRecord) -> None:
        """Inject the optional services again after the state of a plugin has changed.

        Each attribute for an optional service is set to the service, or to None if the plugin that provides the service
        is out of service.
        """
        for record in self._records:
            if record.in_service:
                self._inject(record)

    def _active(self) -> list[PluginRecord]:
        return [record for record in self._records if record.active]

    def _each(self, step: Callable[[PluginRecord], None]) -> None:
        for record in self._records:  # a failure in this round may block the plugins that follow
            if record.active and not record.run_boot_step(step, record):
                self._container.drop(record)
                self._event_types.drop(record.name)
                block_dependants(self._records)

    def _make_services(self, record: PluginRecord) -> None:
        prefixes = (record.name, *(record.kind.prefixes if record.kind else ()))
        for model in record.contributions_to("corral_models"):
            table = model._meta.table_name
            if not table.startswith(tuple(f"{each}_" for each in prefixes)) and table != record.name:
                raise ValueError(f"the name of the table {table} must begin with {record.name}_")
            if model.visibility in (PRIVATE, PRIVATE_AND_ADMIN) and model.owner_field is None:
                raise ValueError(f"model {model.__name__} is {model.visibility}; set owner_field to its owner column")
        kinds: list[Any] = [*record.contributions_to("corral_models"), *record.contributions_to("corral_events")]
        for kind in kinds:
            if kind.visibility not in VISIBILITIES:
                raise ValueError(
                    f"{kind.__name__}: the visibility {kind.visibility!r} is not one of {', '.join(VISIBILITIES)}"
                )
        record.services = self._container.build(record, record.contributions_to("corral_services"))
        self._event_types.declare(record.name, record.contributions_to("corral_events"))
        self._settings.declare(record.contributions_to("corral_settings"), record.name)

    def _inject(self, record: PluginRecord) -> None:
        for service in record.services:
            self._container.inject(service, record)

    def _bind(self, record: PluginRecord) -> None:
        """Inject optional services, and bind jobs, schedules, subscribers, authenticators and metrics to services."""
        self._inject(record)
        self._check_subscribers(record)
        bind = self._container.bind
        for hook, field in INJECTED.items():
            for index, item in enumerate(items := record.contributions_to(hook)):
                items[index] = msgspec.structs.replace(item, **{field: bind(getattr(item, field), record)})
        record.authenticators = [
            self._container.call(kind, record) for kind in record.contributions_to("corral_authenticators")
        ]

    def _check_subscribers(self, record: PluginRecord) -> None:
        """Raise an error if one of the plugin's subscribers could never run.

        While a plugin in `requires` or `wants` is not active, unknown event names are accepted, because they may be
        events of that plugin.
        """
        absent = not {*record.requires, *record.wants} <= {item.name for item in self._active()}
        for item in record.contributions_to("corral_subscribers"):
            if inspect.iscoroutinefunction(item.handle):
                raise TypeError(
                    f"{item.name}: handle must not be async, because it runs in a unit of work; enqueue a job instead"
                )
            unknown = [] if absent else [each for each in item.events if not self._event_types.is_known(each)]
            if unknown:
                raise ValueError(f"{item.name}: unknown event {unknown[0]}; fix the name or add its plugin to wants")
