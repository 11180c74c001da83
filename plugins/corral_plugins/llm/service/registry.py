"""Every provider by name: those of `corral.toml`, those made by the API, presets, and those that need nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from corral.database.statement import Statement
from corral.database.unit import Unit, current, in_unit
from corral.plugin import Contributions
from corral_plugins.llm.api import LLMProvider, ModelFacts
from corral_plugins.llm.kinds.presets import PRESETS
from corral_plugins.llm.models import LlmProviderRow, LlmProviderState
from corral_plugins.llm.service.provider import Found, Provider, of_file, of_kind, of_preset, of_row

log = logging.getLogger("corral.llm")

_STAMPS = Statement(lambda p: LlmProviderRow.select(LlmProviderRow.name, LlmProviderRow.stamp).tuples())
_FOUND = Statement(
    lambda p: (
        LlmProviderState.select(LlmProviderState.name, LlmProviderState.stamp)
        .where(LlmProviderState.stamp.is_null(False))
        .tuples()
    )
)


class Target(msgspec.Struct, frozen=True):
    """A model of a provider. `name` is `provider/model`."""

    provider: Provider
    model: str

    @property
    def name(self) -> str:
        """`provider/model`."""
        return f"{self.provider.name}/{self.model}"


class _Rows(msgspec.Struct, frozen=True):
    """What the database says, as of `stamps`."""

    stamps: frozenset[tuple[str, str, str]] = frozenset()
    providers: tuple[LlmProviderRow, ...] = ()
    found: Mapping[str, Found] = {}


class _Synced(threading.local):
    """The unit in which this thread has compared last."""

    unit: Unit | None = None


class Registry:
    """What was read of the database is kept in memory; inside a unit it is compared with the rows' stamps first."""

    def __init__(self, contributions: Contributions, tables: Mapping[str, Mapping[str, Any]]) -> None:
        self._contributions, self._tables = contributions, tables
        self._rows = _Rows()
        self._made: tuple[Any, dict[str, Provider]] = (None, {})
        self._synced = _Synced()

    def changed(self) -> None:
        """The current unit wrote a row: it is to be seen at once."""
        self._synced.unit = None

    def check(self) -> None:
        """Raise `ValueError` for a table of no known kind, or with a configuration that its kind does not take."""
        kinds = self.kinds()
        for name, table in self._tables.items():
            if of_file(name, table, kinds, Found()) is None:
                raise ValueError(f"llm.providers.{name}.kind: one of {', '.join(sorted(kinds))}")

    def kinds(self) -> dict[str, LLMProvider]:
        """Every kind that is in service, by name."""
        return {item.kind: item for _, item in self._contributions.of("corral_llm_providers")}

    def all(self) -> list[Provider]:
        """By name; those whose kind is out of service are left out."""
        providers = self._providers()
        return [providers[name] for name in sorted(providers)]

    def get(self, name: str) -> Provider | None:
        """A provider by name."""
        return self._providers().get(name)

    def in_file(self, name: str) -> bool:
        """Whether `corral.toml` has it."""
        return name in self._tables

    def facts(self, name: str) -> ModelFacts | None:
        """What is known of `provider/model`."""
        target = self.target(name)
        listed = target.provider.models() if target is not None else ()
        return next((item for item in listed if target is not None and item.id == target.model), None)

    def target(self, name: str) -> Target | None:
        """`provider/model` as something to call; None: no such provider."""
        provider, _, model = name.partition("/")
        found = self.get(provider)
        return Target(found, model) if found is not None and model else None

    def listing(self, bare: str) -> list[str]:
        """Every `provider/model` of a usable provider whose model is called so."""
        return [
            f"{provider.name}/{bare}"
            for provider in self.all()
            if provider.usable and any(item.id == bare for item in provider.models())
        ]

    def _providers(self) -> dict[str, Provider]:
        self._sync()
        kinds = self.kinds()
        key = (self._rows, tuple(sorted(kinds)))
        if self._made[0] is None or self._made[0][0] is not key[0] or self._made[0][1] != key[1]:
            self._made = (key, self._make(kinds))
        return self._made[1]

    def _make(self, kinds: Mapping[str, LLMProvider]) -> dict[str, Provider]:
        """The strongest source of each name last."""
        found = self._rows.found
        made: dict[str, Provider | None] = {name: of_preset(name, kinds) for name in PRESETS}
        implicit = [kind for kind in kinds.values() if getattr(kind, "implicit", False)]
        made |= {kind.kind: of_kind(kind, found.get(kind.kind, Found())) for kind in implicit}
        made |= {row.name: of_row(row, kinds, found.get(row.name, Found())) for row in self._rows.providers}
        made |= {name: of_file(name, given, kinds, found.get(name, Found())) for name, given in self._tables.items()}
        return {name: provider for name, provider in made.items() if provider is not None}

    def _sync(self) -> None:
        """Take up what was changed, here or in another process; once a unit."""
        if not in_unit() or self._synced.unit is current():
            return
        self._synced.unit = current()
        stamps = frozenset(
            [("row", name, stamp) for name, stamp in _STAMPS.rows({})]
            + [("found", name, stamp) for name, stamp in _FOUND.rows({})]
        )
        if stamps != self._rows.stamps:
            states = LlmProviderState.select().where(LlmProviderState.stamp.is_null(False))
            self._rows = _Rows(stamps, tuple(LlmProviderRow.select()), {row.name: _found(row) for row in states})


def _found(row: LlmProviderState) -> Found:
    try:
        models = msgspec.convert(row.found_models or [], list[ModelFacts])
    except msgspec.ValidationError as error:  # one provider's list must not take the others down
        log.warning("a stored list of models is left out", extra={"provider": row.name, "detail": str(error)})
        models = []
    return Found(models, row.stamp)
