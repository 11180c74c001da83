"""The record of one plugin: its state, and everything that it contributes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from corral import clock
from corral.database.migrations import Home
from corral.plugin import Plugin
from corral.plugins.discovery import Found

log = logging.getLogger("corral.plugins")

ESSENTIAL = frozenset({"core", "audit", "security"})
PROTECTED = ESSENTIAL | {"secrets", "settings", "admin"}


class PluginRecord(msgspec.Struct, kw_only=True):
    """A plugin and its state: `active | disabled | blocked | failed | quarantined`."""

    found: Found
    state: str = "active"
    reason: str | None = None
    since: str = ""
    kind: type[Plugin] | None = None
    plugin: Plugin | None = None
    contributions: dict[str, list[Any]] = {}

    @property
    def name(self) -> str:
        """The plugin's name."""
        return self.found.name

    @property
    def active(self) -> bool:
        """Whether it takes part."""
        return self.state == "active"

    @property
    def serves(self) -> bool:
        """Whether its routes and services are there: in quarantine too."""
        return self.state in ("active", "quarantined")

    @property
    def protected(self) -> bool:
        """Whether nothing is safe without it."""
        return self.found.built_in and (self.name in PROTECTED or bool(self.kind and self.kind.protected))

    @property
    def requires(self) -> tuple[str, ...]:
        """What it needs; nothing while it could not be imported."""
        return self.kind.requires if self.kind else ()

    def of(self, hook: str) -> list[Any]:
        """What it contributed to a hook."""
        return self.contributions.get(hook, [])

    def become(self, state: str, reason: str | None) -> None:
        """Change the state, now."""
        self.state, self.reason, self.since = state, reason, clock.now()

    def home(self) -> Home | None:
        """Where its migrations are, if it has some."""
        if self.kind is None:
            return None
        directory = Path(inspect.getfile(self.kind)).parent / "migrations"
        return Home(self.name, directory) if directory.is_dir() else None


def attempt(loaded: PluginRecord, step: Callable[[], Any]) -> bool:
    """Run a step of one plugin's boot; whatever it raises, `SystemExit` too, makes that plugin `failed`."""
    try:
        step()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        fail(loaded, error)
        return False
    return True


def fail(loaded: PluginRecord, error: BaseException | str) -> None:
    """The plugin is out; one sentence is its reason, the trace goes to the log."""
    sentence = error if isinstance(error, str) else " ".join(f"{type(error).__name__}: {error}".split())
    loaded.become("failed", sentence[:500])
    log.error(
        "plugin failed",
        extra={"plugin": loaded.name, "reason": loaded.reason},
        exc_info=error if isinstance(error, BaseException) else None,
    )


def block(ordered: Iterable[PluginRecord]) -> None:
    """Block what requires something that is not active."""
    states = {loaded.name: loaded for loaded in ordered}
    for loaded in states.values():
        for name in loaded.requires if loaded.active else ():
            needed = states.get(name)
            if needed is None or not needed.serves:
                loaded.become("blocked", f"requires {name}, which is {needed.state if needed else 'not installed'}")
                break
