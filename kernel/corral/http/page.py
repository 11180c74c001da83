"""Pagination of lists: the query parameters, the response, and signed cursors.

With a cursor, reading a late page of a list takes no longer than reading the first page.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec
import peewee

from corral import clock
from corral.auth.principal import Principal
from corral.database.unit import current
from corral.errors import Invalid

T = TypeVar("T")
V = TypeVar("V")

CURSOR_SECONDS = 24 * 3600


class PageQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The base class for the query parameters of every list. Subclasses add filters."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=200)] = 50
    offset: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | msgspec.UnsetType = msgspec.UNSET
    cursor: Annotated[str, msgspec.Meta(max_length=1000)] | msgspec.UnsetType = msgspec.UNSET

    def fingerprint(self) -> str:
        """Return a hash of all filters and the order, but not of the limit and position.

        Cursors are bound to this hash.
        """
        place = ("limit", "offset", "cursor")
        filters = {name: value for name, value in msgspec.to_builtins(self).items() if name not in place}
        return hashlib.sha256(msgspec.json.encode(filters, order="deterministic")).hexdigest()[:16]


class Page(msgspec.Struct, Generic[T], kw_only=True):
    """One page of a list. `next` is the cursor of the next page, or null on the last page.

    `offset` is null if the page was requested with a cursor.
    """

    items: list[T]
    total: int | None
    limit: int
    offset: int | None
    next: str | None


class Order(msgspec.Struct, frozen=True):
    """A column by which a list is ordered. An order's last column must be unique, and no column may contain nulls."""

    field: peewee.Field
    descending: bool = True


def newest_first(model: Any) -> tuple[Order, ...]:
    """Return the descending order `(created_at, id)`, which most lists use."""
    return (Order(model.created_at), Order(model.id))


def write_cursor(scope: str, caller: Principal, fingerprint: str, key: Sequence[Any]) -> str:
    """Return a signed cursor for the position after `key`.

    The cursor is valid for 24 hours, and only for this caller, list and filters.
    """
    expires = int(clock.time_s()) + CURSOR_SECONDS
    payload = msgspec.json.encode([scope, caller.id, fingerprint, expires, list(key)])
    mac = hmac.digest(current().database.cursor_key, payload, "sha256")[:16]
    return base64.urlsafe_b64encode(mac + payload).rstrip(b"=").decode()


def read_cursor(cursor: str, scope: str, caller: Principal, fingerprint: str) -> list[Any]:
    """Return the key that a cursor contains.

    Raise `invalid_cursor` if the cursor was altered, has expired, or was issued for another caller, list or filter.
    """
    try:
        blob = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        mac, payload = blob[:16], blob[16:]
        if not hmac.compare_digest(mac, hmac.digest(current().database.cursor_key, payload, "sha256")[:16]):
            raise ValueError
        bound_scope, bound_caller, bound_print, expires, key = msgspec.json.decode(payload)
    except (ValueError, TypeError, msgspec.DecodeError):
        raise _invalid_cursor("The cursor was altered or comes from another installation.") from None
    if (bound_scope, bound_caller, bound_print) != (scope, caller.id, fingerprint) or expires < clock.time_s():
        raise _invalid_cursor("The cursor belongs to another caller, list or filter, or is older than 24 hours.")
    assert isinstance(key, list)
    return key


def paginate(
    query: peewee.ModelSelect[Any],
    page: PageQuery,
    caller: Principal,
    *,
    scope: str,
    order: Sequence[Order],
    make: Callable[[Any], T],
    total: int | None = None,
) -> Page[T]:
    """Return one page of `query` (models, `.dicts()` or `.namedtuples()`), with each row converted by `make`.

    `query` must already apply filters and visibility. Pass `total` if it is known, to avoid a count query.
    """
    refuse_cursor_with_offset(page)
    fingerprint = page.fingerprint()
    if total is None:
        total = query.count()
    rows_query = query.order_by(*[item.field.desc() if item.descending else item.field.asc() for item in order])
    offset: int | None = None
    if isinstance(page.cursor, str):
        rows_query = rows_query.where(_after(order, read_cursor(page.cursor, scope, caller, fingerprint)))
    else:
        offset = page.offset if isinstance(page.offset, int) else 0
        rows_query = rows_query.offset(offset) if offset else rows_query
    rows = list(rows_query.limit(page.limit + 1))
    following = None
    if len(rows) > page.limit:
        rows.pop()
        following = write_cursor(scope, caller, fingerprint, [_sort_value(rows[-1], item.field) for item in order])
    return Page(items=[make(row) for row in rows], total=total, limit=page.limit, offset=offset, next=following)


def paginate_names(
    found: Sequence[T],
    page: PageQuery,
    caller: Principal,
    *,
    scope: str,
    name: Callable[[T], str],
    make: Callable[[Sequence[T]], list[V]],
) -> Page[V]:
    """Return one page of an in-memory list that is sorted by `name`, which must be unique.

    `make` converts the items of the page.
    """
    refuse_cursor_with_offset(page)
    start, fingerprint = page.offset if isinstance(page.offset, int) else 0, page.fingerprint()
    if isinstance(page.cursor, str):
        (last,) = read_cursor(page.cursor, scope, caller, fingerprint)
        start = next((at for at, item in enumerate(found) if name(item) > last), len(found))
    shown, following = found[start : start + page.limit], None
    if start + page.limit < len(found):
        following = write_cursor(scope, caller, fingerprint, [name(shown[-1])])
    offset = None if isinstance(page.cursor, str) else start
    return Page(items=make(shown), total=len(found), limit=page.limit, offset=offset, next=following)


def refuse_cursor_with_offset(page: PageQuery) -> None:
    """Raise `Invalid` if both `cursor` and `offset` are given."""
    if isinstance(page.cursor, str) and isinstance(page.offset, int):
        raise Invalid.at("/query/offset", "not_allowed", "Send either cursor or offset, not both.")


def _invalid_cursor(detail: str) -> Invalid:
    return Invalid.at("/query/cursor", "bad_format", detail, problem="invalid_cursor")


def _sort_value(row: Any, field: peewee.Field) -> Any:
    return row[field.name] if isinstance(row, dict) else getattr(row, field.name)


def _after(order: Sequence[Order], key: Sequence[Any]) -> Any:
    """Return the condition that a row comes after `key`. Each column has its own direction.

    For two ascending columns, (a, b) comes after (x, y) if a > x, or if a = x and b > y.
    """
    clause: Any = None
    for item, value in reversed(list(zip(order, key, strict=True))):
        beyond = item.field < value if item.descending else item.field > value
        clause = beyond if clause is None else beyond | ((item.field == value) & clause)
    return clause
