"""Lists secrets, their versions and expiring secrets, and counts secrets by status.

Stored and pinned secrets are merged into one list, sorted by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import peewee
from msgspec import UNSET

from corral.auth.principal import Principal
from corral.database.dialect import by_code_point
from corral.http.page import Order, Page, PageQuery, paginate, read_cursor, refuse_cursor_with_offset, write_cursor
from corral.plugin import Settings
from corral_plugins.secrets.models import SecretRow, SecretVersion
from corral_plugins.secrets.service import rows
from corral_plugins.secrets.service.pinned_secrets import PinnedSecret, PinnedSecrets
from corral_plugins.secrets.settings import MAX_VERSIONS, REMINDER_DAYS
from corral_plugins.secrets.shapes import ExpiringQuery, SecretQuery, SecretView, Status, VersionView

SCOPE = "secrets"


class SecretListing:
    """The read operations of the vault. All methods run in the caller's unit of work."""

    def __init__(self, pinned_secrets: PinnedSecrets, settings: Settings) -> None:
        self._pinned_secrets, self._settings = pinned_secrets, settings

    def get_secret(self, id: str) -> tuple[SecretView, int]:
        """Return a secret and its revision, which is used for the ETag. Deleted secrets are found too.

        Raise `NotFound` if no secret has this id.
        """
        pinned = self._pinned_secrets.find_by_id(id)
        if pinned is not None:
            return self._views_of([pinned])[0], 1
        return self.view_of_row(rows.get_secret_row(id, deleted=True))

    def view_of_row(self, row: SecretRow) -> tuple[SecretView, int]:
        """Return the response body of a stored secret, and its revision for the ETag."""
        return self._views_of([row])[0], row.revision

    def list_secrets(self, query: SecretQuery, by: Principal) -> Page[SecretView]:
        """Return a page of secrets, sorted by name. Pinned secrets hide stored secrets with the same name."""
        refuse_cursor_with_offset(query)
        pinned = [item for item in self._pinned_secrets.all_secrets() if _pinned_matches(item, query)]
        stored = self._filter_rows(query)
        total = stored.count() + len(pinned)
        name = by_code_point(SecretRow.name_key)
        order = (name, SecretRow.id)
        if isinstance(query.cursor, str):
            after = tuple(read_cursor(query.cursor, SCOPE, by, query.fingerprint()))
            following = (name > after[0]) | ((SecretRow.name_key == after[0]) & (SecretRow.id > after[1]))
            found: list[Any] = list(stored.where(following).order_by(*order).limit(query.limit + 1))
            merged = _merge_sorted(found, [item for item in pinned if (item.key, item.id) > after])
            offset, window = None, merged[: query.limit + 1]
        else:
            offset = query.offset if isinstance(query.offset, int) else 0
            # All pinned secrets may precede the page, so the query starts earlier by the number of pinned secrets.
            skipped = max(0, offset - len(pinned))
            found = list(
                stored.order_by(*order).offset(skipped).limit(query.limit + 1 + offset - skipped + len(pinned))
            )
            before = [item for item in pinned if found and skipped and item.key < found[0].name_key]
            merged = _merge_sorted(found, pinned[len(before) :] if found or not skipped else [])
            start = offset - skipped - len(before)
            window = merged[start : start + query.limit + 1]
        shown = window[: query.limit]
        more = len(window) > query.limit
        following_cursor = write_cursor(SCOPE, by, query.fingerprint(), _sort_key(shown[-1])) if more else None
        return Page(items=self._views_of(shown), total=total, limit=query.limit, offset=offset, next=following_cursor)

    def list_expiring(self, query: ExpiringQuery, by: Principal) -> Page[SecretView]:
        """Return a page of secrets that have expired or will expire within `days` days, earliest expiry first."""
        soon = SecretRow.deleted_at.is_null() & (SecretRow.expires_at <= rows.reminder_period_end([query.days]))
        found: Page[Any] = paginate(
            SecretRow.select().where(SecretRow.expires_at.is_null(False) & soon),
            query,
            by,
            scope="secrets.expiring",
            order=(Order(SecretRow.expires_at, descending=False), Order(SecretRow.id, descending=False)),
            make=lambda row: row,
        )
        return Page(
            items=self._views_of(found.items),
            total=found.total,
            limit=found.limit,
            offset=found.offset,
            next=found.next,
        )

    def list_versions(self, id: str, query: PageQuery, by: Principal) -> Page[VersionView]:
        """Return a page of a secret's versions, newest first. A pinned secret has no stored versions."""
        if self._pinned_secrets.find_by_id(id) is not None:
            return Page(items=[], total=0, limit=query.limit, offset=0, next=None)
        row = rows.get_secret_row(id, deleted=True)
        of_it = SecretVersion.select().where(SecretVersion.secret_id == row.id)
        return paginate(
            of_it,
            query,
            by,
            scope=f"secrets.versions.{row.id}",
            order=(Order(SecretVersion.n),),
            make=lambda version: rows.version_view(version, row.version),
        )

    # -- internals

    def _reminder_period_end(self) -> str:
        return rows.reminder_period_end(self._settings.get(REMINDER_DAYS))

    def _filter_rows(self, query: SecretQuery) -> Any:
        until = self._reminder_period_end()
        wanted = query.status or ["active", "expiring", "expired"]
        is_wanted = rows.status_is(wanted[0], until)
        for status in wanted[1:]:
            is_wanted |= rows.status_is(status, until)
        found = SecretRow.select().where(is_wanted)
        hidden = [item.key for item in self._pinned_secrets.all_secrets()]
        if hidden:
            found = found.where(SecretRow.name_key.not_in(hidden) | SecretRow.deleted_at.is_null(False))
        if query.category:
            found = found.where(SecretRow.category.in_(query.category))
        if query.search is not UNSET:
            text = query.search
            found = found.where(SecretRow.name.contains(text) | SecretRow.description.contains(text))
        return found

    def _views_of(self, items: Sequence[Any]) -> list[SecretView]:
        used = rows.secret_users_by_name([_sort_key(item)[0] for item in items])
        until, kept = self._reminder_period_end(), self._settings.get(MAX_VERSIONS)
        return [
            rows.pinned_view(item, used.get(item.key, []), kept)
            if isinstance(item, PinnedSecret)
            else rows.secret_view(item, used.get(item.name_key, []), until)
            for item in items
        ]


def _sort_key(item: Any) -> tuple[str, str]:
    return (item.key, item.id) if isinstance(item, PinnedSecret) else (item.name_key, item.id)


def _merge_sorted(stored: Sequence[Any], pinned: Sequence[PinnedSecret]) -> list[Any]:
    return sorted([*stored, *pinned], key=_sort_key)


def _pinned_matches(item: PinnedSecret, query: SecretQuery) -> bool:
    """Return whether a pinned secret matches the filters.

    Pinned secrets are active and belong to the category `general`.
    """
    if query.status and "active" not in query.status:
        return False
    if query.category and "general" not in query.category:
        return False
    return query.search is UNSET or query.search.lower() in item.name.lower()


STATUSES: tuple[Status, ...] = get_args(Status)


def secrets_by_status(settings: Settings, pinned_secrets: PinnedSecrets) -> dict[tuple[str, ...], float]:
    """Return the number of secrets, keyed by status, with a single query. Pinned secrets count as active."""
    until = rows.reminder_period_end(settings.get(REMINDER_DAYS))
    counters = [peewee.fn.SUM(peewee.Case(None, [(rows.status_is(status, until), 1)], 0)) for status in STATUSES]
    found = SecretRow.select(*counters).tuples().first()
    counts: dict[tuple[str, ...], float] = {
        (str(status),): float(count or 0) for status, count in zip(STATUSES, found, strict=True)
    }
    counts[("active",)] += len(pinned_secrets.all_secrets())
    return counts
