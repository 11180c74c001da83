"""The record of one plugin: its contributions, its state, and the transitions between states."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from corral import clock
from corral.auth.principal import Authenticator
from corral.database.migrations import PluginMigrations
from corral.plugin import Plugin, Protection
from corral.plugins.discovery import Found

log = logging.getLogger("corral.plugins")

State = Literal["active", "disabled", "blocked", "failed", "quarantined"]
"""The state of a plugin in this process.

A plugin is out of service if an admin or the configuration has `disabled` it, if a plugin that it requires is out of
service (`blocked`), or if it could not be loaded or started (`failed`). In quarantine, after too many failures, its
hooks, subscriptions, jobs and schedules are suspended, but its routes stay available.
"""


class PluginRecord(msgspec.Struct, kw_only=True, eq=False):
    """The record of one plugin in this process. Only methods of this class change `state`, `reason` and `since`.

    `contributed` maps the full name of each hook to the plugin's contributions. At boot, the functions in contributions
    are bound to their services and then wrapped in guards. `services` and `authenticators` contain the instances of the
    contributed classes.
    """

    found: Found
    state: State = "active"
    reason: str | None = None
    error: BaseException | None = None
    """The exception that caused the plugin to fail, or None."""
    since: str = ""
    kind: type[Plugin] | None = None
    plugin: Plugin | None = None
    contributed: defaultdict[str, list[Any]] = msgspec.field(default_factory=lambda: defaultdict(list))
    services: list[Any] = []
    authenticators: list[Authenticator] = []

    @property
    def name(self) -> str:
        """The plugin's name."""
        return self.found.name

    @property
    def active(self) -> bool:
        """Whether the plugin is in service and not quarantined."""
        return self.state == "active"

    @property
    def in_service(self) -> bool:
        """Whether the plugin's routes and services are available. They remain available in quarantine."""
        return self.state in ("active", "quarantined")

    @property
    def protection(self) -> Protection:
        """The value of the class attribute `protected`. Third-party plugins are never protected."""
        if not self.found.built_in:
            return False
        return self.kind.protected if self.kind is not None else self.found.protection()

    @property
    def protected(self) -> bool:
        """Whether the plugin can be neither disabled nor quarantined."""
        return bool(self.protection)

    @property
    def requires(self) -> tuple[str, ...]:
        """The names of the plugins that this plugin requires. Empty if the plugin could not be imported."""
        return self.kind.requires if self.kind else ()

    @property
    def wants(self) -> tuple[str, ...]:
        """The names of the optional plugins whose services this plugin uses while they are active."""
        return self.kind.wants if self.kind else ()

    def contributions_to(self, hook: str) -> list[Any]:
        """Return the list of the plugin's contributions to one hook.

        During boot, the list is filled, and its items are replaced by items whose functions are bound to services and
        guarded.
        """
        return self.contributed[hook]

    def migrations(self) -> PluginMigrations | None:
        """Return the plugin's migrations, or None if the plugin has no migrations folder."""
        if self.kind is None:
            return None
        directory = Path(inspect.getfile(self.kind)).parent / "migrations"
        return PluginMigrations(self.name, directory) if directory.is_dir() else None

    def become(self, state: State, reason: str | None = None) -> None:
        """Change the state of the plugin. `reason` explains why the plugin is not active."""
        self.state, self.reason, self.since = state, reason, clock.now()

    def fail(self, error: BaseException | str) -> None:
        """Take the plugin out of service because of an error. Set `reason` to one sentence, and log the traceback.

        The text of a `ValueError`, with which Corral reports wrong configuration, is a sentence by itself.
        """
        sentence = str(error) if type(error) in (str, ValueError) else f"{type(error).__name__}: {error}"
        self.become("failed", " ".join(sentence.split())[:500])
        self.error = error if isinstance(error, BaseException) else None
        log.error("plugin failed", extra={"plugin": self.name, "reason": self.reason}, exc_info=self.error)

    def run_boot_step(self, step: Callable[..., Any], *arguments: Any) -> bool:
        """Run a step of the plugin's boot and return whether it succeeded.

        Any exception except `KeyboardInterrupt`, including `SystemExit`, is caught and marks the plugin as `failed`.
        """
        try:
            step(*arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.fail(error)
            return False
        return True


def block_dependants(records: Iterable[PluginRecord]) -> None:
    """Block every active plugin that requires an out-of-service plugin.

    `records` must be sorted by `requires`.
    """
    by_name = {record.name: record for record in records}
    for record in by_name.values():
        for name in record.requires if record.active else ():
            needed = by_name.get(name)
            if needed is None or not needed.in_service:
                record.become("blocked", f"requires {name}, which is {needed.state if needed else 'not installed'}")
                break
