"""Lists, creates, reads, changes, fires and deletes triggers. Every method runs in the caller's unit of work."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.crypto import Sealer, associated_data, digest
from corral.database.unit import locked
from corral.errors import Conflict, Invalid, Problem, TooMany
from corral.http.answers import IfMatch
from corral.http.page import Page, newest_first, paginate
from corral.ids import new_id
from corral.plugin import InstallationConfig, Settings
from corral_plugins.triggers.api import TriggerAction, TriggerCreated, TriggerDeleted, TriggerUpdated
from corral_plugins.triggers.models import LIVING, Expectation, Fire, Trigger
from corral_plugins.triggers.service.event_reader import begin_absence_wait
from corral_plugins.triggers.service.firing import publish
from corral_plugins.triggers.service.kinds import TriggerTypeRegistry, event_names
from corral_plugins.triggers.service.rows import (
    DAY,
    count_fires_since,
    find_readable_trigger,
    find_writable_trigger,
    history_view,
    view_fields,
)
from corral_plugins.triggers.service.scheduler import TriggerTimes
from corral_plugins.triggers.service.slot_batches import HOUR
from corral_plugins.triggers.service.slots import TriggerSlots
from corral_plugins.triggers.service.timed_kinds import next_times
from corral_plugins.triggers.service.validation import (
    action_fields,
    constant_fields,
    default_fields,
    require_action_permission,
)
from corral_plugins.triggers.settings import MAX_PER_USER
from corral_plugins.triggers.shapes import (
    CreatedTrigger,
    FireTrigger,
    HistoryQuery,
    HistoryView,
    NewTrigger,
    RotatedSecret,
    TriggerDetails,
    TriggerPatch,
    TriggerQuery,
    TriggerView,
)

TOKEN_PREFIX, SECRET_PREFIX = "crh_", "whsec_"
SHOWN_TIMES = 5
CAUSED_BY_HAND = ("webhook", "event")


class IngressSecrets(msgspec.Struct, frozen=True, kw_only=True):
    """A new token and a new secret for a webhook trigger.

    They are generated before the unit of work begins, because encrypting the secret takes time.
    """

    token: str
    secret: str


def new_ingress_secrets() -> IngressSecrets:
    """Return a new 256-bit token and a new secret."""
    return IngressSecrets(token=TOKEN_PREFIX + secrets.token_urlsafe(32), secret=SECRET_PREFIX + _base64_secret())


def _base64_secret() -> str:
    import base64

    return base64.b64encode(secrets.token_bytes(32)).decode()


class TriggerManagement:
    """Manages triggers."""

    def __init__(
        self,
        settings: Settings,
        types: TriggerTypeRegistry,
        times: TriggerTimes,
        slots: TriggerSlots,
        sealer: Sealer,
        installation: InstallationConfig,
    ) -> None:
        self._settings, self._types, self._times, self._slots = settings, types, times, slots
        self._sealer, self._public_url = sealer, (installation.public_url or "").rstrip("/")

    # -- reading

    def list(self, query: TriggerQuery, *, by: Principal) -> Page[TriggerView]:
        """Return a page of the triggers that match every filter."""
        where: Any = LIVING & visible(Trigger, by)
        if query.type is not UNSET:
            where &= Trigger.type.in_(query.type)
        if query.enabled is not UNSET:
            where &= Trigger.enabled if query.enabled else ~Trigger.enabled
        if query.search is not UNSET:
            where &= Trigger.name.contains(query.search) | Trigger.description.contains(query.search)
        found = paginate(
            Trigger.select().where(where), query, by, scope="triggers", order=newest_first(Trigger), make=_identity
        )
        fires = count_fires_since([row.id for row in found.items], DAY)
        items = [TriggerView(**self._fields(row, fires.get(row.id, 0))) for row in found.items]
        return Page(items=items, total=found.total, limit=found.limit, offset=found.offset, next=found.next)

    def get(self, trigger_id: str, *, by: Principal) -> TriggerDetails:
        """Return a trigger and the next times at which it fires."""
        return self._details(find_readable_trigger(trigger_id, by), by)

    def history(self, trigger_id: str, query: HistoryQuery, *, by: Principal) -> Page[HistoryView]:
        """Return a page of a trigger's history, newest first, even if the trigger has been deleted."""
        row = find_readable_trigger(trigger_id, by, deleted=True)
        where: Any = Fire.trigger_id == row.id
        if query.status is not UNSET:
            where &= Fire.status.in_(query.status)
        if query.since is not UNSET:
            where &= Fire.created_at >= clock.from_datetime(query.since)
        rows = Fire.select().where(where)
        return paginate(rows, query, by, scope="triggers.history", order=newest_first(Fire), make=history_view)

    # -- writing

    def create(self, new: NewTrigger, made: IngressSecrets, *, by: Principal) -> CreatedTrigger:
        """Create a trigger. The caller must have checked the fields."""
        self._check_quota(by)
        warnings = self._check_action(new.action, by)
        now, (event_key, event_after) = clock.now(), event_names(new.type, new.config)
        is_timed = (kind := self._types.kind(new.type)) is not None and kind.next_time is not None
        row = Trigger(
            id=new_id(),
            created_by=by.user_id,
            created_at=now,
            updated_at=now,
            name=_clean_name(new.name),
            description=new.description,
            type=new.type,
            config=new.config,
            action=new.action,
            filter_expression=new.filter,
            enabled=new.enabled,
            overlap=new.overlap or ("skip" if is_timed else "allow"),
            catch_up=new.catch_up,
            catch_up_window_seconds=new.catch_up_window_seconds,
            max_fires_per_hour=new.max_fires_per_hour or (600 if new.type in CAUSED_BY_HAND else 60),
            since=now,
            event_key=event_key,
            event_after=event_after,
        )
        url = secret = None
        if new.type == "webhook":
            row.token_hash, url = digest(made.token), self._ingress_url(made.token)
            if new.config.get("auth", "token") != "token":
                row.secret, secret = self._seal(row.id, made.secret), made.secret
        for column, value in self._times.columns_from_now(row).items():
            setattr(row, column, value)
        Trigger.insert(row.__data__).execute()
        self._begin_waits(row)
        publish(TriggerCreated, row)
        return CreatedTrigger(**self._fields(row, 0), ingress_url=url, secret=secret, warnings=[*warnings])

    def update(self, trigger_id: str, patch: TriggerPatch, match: IfMatch, *, by: Principal) -> TriggerDetails:
        """Change a trigger. The caller must have checked the new fields."""
        row = find_writable_trigger(trigger_id, by)
        match.check(row.version)
        given = {name: value for name, value in msgspec.structs.asdict(patch).items() if value is not UNSET}
        if "filter" in given:
            given["filter_expression"] = given.pop("filter")
        if "name" in given:
            given["name"] = _clean_name(given["name"])
        changes = {name: value for name, value in given.items() if getattr(row, name) != value}
        if changes:
            self._apply(row, changes, by)
        return self._details(row, by)

    def toggle(self, trigger_id: str, enabled: bool | None, match: IfMatch, *, by: Principal) -> TriggerDetails:
        """Enable or disable a trigger. If `enabled` is None, switch to the opposite state.

        Enabling a trigger resets its count of failures.
        """
        row = find_writable_trigger(trigger_id, by)
        match.check(row.version)
        wanted = not row.enabled if enabled is None else enabled
        if wanted != row.enabled:
            self._apply(row, {"enabled": wanted}, by)
        return self._details(row, by)

    def delete(self, trigger_id: str, match: IfMatch, *, by: Principal) -> None:
        """Delete a trigger. Its history remains available."""
        locked(Trigger.select(Trigger.id).where(Trigger.id == trigger_id.lower())).first()  # keeps the version as it is
        row = find_writable_trigger(trigger_id, by)
        match.check(row.version)
        gone = {"deleted_at": clock.now(), "enabled": False, "next_slot_at": None, "next_fire_at": None}
        tokens = {"token_hash": None, "old_token_hash": None, "secret": None, "old_secret": None}
        Trigger.update({**gone, **tokens}).where(Trigger.id == row.id).execute()
        Expectation.delete().where(Expectation.trigger_id == row.id).execute()
        publish(TriggerDeleted, row)

    def fire(self, trigger_id: str, body: FireTrigger, *, by: Principal) -> HistoryView:
        """Fire a trigger on behalf of a person. It fires even if it is disabled or its filter does not match.

        Raise `Conflict` if it was disabled because its owner may not run the action, and `TooMany` if it has fired
        `max_fires_per_hour` times within the last hour.
        """
        row = find_writable_trigger(trigger_id, by)
        if row.disabled_reason == "owner_inactive":
            raise Conflict(
                "The owner of this trigger lacks the permissions for the trigger's action.", current_status="disabled"
            )
        if count_fires_since([row.id], HOUR).get(row.id, 0) >= row.max_fires_per_hour:
            raise TooMany(f"The trigger fired {row.max_fires_per_hour} times within the last hour.")
        fire = self._slots.record(row, f"manual:{new_id()}", payload=body.payload, event={}, is_manual=True)
        assert fire is not None
        return history_view(fire)

    def rotate_secret(
        self, trigger_id: str, made: IngressSecrets, seconds: int, match: IfMatch, *, by: Principal
    ) -> RotatedSecret:
        """Replace the secret of a webhook trigger, or its token if its deliveries are not signed.

        The old secret or token remains valid for `seconds` seconds. Raise `Conflict` if the trigger is not a webhook
        trigger.
        """
        row = find_writable_trigger(trigger_id, by)
        match.check(row.version)
        if row.type != "webhook":
            raise Conflict("Only webhook triggers have a secret.", current_status=row.type)
        changes: dict[str, Any] = {"old_until": clock.now(seconds), "old_token_hash": None, "old_secret": None}
        answer = RotatedSecret(ingress_url=None, secret=made.secret)
        if row.config.get("auth", "token") == "token":
            changes |= {"token_hash": digest(made.token), "old_token_hash": row.token_hash}
            answer = RotatedSecret(ingress_url=self._ingress_url(made.token), secret=None)
        else:
            changes |= {"secret": self._seal(row.id, made.secret), "old_secret": row.secret}
        self._write(row, changes)
        publish(TriggerUpdated, row)
        return answer

    # -- parts

    def _apply(self, row: Trigger, changes: dict[str, Any], by: Principal) -> None:
        """Save changes to a trigger, and update dependent values, such as the time at which it is next due."""
        after = {**row.__data__, **changes}
        if "action" in changes or changes.get("enabled"):
            self._check_action(after["action"], by)
        if changes.get("enabled"):
            changes |= {"consecutive_failures": 0, "disabled_reason": None}
        if "config" in changes:
            changes["event_key"], changes["event_after"] = event_names(row.type, changes["config"])
        kind = self._types.kind(row.type)
        if changes.get("enabled") and (kind is None or kind.next_time is None):
            changes["since"] = clock.now()  # events that came while it was disabled do not fire it
        for column, value in changes.items():
            setattr(row, column, value)
        times = self._times.columns_from_now(row)
        if changes.get("enabled") and row.type == "once" and times["next_slot_at"] is None:
            raise Invalid.at("/enabled", "in_the_past", "The time of this trigger has passed; change it first.")
        self._write(row, {**changes, **times})
        if {"enabled", "config"} & changes.keys():
            Expectation.delete().where(Expectation.trigger_id == row.id).execute()
            self._begin_waits(row)
        publish(TriggerUpdated, row)

    def _write(self, row: Trigger, changes: dict[str, Any]) -> None:
        changes |= {"version": row.version + 1, "updated_at": clock.now()}
        if not Trigger.update(changes).where((Trigger.id == row.id) & (Trigger.version == row.version)).execute():
            raise Conflict(
                "The trigger was changed by another request at the same time; repeat the request.",
                current_status="changed",
            )
        for column, value in changes.items():
            setattr(row, column, value)

    def _begin_waits(self, row: Trigger) -> None:
        """Start the wait of an absence trigger whose wait begins when the trigger is enabled, not with an event."""
        if row.type == "absence" and row.enabled and row.event_after is None and row.config.get("for_each") is None:
            begin_absence_wait(row, key="", since=clock.now(), payload=None)

    def _check_action(self, action: dict[str, Any], by: Principal) -> Sequence[str]:
        """Check that the caller may perform the action, and that the objects to which it refers exist.

        Return warnings.
        """
        found = self._types.require_action(action.get("type"))
        require_action_permission(by, found.permission)
        try:
            return _warnings(found, action, by)
        except Invalid as error:
            faults = [msgspec.structs.replace(each, pointer=f"/action{each.pointer}") for each in error.errors]
            raise Invalid(error.detail, code=error.code, errors=faults) from None

    def _find_warnings(self, row: Trigger, by: Principal) -> Sequence[str]:
        """Return warnings about problems that would make a trigger fail now: a missing secret or a deleted object.

        The objects may be private to the trigger's owner, so only the owner is told which objects are missing.
        """
        return [*_secret_warnings(row), *self._find_action_warnings(row, by)]

    def _find_action_warnings(self, row: Trigger, by: Principal) -> Sequence[str]:
        found = self._types.action(row.action["type"])
        if found is None:
            return [f"No active plugin provides the action {row.action['type']}."]
        try:
            return _warnings(found, row.action, by)
        except Problem as problem:
            return [problem.detail] if row.created_by == by.user_id else []

    def _check_quota(self, by: Principal) -> None:
        most = self._settings.get(MAX_PER_USER)
        if Trigger.select().where(LIVING & (Trigger.created_by == by.user_id)).count() >= most:
            raise Problem(
                f"You already have {most} triggers, which is the maximum (triggers.max_per_user); delete one first.",
                code="quota_exceeded",
            )

    def _seal(self, trigger_id: str, secret: str) -> str:
        aad = associated_data("triggers_triggers", trigger_id, 1, "secret")
        return self._sealer.encrypt(secret.encode(), aad=aad).hex()

    def _ingress_url(self, token: str) -> str:
        return f"{self._public_url}/api/v1/hooks/{token}"

    def _details(self, row: Trigger, by: Principal) -> TriggerDetails:
        kind, times = self._times.kind(row), []
        if kind is not None and row.next_slot_at is not None:
            first = clock.parse_instant(row.next_slot_at)
            times = [first, *next_times(kind, self._times.rule(row), first, SHOWN_TIMES - 1)]
        fires = count_fires_since([row.id], DAY).get(row.id, 0)
        shown = [clock.format_instant(at) for at in times]
        return TriggerDetails(**self._fields(row, fires), next_fires=shown, warnings=[*self._find_warnings(row, by)])

    def _fields(self, row: Trigger, fires_24h: int) -> dict[str, Any]:
        kind = self._times.kind(row)
        text = None if kind is None or kind.describe is None else kind.describe(row.config, self._times.zone)
        return view_fields(row, fires_24h, text)


def _secret_warnings(row: Trigger) -> list[str]:
    """Return a warning if deliveries must be signed but the trigger has no secret.

    This happens if `auth` is changed after the trigger was created.
    """
    if row.type != "webhook" or row.config.get("auth", "token") == "token" or row.secret is not None:
        return []
    return [
        f"The trigger has no secret and refuses every call. Create one with `corral triggers rotate-secret {row.id}`."
    ]


def _warnings(action: TriggerAction, fields: dict[str, Any], by: Principal) -> list[str]:
    """Return the warnings about an action. Raise `Invalid` if the action refers to an object that does not exist."""
    if action.check is None:
        return []
    return list(action.check(by, constant_fields({**default_fields(action), **action_fields(fields)})) or ())


def _identity(row: Trigger) -> Trigger:
    return row


def _clean_name(name: str) -> str:
    if not (clean := name.strip()):
        raise Invalid.at("/name", "too_short", "must contain a character other than white space")
    return clean
