"""The built-in price table: the table of the package genai-prices, or a newer one fetched by `price_updates`.

Network access is needed only if the setting `cost.update_prices` is on. The package is imported on first use, because
the import takes 0.3 seconds.
"""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from corral import clock
from corral_plugins.cost.api import TokenCounts
from corral_plugins.cost.service.money import to_micro_usd

log = logging.getLogger("corral.cost")

_fetched: str | None = None  # the version of the fetched table that is in use

_ID_NAMESPACE = uuid.UUID("7d0b6c0e-7f0c-5d4b-9b53-3b0a6c1f5d10")


class TablePrice(NamedTuple):
    """The built-in price of a model in USD per 1,000,000 tokens.

    If the price depends on the length of the request, the price of the lowest tier is used. A price is None if the
    table does not contain it.
    """

    provider: str
    model: str
    input_usd: float | None
    output_usd: float | None
    cache_read_usd: float | None
    cache_write_usd: float | None
    valid_from: str | None

    @property
    def id(self) -> str:
        """The id of the price, which is the same in every process and in every version of the table."""
        return str(uuid.uuid5(_ID_NAMESPACE, f"{self.provider}/{self.model}"))


def _genai_prices() -> Any:
    import genai_prices

    return genai_prices


def _prices_snapshot() -> Any:
    from genai_prices.data_snapshot import get_snapshot

    return get_snapshot()


def load_price_table() -> None:
    """Import the package genai-prices and build the list of prices. The function blocks, so call it in a thread."""
    all_prices()


def price_table_version() -> str:
    """Return the `price_version` of cost events that are priced with the current table."""
    return _fetched or f"genai-prices {_genai_prices().__version__}"


def update_url() -> str:
    """Return the URL of the newest table."""
    from genai_prices.update_prices import DEFAULT_UPDATE_URL

    return str(DEFAULT_UPDATE_URL)


def parse_providers(raw: Any) -> list[Any]:
    """Return the providers in a fetched table. Raise `ValueError` if the table does not have the expected format."""
    from genai_prices.types import _providers_from_raw  # as `genai_prices.UpdatePrices`, which fetches by itself

    return list(_providers_from_raw(raw))


def use_providers(providers: Sequence[Any] | None, fetched_at: str | None) -> None:
    """Use the providers of a fetched table from now on, or those of the installed package if `providers` is None."""
    global _fetched
    from genai_prices.data_snapshot import DataSnapshot, set_custom_snapshot

    set_custom_snapshot(None if providers is None else DataSnapshot(list(providers), from_auto_update=True))
    _fetched = None if fetched_at is None else f"genai-prices of {fetched_at}"


def charge_by_table(provider: str, model: str, tokens: TokenCounts, at: str) -> int | None:
    """Return the cost of a call in micro-USD, or None if the table lacks a price for tokens that were used."""
    entry = _find_model(provider, model)
    if entry is None:
        return None
    table_provider, table_model = entry
    # The library's input tokens include cache tokens.
    input_tokens = tokens.input_tokens + tokens.cache_read_tokens + tokens.cache_write_tokens
    usage = _genai_prices().Usage(
        input_tokens=input_tokens,
        output_tokens=tokens.output_tokens,
        cache_read_tokens=tokens.cache_read_tokens,
        cache_write_tokens=tokens.cache_write_tokens,
    )
    try:
        calculated = table_model.calc_price(usage, table_provider, genai_request_timestamp=_datetime(at))
    except ValueError:  # a use is recorded even if the table cannot price it
        log.warning("price table failed", exc_info=True, extra={"provider": provider, "model": model})
        return None
    prices = calculated.model_price
    if (input_tokens and prices.input_mtok is None) or (tokens.output_tokens and prices.output_mtok is None):
        return None
    return to_micro_usd(calculated.total_price)


def look_up_price(provider: str, model: str, at: str) -> TablePrice | None:
    """Return the built-in price that `charge_by_table` would apply, or None if the table has no price for the model."""
    entry = _find_model(provider, model)
    price = None if entry is None else _table_price(entry[0].id, entry[1], at)
    return None if price is None else price._replace(provider=provider, model=model)


def all_prices() -> tuple[TablePrice, ...]:
    """Return all prices of the table, sorted by provider and model."""
    return _all_prices(price_table_version())


@functools.lru_cache(maxsize=1)
def _all_prices(version: str) -> tuple[TablePrice, ...]:
    at = clock.now()
    rows = (
        _table_price(provider.id, model, at) for provider in _prices_snapshot().providers for model in provider.models
    )
    return tuple(sorted((row for row in rows if row is not None), key=lambda row: row[:2]))


def _find_model(provider: str, model: str) -> tuple[Any, Any] | None:
    return _find_model_in(price_table_version(), provider, model)


@functools.lru_cache(maxsize=4096)
def _find_model_in(version: str, provider: str, model: str) -> tuple[Any, Any] | None:
    """Return the genai-prices objects for the provider and the model, or None if the table does not contain them.

    Only the named provider is searched, because other providers charge different prices for the same model. Failed
    lookups are cached too.
    """
    try:
        entry: tuple[Any, Any] = _prices_snapshot().find_provider_model(model, None, provider, None)
    except LookupError:
        return None
    return entry


def _table_price(provider: str, model: Any, at: str) -> TablePrice | None:
    prices = model.get_prices(_datetime(at))
    if prices.input_mtok is None and prices.output_mtok is None:
        return None
    return TablePrice(
        provider,
        model.id,
        _lowest_tier(prices.input_mtok),
        _lowest_tier(prices.output_mtok),
        _lowest_tier(prices.cache_read_mtok),
        _lowest_tier(prices.cache_write_mtok),
        _valid_from(model.prices, at),
    )


def _lowest_tier(price: Any) -> float | None:
    """Return a price from the table as a number, or None if there is no price.

    If the price has tiers, the lowest tier is used, which applies to short requests.
    """
    return None if price is None else float(getattr(price, "base", price))


def _valid_from(prices: Any, at: str) -> str | None:
    """Return the start of the period in which the price at the instant `at` applies.

    Return None if the table does not state the start.
    """
    conditional: Iterable[Any] = reversed(prices) if isinstance(prices, list) else ()
    for item in conditional:
        start = getattr(item.constraint, "start_date", None)
        if start is not None and item.constraint.active(_datetime(at)):
            return clock.from_datetime(datetime(start.year, start.month, start.day, tzinfo=UTC))
    return None


def _datetime(at: str) -> datetime:
    return datetime.fromisoformat(at)
