"""The prices that people see and admins set."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, NotFound, TooMany
from corral.http.answers import IfMatch
from corral.http.page import Page, check_place, read_cursor, write_cursor
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_plugins.cost.api import FREE_PROVIDERS
from corral_plugins.cost.models import Price
from corral_plugins.cost.service import table
from corral_plugins.cost.service.money import micro, usd
from corral_plugins.cost.service.pricing import Prices, changed
from corral_plugins.cost.shapes import FoundPrice, LookupQuery, NewPrice, PriceChange, PriceQuery, PriceView

SCOPE = "cost.prices"
MAX_PRICES = 1000
SECOND = "There is a price for this provider and model from this instant on; change that one."
_MONEY = {
    "input_usd": "input_micro",
    "output_usd": "output_micro",
    "cache_read_usd": "cache_read_micro",
    "cache_write_usd": "cache_write_micro",
    "per_call_usd": "call_micro",
}
TOLD = ("provider", "model", "valid_from", *_MONEY.values())
"""What the audit log is told of a price."""


class PriceList:
    """Joins the caller's unit. The only writer of `cost_prices`."""

    audit: Audit | None = None

    def __init__(self, prices: Prices) -> None:
        self._prices = prices

    def page(self, query: PriceQuery, by: Principal) -> Page[PriceView]:
        """Overrides, the newest first, then the built-in ones by name."""
        check_place(query)
        start = query.offset if isinstance(query.offset, int) else 0
        found = [view for view in self._all(query) if _fits(view, query)]
        if isinstance(query.cursor, str):
            start = _after(found, *read_cursor(query.cursor, SCOPE, by, query.fingerprint()))
        end, following = start + query.limit, None
        if end < len(found):
            last = found[end - 1]
            following = write_cursor(SCOPE, by, query.fingerprint(), [last.source, last.id])
        offset = None if isinstance(query.cursor, str) else start
        return Page(items=found[start:end], total=len(found), limit=query.limit, offset=offset, next=following)

    @staticmethod
    def _all(query: PriceQuery) -> list[PriceView]:
        views = []
        if query.source != "builtin":
            views += [_view(row) for row in Price.select().order_by(Price.created_at.desc(), Price.id.desc())]
        if query.source != "override":
            views += _built_in_views()
        return views

    def create(self, new: NewPrice) -> PriceView:
        """Add a price; `Conflict(duplicate)` for the same patterns from the same instant, `TooMany(quota_exceeded)`."""
        now = clock.now()
        row: dict[str, Any] = {
            "id": new_id(),
            "version": 1,
            "created_at": now,
            "updated_at": now,
            "provider": new.provider,
            "model": new.model,
            "valid_from": now if new.valid_from is None else clock.from_datetime(new.valid_from),
            **_money(new),
        }
        self._refuse_second(row)
        if Price.select().count() >= MAX_PRICES:
            raise TooMany(f"There are {MAX_PRICES} prices already; delete some first.", code="quota_exceeded")
        if not list(Price.insert(**row).on_conflict_ignore().returning(Price.id).tuples().execute()):
            self._refuse_second(row)  # another admin wrote it in this moment
            raise Conflict(SECOND, code="duplicate")
        changed()
        self._record("create", row, {name: (None, row[name]) for name in TOLD})
        return _view(Price(**row))

    def change(self, price_id: str, change: PriceChange, match: IfMatch) -> PriceView:
        """Change a price from now on; events keep what they were charged."""
        row = self._found(price_id)
        match.check(row.version)
        changes: dict[str, Any] = _money(change)
        changes |= {name: each for name in ("provider", "model") if isinstance(each := getattr(change, name), str)}
        if change.valid_from is not msgspec.UNSET:
            changes["valid_from"] = clock.from_datetime(change.valid_from)
        if not changes:
            return _view(row)
        self._refuse_second({**row.__data__, **changes})
        changes |= {"version": row.version + 1, "updated_at": clock.now()}
        guard = (Price.id == price_id) & (Price.version == row.version)
        try:
            written = Price.update(**changes).where(guard).execute()
        except peewee.IntegrityError:  # another admin wrote it in this moment
            raise Conflict(SECOND, code="duplicate") from None
        if not written:
            raise Conflict("The price was changed by someone else meanwhile; read it again.")
        changed()
        self._record(
            "update", row.__data__, {name: (getattr(row, name), each) for name, each in changes.items() if name in TOLD}
        )
        return _view(self._found(price_id))

    def delete(self, price_id: str, match: IfMatch) -> None:
        """The built-in price, if there is one, holds again."""
        row = self._found(price_id)
        match.check(row.version)
        if not Price.delete().where((Price.id == price_id) & (Price.version == row.version)).execute():
            raise Conflict("The price was changed by someone else meanwhile; read it again.")
        changed()
        self._record("delete", row.__data__, {name: (getattr(row, name), None) for name in TOLD})

    def lookup(self, query: LookupQuery) -> FoundPrice:
        """The price that holds for a model at an instant."""
        at = clock.now() if query.at is msgspec.UNSET else clock.from_datetime(query.at)
        if query.provider in FREE_PROVIDERS:
            return FoundPrice(priced=True, price_source="zero", input_usd=0, output_usd=0, per_call_usd=0)
        override = self._prices.book().find(query.provider, query.model, at)
        if override is not None:
            view = _view(Price(**override._asdict()))
            return _found(view, "override", f"{override.id}@{override.version}", override.id)
        listed = table.lookup(query.provider, query.model, at)
        return FoundPrice(priced=False) if listed is None else _found(_built_in(listed), "table", table.version(), None)

    def _record(self, verb: str, row: Mapping[str, Any], changes: Mapping[str, tuple[Any, Any]]) -> None:
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
    def _found(price_id: str) -> Price:
        row: Price | None = Price.get_or_none(Price.id == price_id)
        if row is None:
            raise NotFound("There is no price of yours with this id; built-in ones are overridden, not changed.")
        return row

    @staticmethod
    def _refuse_second(row: dict[str, Any]) -> None:
        same = [getattr(Price, name) == row[name] for name in ("provider", "model", "valid_from")]
        other = Price.select(Price.id).where(*same, Price.id != row["id"]).first()
        if other is not None:
            raise Conflict(SECOND, code="duplicate", existing_id=other.id)


def _after(found: Sequence[PriceView], source: str, last: str) -> int:
    """The place after a price that was shown: it may be gone by now, and newer ones may stand before it."""
    if source == "override":
        return next((at for at, view in enumerate(found) if view.source != source or str(view.id) < last), len(found))
    return next((at + 1 for at, view in enumerate(found) if view.id == last), len(found))


def _money(given: NewPrice | PriceChange) -> dict[str, int | None]:
    """Columns of the prices that were given."""
    values = {name: getattr(given, name) for name in _MONEY}
    return {
        _MONEY[name]: None if value is None else micro(value)
        for name, value in values.items()
        if value is not msgspec.UNSET
    }


def _view(row: Price) -> PriceView:
    return PriceView(
        id=row.id,
        version=row.version,
        provider=row.provider,
        model=row.model,
        valid_from=row.valid_from,
        source="override",
        input_usd=usd(row.input_micro),
        output_usd=usd(row.output_micro),
        cache_read_usd=_usd(row.cache_read_micro),
        cache_write_usd=_usd(row.cache_write_micro),
        per_call_usd=usd(row.call_micro),
    )


def _usd(micro_usd: int | None) -> float | None:
    return None if micro_usd is None else usd(micro_usd)


@functools.cache
def _built_in_views() -> tuple[PriceView, ...]:
    return tuple(_built_in(row) for row in table.listed())


def _built_in(row: table.Listed) -> PriceView:
    return PriceView(id=row.id, version=0, source="builtin", per_call_usd=0, **row._asdict())


def _fits(view: PriceView, query: PriceQuery) -> bool:
    return query.provider.lower() in view.provider.lower() and query.model.lower() in view.model.lower()


def _found(view: PriceView, source: str, version: str, price_id: str | None) -> FoundPrice:
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
