"""Determines the price of a call.

Calls to free providers cost nothing. For other calls, the sources are, in this order: the cost that the provider
reported, price overrides, and the built-in table. If `cost.reported_prices` is off, the reported cost is used only if
the other sources have no price.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from corral import clock
from corral.database.engine import Database
from corral.database.statement import Statement
from corral.database.unit import SYSTEM_CONTEXT, after_commit, in_unit
from corral.plugin import Settings
from corral_plugins.cost.api import FREE_PROVIDERS, PriceQuote, TokenCounts
from corral_plugins.cost.models import PriceOverrideRow, PriceRevision
from corral_plugins.cost.service import price_table
from corral_plugins.cost.service.money import cost_of_tokens, to_micro_usd
from corral_plugins.cost.settings import REPORTED_PRICES

REVISION_ID = 1
UNPRICED = PriceQuote(cost_micro_usd=None, price_source=None)
ZERO = PriceQuote(cost_micro_usd=0, price_source="zero")

_REVISION = Statement(
    lambda p: PriceRevision.select(PriceRevision.revision).where(PriceRevision.id == REVISION_ID).tuples()
)


class PriceOverride(NamedTuple):
    """A row of the `cost_prices` table. The fields are the columns of the table."""

    id: str
    version: int
    provider: str
    model: str
    valid_from: str
    input_micro: int
    output_micro: int
    cache_read_micro: int | None
    cache_write_micro: int | None
    call_micro: int

    def matches(self, provider: str, model: str) -> bool:
        """Return whether the patterns of the override match the provider and the model. Case is ignored."""
        return fnmatch.fnmatchcase(provider.lower(), self.provider.lower()) and fnmatch.fnmatchcase(
            model.lower(), self.model.lower()
        )

    @property
    def specificity(self) -> tuple[bool, int, bool, int, str]:
        """The sort key of the override. More specific overrides have larger keys.

        Keys compare the model first, and then the provider. An exact name is more specific than a pattern, and a
        pattern with more literal characters is more specific than one with fewer. Among equally specific overrides, the
        one with the latest `valid_from` has the largest key.
        """
        return (*_specificity(self.model), *_specificity(self.provider), self.valid_from)

    def charge_usage(self, tokens: TokenCounts) -> int:
        """Return the cost of one call in micro-USD."""
        cache_read = self.input_micro if self.cache_read_micro is None else self.cache_read_micro
        cache_write = self.input_micro if self.cache_write_micro is None else self.cache_write_micro
        return self.call_micro + cost_of_tokens(
            (
                (tokens.input_tokens, self.input_micro),
                (tokens.output_tokens, self.output_micro),
                (tokens.cache_read_tokens, cache_read),
                (tokens.cache_write_tokens, cache_write),
            )
        )


def _specificity(pattern: str) -> tuple[bool, int]:
    literals = len(pattern) - pattern.count("*") - pattern.count("?")
    return literals == len(pattern), literals


class PriceOverrideSnapshot:
    """All price overrides as of one revision of the `cost_prices` table. Instances are immutable."""

    def __init__(self, revision: int, overrides: Sequence[PriceOverride]) -> None:
        self.revision = revision
        self._overrides = sorted(overrides, key=lambda override: override.specificity, reverse=True)
        self._cached_matches = functools.lru_cache(maxsize=1024)(self._matches)

    def _matches(self, provider: str, model: str) -> tuple[PriceOverride, ...]:
        return tuple(override for override in self._overrides if override.matches(provider, model))

    def find_override(self, provider: str, model: str, at: str) -> PriceOverride | None:
        """Return the most specific matching override that is valid at an instant, or None if there is none."""
        return next((each for each in self._cached_matches(provider, model) if each.valid_from <= at), None)


class Pricing:
    """Determines the cost of calls.

    Price overrides are cached in memory. Inside a unit of work, the cache is reloaded if an override was changed.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database
        self._overrides = PriceOverrideSnapshot(-1, ())

    def current_overrides(self) -> PriceOverrideSnapshot:
        """Return the price overrides.

        Inside a unit of work, the overrides are current. Outside a unit of work, they are at most 2 seconds old.
        """
        if not in_unit():
            return self._overrides
        row = _REVISION.one({})
        revision = 0 if row is None else int(row[0])
        if revision == self._overrides.revision:
            return self._overrides
        rows: Any = PriceOverrideRow.select(
            *[getattr(PriceOverrideRow, name) for name in PriceOverride._fields]
        ).tuples()
        overrides = PriceOverrideSnapshot(revision, [PriceOverride(*row) for row in rows])
        after_commit(lambda: self._replace_overrides(overrides))
        return overrides

    def _replace_overrides(self, overrides: PriceOverrideSnapshot) -> None:
        if overrides.revision > self._overrides.revision:
            self._overrides = overrides

    async def refresh_overrides(self) -> None:
        """Reload the cached price overrides if another process changed them."""
        self._replace_overrides(await self._database.read(self.current_overrides, SYSTEM_CONTEXT))

    def quote(
        self, provider: str, model: str, tokens: TokenCounts, *, free: bool = False, reported: Decimal | None = None
    ) -> PriceQuote:
        """Return the cost of a call at current prices. `reported` is the cost in USD that the provider reported."""
        if free or provider in FREE_PROVIDERS:
            return ZERO
        quoted = None
        if reported is not None:
            quoted = PriceQuote(cost_micro_usd=to_micro_usd(reported), price_source="reported")
            is_correction = reported < 0
            if is_correction or self._settings.get(REPORTED_PRICES):
                return quoted
        return self._quote_by_price(provider, model, tokens) or quoted or UNPRICED

    def _quote_by_price(self, provider: str, model: str, tokens: TokenCounts) -> PriceQuote | None:
        at = clock.now()
        override = self.current_overrides().find_override(provider, model, at)
        if override is not None:
            version = f"{override.id}@{override.version}"
            return PriceQuote(
                cost_micro_usd=override.charge_usage(tokens), price_source="override", price_version=version
            )
        cost = price_table.charge_by_table(provider, model, tokens, at)
        if cost is None:
            return None
        return PriceQuote(cost_micro_usd=cost, price_source="table", price_version=price_table.price_table_version())


def increment_revision() -> None:
    """Increment the revision of the price overrides, so that every process reloads them.

    Call this function in the unit of work that changes the overrides.
    """
    PriceRevision.insert(id=REVISION_ID, revision=1).on_conflict(
        conflict_target=[PriceRevision.id], update={PriceRevision.revision: PriceRevision.revision + 1}
    ).execute()
