"""The built-in table of prices: genai-prices, offline. It is imported at first use, which takes 0.3 s."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from corral import clock
from corral_plugins.cost.api import Tokens
from corral_plugins.cost.service.money import micro

log = logging.getLogger("corral.cost")

_IDS = uuid.UUID("7d0b6c0e-7f0c-5d4b-9b53-3b0a6c1f5d10")


class Listed(NamedTuple):
    """A price of the table, in USD per 1,000,000 tokens; the lowest tier where there are several. None: not listed."""

    provider: str
    model: str
    input_usd: float | None
    output_usd: float | None
    cache_read_usd: float | None
    cache_write_usd: float | None
    valid_from: str | None

    @property
    def id(self) -> str:
        """The same in every process and version."""
        return str(uuid.uuid5(_IDS, f"{self.provider}/{self.model}"))


@functools.cache
def library() -> Any:
    """The module, imported at first use."""
    import genai_prices
    from genai_prices.data_snapshot import get_snapshot

    get_snapshot()
    return genai_prices


def load() -> None:
    """Have everything ready; takes a moment, so call it in a thread."""
    library()
    listed()


def version() -> str:
    """What the events name as their price's version."""
    return f"genai-prices {library().__version__}"


def charge(provider: str, model: str, tokens: Tokens, at: str) -> int | None:
    """Micro-USD of a call; None when the table has no price for something that was used."""
    found = _find(provider, model)
    if found is None:
        return None
    # The library's input tokens include those of the cache.
    whole = tokens.input_tokens + tokens.cache_read_tokens + tokens.cache_write_tokens
    usage = library().Usage(
        input_tokens=whole,
        output_tokens=tokens.output_tokens,
        cache_read_tokens=tokens.cache_read_tokens,
        cache_write_tokens=tokens.cache_write_tokens,
    )
    try:
        calculated = found[1].calc_price(usage, found[0], genai_request_timestamp=_moment(at))
    except ValueError:  # what was spent is recorded whatever the table makes of it
        log.warning("the price table refused a use", exc_info=True, extra={"provider": provider, "model": model})
        return None
    prices = calculated.model_price
    if (whole and prices.input_mtok is None) or (tokens.output_tokens and prices.output_mtok is None):
        return None
    return micro(calculated.total_price)


def lookup(provider: str, model: str, at: str) -> Listed | None:
    """The price that `charge` would take."""
    found = _find(provider, model)
    listed = None if found is None else _listed(found[0].id, found[1], at)
    return None if listed is None else listed._replace(provider=provider, model=model)


@functools.cache
def listed() -> tuple[Listed, ...]:
    """The whole table, by provider and model."""
    from genai_prices.data_snapshot import get_snapshot

    at = clock.now()
    rows = (_listed(provider.id, model, at) for provider in get_snapshot().providers for model in provider.models)
    return tuple(sorted((row for row in rows if row is not None), key=lambda row: row[:2]))


@functools.lru_cache(maxsize=4096)
def _find(provider: str, model: str) -> tuple[Any, Any] | None:
    """The table's provider and model; a miss is remembered too. Only the named provider is asked: the same model of
    somebody else has another price.
    """
    library()
    from genai_prices.data_snapshot import get_snapshot

    try:
        pair: tuple[Any, Any] = get_snapshot().find_provider_model(model, None, provider, None)
    except LookupError:
        return None
    return pair


def _listed(provider: str, model: Any, at: str) -> Listed | None:
    prices = model.get_prices(_moment(at))
    if prices.input_mtok is None and prices.output_mtok is None:
        return None
    return Listed(
        provider,
        model.id,
        _base(prices.input_mtok),
        _base(prices.output_mtok),
        _base(prices.cache_read_mtok),
        _base(prices.cache_write_mtok),
        _since(model.prices, at),
    )


def _base(price: Any) -> float | None:
    """A price, or the lowest tier of one that depends on the length of the request."""
    return None if price is None else float(getattr(price, "base", price))


def _since(prices: Any, at: str) -> str | None:
    """When the price that holds `at` began, if the table tells."""
    conditional: Iterable[Any] = reversed(prices) if isinstance(prices, list) else ()
    for item in conditional:
        start = getattr(item.constraint, "start_date", None)
        if start is not None and item.constraint.active(_moment(at)):
            return clock.from_datetime(datetime(start.year, start.month, start.day, tzinfo=UTC))
    return None


def _moment(at: str) -> datetime:
    return datetime.fromisoformat(at)
