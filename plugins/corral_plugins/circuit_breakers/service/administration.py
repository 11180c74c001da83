"""Administers circuit breakers: lists, configures, resets and deletes them, and forces them open or closed.

Every method runs in the caller's unit of work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, Invalid, NotFound, TooMany
from corral.http.answers import IfMatch
from corral.http.page import Page, paginate_names
from corral.plugin import Audit, AuditEntry
from corral_plugins.circuit_breakers.models import BreakerRow, PermitRow, TransitionRow
from corral_plugins.circuit_breakers.service.configuration import BreakerConfig, GuardedNames
from corral_plugins.circuit_breakers.service.transitions import MAX_BREAKERS, BreakerTransitions
from corral_plugins.circuit_breakers.service.windows import window_shape_of
from corral_plugins.circuit_breakers.settings import MAX_COUNT_WINDOW
from corral_plugins.circuit_breakers.shapes import (
    BreakerConfiguration,
    BreakerDetail,
    BreakerQuery,
    BreakerView,
    LastError,
    TransitionView,
)

SHOWN_TRANSITIONS = 50
FIELDS = BreakerConfig.__struct_fields__


class BreakerAdministration:
    """Manages circuit breakers for admins."""

    audit: Audit | None

    def __init__(self, transitions: BreakerTransitions, names: GuardedNames) -> None:
        self._transitions, self._names = transitions, names

    # -- reading

    def list_breakers(self, query: BreakerQuery, by: Principal) -> Page[BreakerView]:
        """Return a page of circuit breakers sorted by name, including breakers that have not guarded a call yet."""
        listed = self._names.listed()
        stored: Any = BreakerRow.select(BreakerRow.name, BreakerRow.state).tuples()
        states: dict[str, str] = dict.fromkeys(listed, "closed") | dict(stored)
        names = sorted(name for name, state in states.items() if self._is_wanted(query, name, state, listed))

        def views(some: Sequence[str]) -> list[BreakerView]:
            rows = {row.name: row for row in BreakerRow.select().where(BreakerRow.name.in_(some))}
            return [self._view(rows.get(name) or _new_row(name), listed) for name in some]

        return paginate_names(names, query, by, scope="circuit_breakers", name=str, make=views)

    def _is_wanted(self, query: BreakerQuery, name: str, state: str, listed: set[str]) -> bool:
        return (
            (not query.state or state in query.state)
            and (query.prefix is UNSET or name.startswith(query.prefix))
            and (query.guarded is UNSET or self._names.is_guarded(name, listed) == query.guarded)
        )

    def get(self, name: str) -> BreakerDetail:
        """Return a circuit breaker with its latest transitions. Raise `NotFound` if it does not exist."""
        listed = self._names.listed()
        row = BreakerRow.get_or_none(BreakerRow.name == name)
        if row is None:
            if not self._names.is_guarded(name, listed):
                raise _not_found()
            row = _new_row(name)
        found = TransitionRow.select().where(TransitionRow.name == name).order_by(TransitionRow.id.desc())
        return BreakerDetail(
            **msgspec.structs.asdict(self._view(row, listed)),
            transitions=[_transition_view(each) for each in found.limit(SHOWN_TRANSITIONS)],
        )

    def _view(self, row: BreakerRow, listed: set[str]) -> BreakerView:
        return BreakerView(
            **msgspec.structs.asdict(self._transitions.config_of(row)),
            name=row.name,
            description=row.description,
            state=row.state,
            forced=row.forced,
            opened_at=row.opened_at,
            retry_at=row.retry_at,
            reason=row.reason,
            generation=row.generation,
            guarded=self._names.is_guarded(row.name, listed),
            source="default" if row.config is None else "configured",
            counts=self._transitions.counts_of(row),
            last_error=None if row.last_error is None else LastError(**row.last_error),
            version=row.version,
        )

    # -- writing

    def configure(self, body: BreakerConfiguration, match: IfMatch) -> tuple[BreakerView, bool]:
        """Create a circuit breaker, or change the given fields of an existing one.

        Return the breaker, and whether it is new.
        """
        listed, name = self._names.listed(), body.name
        is_new = not self._names.is_guarded(name, listed) and not _exists(name)
        row = self._lock_or_create(name)
        match.check(row.version)
        before = self._transitions.config_of(row)
        given = {field: value for field in FIELDS if (value := getattr(body, field)) is not UNSET}
        config = {**(row.config or {}), **given}
        after = self._transitions.defaults.config_of(name, config)
        _check_window(after, config, given)
        columns: dict[str, Any] = {"config": config, "version": row.version + 1}
        if body.description is not UNSET:
            columns["description"] = body.description
        if window_shape_of(after) != window_shape_of(before):
            columns["window"] = ""
        changes = {field: (getattr(before, field), value) for field, value in given.items()}
        if after.enabled or row.state == "closed":
            self._transitions.update(row, **columns)
        else:
            self._transitions.transition(row, "closed", "The breaker was disabled.", **columns)
        self._record("configure", name, changes={key: pair for key, pair in changes.items() if pair[0] != pair[1]})
        return self._view(row, listed), is_new

    def force_open(self, name: str, reason: str, match: IfMatch) -> BreakerView:
        """Open a circuit breaker, and keep it open until an admin closes it.

        Raise `NotFound` if it does not exist, or `Conflict` if it is disabled. If an admin has already forced the
        breaker open, a non-empty `reason` replaces the earlier one.
        """
        row, listed = self._lock_known(name, match)
        if not self._transitions.config_of(row).enabled:
            how = f"corral circuit-breakers set {name} -f enabled:=true"
            detail = f"The breaker is disabled, so it rejects no calls; enable it first: {how}"
            raise Conflict(detail, current_status="disabled")
        if not row.forced or reason not in ("", row.reason):
            why = reason or "An admin forced it open."
            self._transitions.transition(row, "open", why, forced=True, version=row.version + 1)
        self._record("force_open", name, reason=reason)
        return self._view(row, listed)

    def close(self, name: str, action: str, reason: str, match: IfMatch) -> BreakerView:
        """Close a circuit breaker and discard its counts. From then on, it opens and closes automatically.

        Raise `NotFound` if it does not exist. `action`, which is `force_close` or `reset`, is the name of the action in
        the audit log.
        """
        row, listed = self._lock_known(name, match)
        usual = "An admin closed it." if action == "force_close" else "An admin reset it."
        self._transitions.transition(row, "closed", reason or usual, version=row.version + 1)
        self._record(action, name, reason=reason)
        return self._view(row, listed)

    def delete(self, name: str, match: IfMatch) -> None:
        """Delete a circuit breaker. Raise `NotFound` if it does not exist.

        If a plugin still guards calls under its name, a closed breaker with the default configuration takes its place.
        """
        rows = self._transitions.lock([name])
        if not rows and not self._names.is_guarded(name, self._names.listed()):
            raise _not_found()
        for row in rows:
            match.check(row.version)
            if row.state != "closed":  # whoever waits for it learns that it is closed
                self._transitions.transition(row, "closed", "An admin deleted it.")
            BreakerRow.delete().where(BreakerRow.name == name).execute()
            PermitRow.delete().where(PermitRow.name == name).execute()
            TransitionRow.delete().where(TransitionRow.name == name).execute()
        self._record("delete", name)

    def _lock_known(self, name: str, match: IfMatch) -> tuple[BreakerRow, set[str]]:
        listed = self._names.listed()
        if not _exists(name) and not self._names.is_guarded(name, listed):
            raise _not_found()
        row = self._lock_or_create(name)
        match.check(row.version)
        return row, listed

    def _lock_or_create(self, name: str) -> BreakerRow:
        found = self._transitions.lock([name], create=True)
        if not found:
            detail = f"There are already {MAX_BREAKERS} circuit breakers, which is the maximum; delete some first."
            raise TooMany(detail, code="quota_exceeded")
        return found[0]

    def _record(
        self, action: str, name: str, *, reason: str = "", changes: dict[str, tuple[Any, Any]] | None = None
    ) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"circuit_breakers.breaker.{action}",
                object_type="circuit_breaker",
                object_id=name,
                object_name=name,
                changes=changes or {},
                details={"reason": reason} if reason else {},
            )
            self.audit.record(entry)


def _exists(name: str) -> bool:
    return bool(BreakerRow.select().where(BreakerRow.name == name).exists())


def _not_found() -> NotFound:
    return NotFound("There is no circuit breaker with this name; `corral circuit-breakers list` lists all breakers.")


def _new_row(name: str) -> BreakerRow:
    """Return a new row with default values for a circuit breaker that is not stored."""
    return BreakerRow(name=name)


def _check_window(config: BreakerConfig, configured: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise `Invalid` if the type of the window is `count` and its size is not allowed.

    The size must be at most `MAX_COUNT_WINDOW`, and at least the configured `minimum_calls`.
    """
    if config.window_type != "count":
        return
    if config.window_size > MAX_COUNT_WINDOW:
        raise Invalid.at("/window_size", "too_large", f"A window of type count holds at most {MAX_COUNT_WINDOW} calls.")
    minimum = configured.get("minimum_calls", 0)
    if minimum > config.window_size:
        field = "minimum_calls" if "minimum_calls" in given else "window_size"
        code = "too_large" if field == "minimum_calls" else "too_small"
        detail = f"minimum_calls ({minimum}) must not exceed window_size ({config.window_size}), which counts calls."
        raise Invalid.at(f"/{field}", code, detail)


def _transition_view(row: TransitionRow) -> TransitionView:
    return TransitionView(
        from_=row.from_state, to=row.to_state, reason=row.reason, by=row.by, counts=row.counts, at=row.at
    )


def delete_old_transitions(days: int, limit: int) -> int:
    """Delete at most `limit` transitions older than `days` days. Return the number of deleted transitions."""
    old = TransitionRow.select(TransitionRow.id).where(TransitionRow.at < clock.now(-days * 86_400)).limit(limit)
    return int(TransitionRow.delete().where(TransitionRow.id.in_(old)).execute())
