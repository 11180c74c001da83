"""The business logic of the kill switch. Only this module writes to the kill switch's table."""

from __future__ import annotations

from typing import Annotated

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.errors import Invalid, Unavailable
from corral.events.event import SystemAlert, emit
from corral.plugin import Audit, AuditEntry
from corral_plugins.admin.api import KillSwitchView, Mode
from corral_plugins.admin.models import ROW, KillSwitchRow
from corral_plugins.tasks.api import Tasks

Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=500)]

RELEASED = KillSwitchView(
    engaged=False, mode="pause", hold_deliveries=False, reason=None, engaged_by=None, engaged_at=None
)

RESTORED = "This installation was restored from a backup; corral kill-switch off starts it."

# Compiled, because every claim and every model call runs this query.
_STATE = Statement(
    lambda p: (
        KillSwitchRow.select(*[getattr(KillSwitchRow, name) for name in KillSwitchView.__struct_fields__])
        .where(KillSwitchRow.id == p("row"))
        .tuples()
    )
)


class KillSwitchChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to engage or release the kill switch. Engaging requires a reason."""

    engaged: bool
    mode: Mode = "pause"
    hold_deliveries: bool = False
    reason: Reason | None = None


class KillSwitchAlert(SystemAlert, kw_only=True):
    """Alerts admins that the kill switch was engaged or released."""

    engaged: bool
    mode: Mode
    reason: str | None


class KillSwitchService:
    """Reads and changes the kill switch. Implements `corral_plugins.admin.api.KillSwitch`."""

    audit: Audit | None
    tasks: Tasks | None

    def state(self) -> KillSwitchView:
        row = _STATE.one({"row": ROW})
        if row is None:
            return RELEASED
        engaged, mode, hold, reason, by, at = row
        return KillSwitchView(
            engaged=bool(engaged), mode=mode, hold_deliveries=bool(hold), reason=reason, engaged_by=by, engaged_at=at
        )

    def refuse_if_engaged(self) -> None:
        state = self.state()
        if state.engaged:
            raise Unavailable(f"The kill switch is engaged: {state.reason}", code="kill_switch", retry_after=10)

    def change(self, change: KillSwitchChange, *, by: Principal) -> KillSwitchView:
        """Engage or release the switch. The change takes effect in every process within 2 seconds.

        The mode `cancel` also cancels leased tasks. Raise `Invalid` if the switch is engaged without a reason.
        """
        if change.engaged and change.reason is None:
            raise Invalid.at("/reason", "required", "Give a reason; users whose tasks stop can see it.")
        before = self.state()
        row = {
            "engaged": change.engaged,
            "mode": change.mode,
            "hold_deliveries": change.engaged and change.hold_deliveries,
            "reason": change.reason,
            "engaged_by": by.user_id if change.engaged else None,
            "engaged_at": clock.now() if change.engaged else None,
        }
        insert = KillSwitchRow.insert(id=ROW, **row)
        insert.on_conflict(conflict_target=[KillSwitchRow.id], update=row).execute()
        if change.engaged and change.mode == "cancel" and self.tasks is not None:
            self.tasks.cancel_all_leased(reason=change.reason or "kill switch")
        self._alert(change)
        after = self.state()
        if self.audit is not None:
            values = {name: (getattr(before, name), getattr(after, name)) for name in after.__struct_fields__}
            changes = {name: (old, new) for name, (old, new) in values.items() if old != new}
            entry = AuditEntry(
                action="admin.kill_switch", object_type="kill_switch", object_id=str(ROW), changes=changes
            )
            self.audit.record(entry)
        return after

    def after_restore(self, by: Principal) -> None:
        """Engage the switch, so that a restored copy of a running installation runs nothing and sends nothing."""
        self.change(KillSwitchChange(engaged=True, hold_deliveries=True, reason=RESTORED), by=by)

    @staticmethod
    def _alert(change: KillSwitchChange) -> None:
        alert = KillSwitchAlert(
            engaged=change.engaged,
            mode=change.mode,
            reason=change.reason,
            kind="kill_switch",
            severity="critical" if change.engaged else "info",
            title="The kill switch was engaged" if change.engaged else "The kill switch was released",
            detail=f"mode {change.mode}: {change.reason}" if change.engaged else "Work resumes.",
        )
        emit(alert, object=("kill_switch", str(ROW)))
