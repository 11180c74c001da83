"""Reads, evaluates and replaces the IP rules. All methods run in the caller's unit of work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, Fault, Invalid, PreconditionFailed
from corral.events.event import emit
from corral.http.answers import IfMatch
from corral.http.client_address import canonical_ip
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_plugins.security.events import IpRulesChanged
from corral_plugins.security.models import ROW, IpModeRow, IpRuleRow
from corral_plugins.security.service.networks import Rule, Ruleset, parse_network
from corral_plugins.security.shapes import Judgement, NewRule, NewRules, RulesView, RuleView

MODE_OFF = "off"
LOCKED_OUT = "These rules would refuse your own address; add a rule that allows it, or send `force`."


class InForce(msgspec.Struct, frozen=True):
    """The unexpired rules that a process applies. `until` is the time when the first of them expires."""

    version: int
    rules: Ruleset
    count: int
    until: str | None


class IpRules:
    """Manages the IP rules. No other class writes to their tables."""

    audit: Audit | None = None

    def show(self, client_ip: str) -> RulesView:
        """Return the stored rules, including expired ones, and their mode."""
        mode: Any = IpModeRow.get_by_id(ROW)
        rows = IpRuleRow.select().order_by(IpRuleRow.position)
        return RulesView(mode=mode.mode, rules=[_view(row) for row in rows], version=mode.version, your_ip=client_ip)

    def version(self) -> int:
        """Return the version of the rules, which grows with every change."""
        return int(IpModeRow.select(IpModeRow.version).where(IpModeRow.id == ROW).scalar())

    def in_force(self) -> InForce:
        """Return the rules that apply now. Expired rules are omitted."""
        mode = IpModeRow.get_by_id(ROW)
        rows = list(IpRuleRow.select().where(_is_live()))
        rules = Ruleset(mode.mode, [Rule(row.id, row.cidr, row.action) for row in rows])
        until = min((row.expires_at for row in rows if row.expires_at is not None), default=None)
        return InForce(mode.version, rules, len(rows), until)

    def judge(self, address: str) -> Judgement:
        """Check whether the rules allow an address. Raises `Invalid` if the text is not an IP address."""
        folded = canonical_ip(address)
        if not folded:
            raise Invalid.at("/ip", "bad_format", "Give an IPv4 or IPv6 address.")
        allowed, rule = self.in_force().rules.judge(folded)
        return Judgement(allowed=allowed, rule=None if rule is None else _view(IpRuleRow.get_by_id(rule.id)))

    def replace(self, new: NewRules, *, client_ip: str, if_match: IfMatch, by: Principal | None) -> RulesView:
        """Replace all rules. Raises `Invalid`, `Conflict` (`would_lock_out`) or `PreconditionFailed`."""
        rows = _rows(new.rules, by)
        before = self.show(client_ip)
        if_match.check(before.version)
        now = clock.now()
        living = [Rule(row.id, row.cidr, row.action) for row in rows if row.expires_at is None or row.expires_at > now]
        if not new.force and not Ruleset(new.mode, living).judge(client_ip)[0]:
            raise Conflict(LOCKED_OUT, code="would_lock_out", your_ip=client_ip)
        here = (IpModeRow.id == ROW) & (IpModeRow.version == before.version)
        update = IpModeRow.update(mode=new.mode, version=IpModeRow.version + 1, updated_at=now)
        if not update.where(here).execute():
            raise PreconditionFailed(
                "The rules were replaced in the meantime; read them again and repeat the change.",
                current_version=self.version(),
            )
        existing: dict[tuple[str, str], RuleView] = {(rule.cidr, rule.action): rule for rule in before.rules}
        for row in rows:
            if (same := existing.get((row.cidr, row.action))) is not None:
                row.id, row.created_by, row.created_at = same.id, same.created_by, same.created_at
        IpRuleRow.delete().execute()
        if rows:
            IpRuleRow.insert_many([row.__data__ for row in rows]).execute()
        self._publish(before, new, rows)
        return self.show(client_ip)

    def turn_off(self) -> None:
        """Set the mode to `off` to recover from a lockout. The rules are kept."""
        before = self.show("")
        update = IpModeRow.update(mode=MODE_OFF, version=IpModeRow.version + 1, updated_at=clock.now())
        if update.where((IpModeRow.id == ROW) & (IpModeRow.mode != MODE_OFF)).execute():
            emit(IpRulesChanged(mode=MODE_OFF, count=len(before.rules)), object=("ip_rules", str(ROW)))
            self._record({"mode": (before.mode, MODE_OFF)})

    @staticmethod
    def sweep() -> int:
        """Delete expired rules and return their number. This does not change which rules apply."""
        return int(IpRuleRow.delete().where(IpRuleRow.expires_at <= clock.now()).execute())

    def refused(self) -> None:
        """Record a rejected request in the audit log. The client address comes from the entry of the unit of work."""
        if self.audit is not None:
            entry = AuditEntry(
                action="security.ip_rules.refuse",
                object_type="ip_rules",
                object_id=str(ROW),
                outcome="denied",
                code="ip_blocked",
            )
            self.audit.record(entry)

    def _publish(self, before: RulesView, new: NewRules, rows: list[IpRuleRow]) -> None:
        emit(IpRulesChanged(mode=new.mode, count=len(rows)), object=("ip_rules", str(ROW)))
        old, now = {_summary(rule) for rule in before.rules}, {_summary(row) for row in rows}
        changes: dict[str, tuple[Any, Any]] = {}
        if before.mode != new.mode:
            changes["mode"] = before.mode, new.mode
        if old != now:
            changes["rules"] = sorted(old - now), sorted(now - old)
        self._record(changes)

    def _record(self, changes: Mapping[str, tuple[Any, Any]]) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action="security.ip_rules.change", object_type="ip_rules", object_id=str(ROW), changes=changes
            )
            self.audit.record(entry)


def _rows(rules: list[NewRule], by: Principal | None) -> list[IpRuleRow]:
    """Build the rows of the rules. Raises `Invalid` with one error for each invalid or duplicate network."""
    rows, faults, seen, now = [], [], set(), clock.now()
    for index, rule in enumerate(rules):
        try:
            cidr = parse_network(rule.cidr)
        except ValueError as error:
            faults.append(Fault(f"/rules/{index}/cidr", "bad_format", f"{error}."))
            continue
        if (cidr, rule.action) in seen:
            faults.append(Fault(f"/rules/{index}/cidr", "not_unique", f"{rule.action} {cidr} is listed twice."))
        seen.add((cidr, rule.action))
        expires_at = None if rule.expires_at is None else clock.from_datetime(rule.expires_at)
        rows.append(
            IpRuleRow(
                id=new_id(),
                position=index,
                cidr=cidr,
                action=rule.action,
                note=rule.note,
                expires_at=expires_at,
                created_by=None if by is None else by.user_id,
                created_at=now,
            )
        )
    if faults:
        raise Invalid("Some rules are not valid.", errors=faults)
    return rows


def _summary(rule: RuleView | IpRuleRow) -> str:
    """Return the text form of a rule for the audit log."""
    until = "" if rule.expires_at is None else f" until {rule.expires_at}"
    return f"{rule.action} {rule.cidr}{until}"


def _is_live() -> Any:
    return IpRuleRow.expires_at.is_null() | (IpRuleRow.expires_at > clock.now())


def _view(row: IpRuleRow) -> RuleView:
    return RuleView(**{name: getattr(row, name) for name in RuleView.__struct_fields__})
