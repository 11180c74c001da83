"""What a use costs: free providers first, then what the provider reports, an admin's price, the built-in table."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from corral import clock
from corral.database.engine import Work
from corral.database.statement import Statement
from corral.database.unit import after_commit, in_unit
from corral.plugin import Settings
from corral_plugins.cost.api import FREE_PROVIDERS, Quote, Tokens
from corral_plugins.cost.models import Price, PriceEdition
from corral_plugins.cost.service import table
from corral_plugins.cost.service.money import micro, per_million
from corral_plugins.cost.settings import REPORTED_PRICES

EDITION = 1
UNPRICED = Quote(cost_micro_usd=None, priced=False, price_source=None)
ZERO = Quote(cost_micro_usd=0, priced=True, price_source="zero")

_EDITION = Statement(lambda p: PriceEdition.select(PriceEdition.n).where(PriceEdition.id == p("id")).tuples())


class Override(NamedTuple):
    """A row of `cost_prices`; the fields are columns, in this order."""

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
        """Whether both globs do; case does not count."""
        return fnmatch.fnmatchcase(provider.lower(), self.provider.lower()) and fnmatch.fnmatchcase(
            model.lower(), self.model.lower()
        )

    @property
    def specificity(self) -> tuple[bool, int, bool, int, str]:
        """The model counts before the provider, a name before a glob, more letters before fewer, then the newest."""
        return (*_precision(self.model), *_precision(self.provider), self.valid_from)

    def charge(self, tokens: Tokens) -> int:
        """Micro-USD of one call."""
        cache_read = self.input_micro if self.cache_read_micro is None else self.cache_read_micro
        cache_write = self.input_micro if self.cache_write_micro is None else self.cache_write_micro
        return self.call_micro + per_million(
            (
                (tokens.input_tokens, self.input_micro),
                (tokens.output_tokens, self.output_micro),
                (tokens.cache_read_tokens, cache_read),
                (tokens.cache_write_tokens, cache_write),
            )
        )


def _precision(glob: str) -> tuple[bool, int]:
    letters = len(glob) - glob.count("*") - glob.count("?")
    return letters == len(glob), letters


class Book:
    """The overrides of one edition; never changed."""

    def __init__(self, edition: int, rows: Sequence[Override]) -> None:
        self.edition = edition
        self._rows = sorted(rows, key=lambda row: row.specificity, reverse=True)
        self._of = functools.lru_cache(maxsize=1024)(self._matching)

    def _matching(self, provider: str, model: str) -> tuple[Override, ...]:
        return tuple(row for row in self._rows if row.matches(provider, model))

    def find(self, provider: str, model: str, at: str) -> Override | None:
        """The most specific one that holds at an instant."""
        return next((row for row in self._of(provider, model) if row.valid_from <= at), None)


class Prices:
    """Knows every price. The overrides are a copy in memory, as new as the row that counts their changes."""

    def __init__(self, settings: Settings, work: Work) -> None:
        self._settings, self._work = settings, work
        self._book = Book(-1, ())

    def book(self) -> Book:
        """The overrides: inside a unit those of this moment, outside it those of at most 2 s ago."""
        if not in_unit():
            return self._book
        edition = _edition()
        if edition == self._book.edition:
            return self._book
        rows: Any = Price.select(*[getattr(Price, name) for name in Override._fields]).tuples()
        book = Book(edition, [Override(*row) for row in rows])
        after_commit(lambda: self._adopt(book))
        return book

    def _adopt(self, book: Book) -> None:
        if book.edition > self._book.edition:
            self._book = book

    async def refresh(self) -> None:
        """Take over what another process changed."""
        self._adopt(await self._work(self.book, read=True))

    def quote(
        self, provider: str, model: str, tokens: Tokens, *, free: bool = False, reported: Decimal | None = None
    ) -> Quote:
        """What a use costs now."""
        at = clock.now()
        if free or provider in FREE_PROVIDERS:
            return ZERO
        told = None if reported is None else Quote(cost_micro_usd=micro(reported), priced=True, price_source="reported")
        if told is not None and (self._settings.get(REPORTED_PRICES) or is_correction(reported)):
            return told
        return self._by_price(provider, model, tokens, at) or told or UNPRICED

    def _by_price(self, provider: str, model: str, tokens: Tokens, at: str) -> Quote | None:
        override = self.book().find(provider, model, at)
        if override is not None:
            named = f"{override.id}@{override.version}"
            return Quote(
                cost_micro_usd=override.charge(tokens), priced=True, price_source="override", price_version=named
            )
        charged = table.charge(provider, model, tokens, at)
        if charged is None:
            return None
        return Quote(cost_micro_usd=charged, priced=True, price_source="table", price_version=table.version())


def is_correction(reported: Decimal | None) -> bool:
    """Whether the amount takes back what was charged before."""
    return reported is not None and reported < 0


def changed() -> None:
    """Tell every process that the overrides are others now; in the unit that changes them."""
    PriceEdition.insert(id=EDITION, n=1).on_conflict(
        conflict_target=[PriceEdition.id], update={PriceEdition.n: PriceEdition.n + 1}
    ).execute()


def _edition() -> int:
    found = _EDITION.one({"id": EDITION})
    return 0 if found is None else int(found[0])
