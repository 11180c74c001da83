"""Price overrides. Admins set them; all users who may read costs can list and look up prices."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, Invalid, NotFound, TooMany
from corral.http.answers import IfMatch
from corral.http.page import Page, read_cursor, refuse_cursor_with_offset, write_cursor
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_plugins.cost.api import FREE_PROVIDERS
from corral_plugins.cost.models import PriceOverrideRow
from corral_plugins.cost.service import price_table
from corral_plugins.cost.service.money import to_micro_usd, to_usd
from corral_plugins.cost.service.pricing import Pricing, increment_revision
from corral_plugins.cost.shapes import FoundPrice, LookupQuery, NewPrice, PriceChange, PriceQuery, PriceView

SCOPE = "cost.prices"
MAX_PRICES = 1000
DUPLICATE = "There is already a price for this provider and model that applies from this time; change that price."
CHANGED = "The price was changed in the meantime; fetch it again and repeat the change."
_MONEY_COLUMNS = {
    "input_usd": "input_micro",
    "output_usd": "output_micro",
    "cache_read_usd": "cache_read_micro",
    "cache_write_usd": "cache_write_micro",
    "per_call_usd": "call_micro",
}
AUDITED = ("provider", "model", "valid_from", *_MONEY_COLUMNS.values())


class PriceOverrides:
    """Manages price overrides. No other class writes to the `cost_prices` table.

    Every method runs in the caller's unit of work.
    """

    audit: Audit | None = None

    def __init__(self, pricing: Pricing) -> None:
        self._pricing = pricing

    def list_prices(self, query: PriceQuery, by: Principal) -> Page[PriceView]:
        """Return a page of overrides, newest first, followed by the built-in prices sorted by name."""
        refuse_cursor_with_offset(query)
        start = query.offset if isinstance(query.offset, int) else 0
        prices = [view for view in self._all_prices(query) if _matches_query(view, query)]
        if isinstance(query.cursor, str):
            start = _index_after(prices, *read_cursor(query.cursor, SCOPE, by, query.fingerprint()))
        end, following = start + query.limit, None
        if end < len(prices):
            last = prices[end - 1]
            following = write_cursor(SCOPE, by, query.fingerprint(), [last.source, last.id])
        offset = None if isinstance(query.cursor, str) else start
        return Page(items=prices[start:end], total=len(prices), limit=query.limit, offset=offset, next=following)

    @staticmethod
    def _all_prices(query: PriceQuery) -> list[PriceView]:
        views = []
        if query.source != "builtin":
            views += [
                _price_view(row)
                for row in PriceOverrideRow.select().order_by(
                    PriceOverrideRow.created_at.desc(), PriceOverrideRow.id.desc()
                )
            ]
        if query.source != "override":
            views += _builtin_views(price_table.price_table_version())
        return views

    def create(self, new: NewPrice) -> PriceView:
        """Create a price override.

        Raises a `Problem` with the code `duplicate` if the same patterns already have a price that is valid from the
        same instant, or with the code `quota_exceeded` if there are too many prices.
        """
        _refuse_free_provider(new.provider)
        now = clock.now()
        row: dict[str, Any] = {
            "id": new_id(),
            "version": 1,
            "created_at": now,
            "updated_at": now,
            "provider": new.provider,
            "model": new.model,
            "valid_from": now if new.valid_from is None else clock.from_datetime(new.valid_from),
            **_money_columns(new),
        }
        self._refuse_duplicate(row)
        if PriceOverrideRow.select().count() >= MAX_PRICES:
            raise TooMany(f"The limit of {MAX_PRICES} prices is reached; delete some first.", code="quota_exceeded")
        if not list(
            PriceOverrideRow.insert(**row).on_conflict_ignore().returning(PriceOverrideRow.id).tuples().execute()
        ):
            self._refuse_duplicate(row)  # another admin wrote the price at the same moment
            raise Conflict(DUPLICATE, code="duplicate")
        increment_revision()
        self._record_audit("create", row, {name: (None, row[name]) for name in AUDITED})
        return _price_view(PriceOverrideRow(**row))

    def change(self, price_id: str, change: PriceChange, match: IfMatch) -> PriceView:
        """Change a price override. Existing cost events keep their cost.

        Raise `Conflict` if the same patterns already have a price that is valid from the same instant (`duplicate`), or
        if the override was changed concurrently.
        """
        row = self._get_override(price_id)
        match.check(row.version)
        changes: dict[str, Any] = _money_columns(change)
        changes |= {name: value for name in ("provider", "model") if isinstance(value := getattr(change, name), str)}
        _refuse_free_provider(changes.get("provider", ""))
        if change.valid_from is not msgspec.UNSET:
            changes["valid_from"] = clock.from_datetime(change.valid_from)
        if not changes:
            return _price_view(row)
        self._refuse_duplicate({**row.__data__, **changes})
        audited = {name: (getattr(row, name), value) for name, value in changes.items()}
        changes |= {"version": row.version + 1, "updated_at": clock.now()}
        unchanged = (PriceOverrideRow.id == price_id) & (PriceOverrideRow.version == row.version)
        try:
            updated = PriceOverrideRow.update(**changes).where(unchanged).execute()
        except peewee.IntegrityError:  # another admin wrote the price at the same moment
            raise Conflict(DUPLICATE, code="duplicate") from None
        if not updated:
            raise Conflict(CHANGED)
        increment_revision()
        self._record_audit("update", row.__data__, audited)
        return _price_view(self._get_override(price_id))

    def delete(self, price_id: str, match: IfMatch) -> None:
        """Delete a price override. The built-in price, if any, applies again.

        Raise `NotFound` if there is no such override, and `Conflict` if it was changed concurrently.
        """
        row = self._get_override(price_id)
        match.check(row.version)
        if (
            not PriceOverrideRow.delete()
            .where((PriceOverrideRow.id == price_id) & (PriceOverrideRow.version == row.version))
            .execute()
        ):
            raise Conflict(CHANGED)
        increment_revision()
        self._record_audit("delete", row.__data__, {name: (getattr(row, name), None) for name in AUDITED})

    def look_up(self, query: LookupQuery) -> FoundPrice:
        """Return the price of a model at a given instant, from an override or the built-in table."""
        at = clock.now() if query.at is msgspec.UNSET else clock.from_datetime(query.at)
        if query.provider in FREE_PROVIDERS:
            return FoundPrice(priced=True, price_source="zero", input_usd=0, output_usd=0, per_call_usd=0)
        override = self._pricing.current_overrides().find_override(query.provider, query.model, at)
        if override is not None:
            view = _price_view(PriceOverrideRow(**override._asdict()))
            return _found_price(view, "override", f"{override.id}@{override.version}", override.id)
        price = price_table.look_up_price(query.provider, query.model, at)
        if price is None:
            return FoundPrice(priced=False)
        return _found_price(_builtin_view(price), "table", price_table.price_table_version(), None)

    def _record_audit(self, verb: str, row: Mapping[str, Any], changes: Mapping[str, tuple[Any, Any]]) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"cost.price.{verb}",
                object_type="price",
                object_id=row["id"],
                object_name=f"{row['provider']}/{row['model']}",
                changes=changes,
            )
            self.audit.record(entry)

    @staticmethod
    def _get_override(price_id: str) -> PriceOverrideRow:
        row: PriceOverrideRow | None = PriceOverrideRow.get_or_none(PriceOverrideRow.id == price_id)
        if row is None:
            raise NotFound("There is no price override with this id. To change a built-in price, create an override.")
        return row

    @staticmethod
    def _refuse_duplicate(row: dict[str, Any]) -> None:
        same = [getattr(PriceOverrideRow, name) == row[name] for name in ("provider", "model", "valid_from")]
        other = PriceOverrideRow.select(PriceOverrideRow.id).where(*same, PriceOverrideRow.id != row["id"]).first()
        if other is not None:
            raise Conflict(DUPLICATE, code="duplicate", existing_id=other.id)


def _refuse_free_provider(provider: str) -> None:
    """Raise `Invalid` for a provider that never costs anything, because its price would have no effect."""
    if provider.lower() in FREE_PROVIDERS:
        detail = f"The provider {provider} never costs anything, so a price would have no effect."
        raise Invalid.at("/provider", "not_allowed", detail)


def _index_after(prices: Sequence[PriceView], source: str, last: str) -> int:
    """Return the index at which the next page starts, after the price `last` of the previous page.

    The price `last` may have been deleted since then, and newer prices may have been added before it.
    """
    if source == "override":
        return next((n for n, view in enumerate(prices) if view.source != source or str(view.id) < last), len(prices))
    return next((n + 1 for n, view in enumerate(prices) if view.id == last), len(prices))


def _money_columns(body: NewPrice | PriceChange) -> dict[str, int | None]:
    values = {name: getattr(body, name) for name in _MONEY_COLUMNS}
    return {
        _MONEY_COLUMNS[name]: None if value is None else to_micro_usd(value)
        for name, value in values.items()
        if value is not msgspec.UNSET
    }


def _price_view(row: PriceOverrideRow) -> PriceView:
    return PriceView(
        id=row.id,
        version=row.version,
        provider=row.provider,
        model=row.model,
        valid_from=row.valid_from,
        source="override",
        input_usd=to_usd(row.input_micro),
        output_usd=to_usd(row.output_micro),
        cache_read_usd=None if row.cache_read_micro is None else to_usd(row.cache_read_micro),
        cache_write_usd=None if row.cache_write_micro is None else to_usd(row.cache_write_micro),
        per_call_usd=to_usd(row.call_micro),
    )


@functools.lru_cache(maxsize=1)
def _builtin_views(version: str) -> tuple[PriceView, ...]:
    """Return the views of all prices in this version of the built-in table."""
    return tuple(_builtin_view(price) for price in price_table.all_prices())


def _builtin_view(price: price_table.TablePrice) -> PriceView:
    return PriceView(id=price.id, version=0, source="builtin", per_call_usd=0, **price._asdict())


def _matches_query(view: PriceView, query: PriceQuery) -> bool:
    return query.provider.lower() in view.provider.lower() and query.model.lower() in view.model.lower()


def _found_price(view: PriceView, source: str, version: str, price_id: str | None) -> FoundPrice:
    return FoundPrice(
        priced=True,
        price_source=source,
        price_version=version,
        price_id=price_id,
        input_usd=view.input_usd,
        output_usd=view.output_usd,
        cache_read_usd=view.cache_read_usd,
        cache_write_usd=view.cache_write_usd,
        per_call_usd=view.per_call_usd,
        valid_from=view.valid_from,
    )
