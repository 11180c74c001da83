"""Stores and evaluates the IP rules, and provides the gate that checks the client address of every request."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Database
from corral.database.unit import ANONYMOUS, SYSTEM_CONTEXT, UnitContext
from corral.errors import Conflict, FieldError, Forbidden, Invalid, PreconditionFailed, Problem
from corral.events.event import emit
from corral.events.log import LoggedEvent
from corral.http.answers import IfMatch
from corral.http.client_address import canonical_ip
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_plugins.security.api import IpRulesChanged
from corral_plugins.security.models import ROW, IpModeRow, IpRuleRow
from corral_plugins.security.shapes import AddressVerdict, NewRule, NewRules, RulesView, RuleView

# -- evaluation


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


def _network_fault(text: str) -> str:
    """Say why a text is no network, and what to write instead."""
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        return f"{text or 'An empty text'} is not an IP address or network, such as 203.0.113.7 or 10.0.0.0/8"
    return f"{text} is neither a network nor an address: write {interface.network} or {interface.ip}"


def parse_network(text: str) -> str:
    """Return the canonical form of an address or network. Raise `ValueError` if the text is neither.

    IPv4-mapped IPv6 addresses become IPv4 addresses.
    """
    if "%" in text:
        raise ValueError(
            f"{text} contains an IPv6 zone; omit the zone, because client addresses are compared without zones"
        )
    try:
        network: Network = ipaddress.ip_network(text.strip())
    except ValueError:
        raise ValueError(_network_fault(text.strip())) from None
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(MAPPED):
        base = ipaddress.IPv4Address(int(network.network_address) & 0xFFFFFFFF)
        network = ipaddress.IPv4Network((base, network.prefixlen - 96))
    return str(network)


class IpRule(NamedTuple):
    """An IP rule that has not expired."""

    id: str
    cidr: str
    action: str


class IpRuleset:
    """The mode and the rules against which addresses are checked.

    If several rules match an address, the rule with the most specific network applies. If two rules have the same
    network, `block` takes precedence over `allow`.
    """

    def __init__(self, mode: str, rules: Iterable[IpRule]) -> None:
        self.mode = mode
        found: dict[tuple[int, int], dict[int, IpRule]] = {}
        for rule in rules:
            network = ipaddress.ip_network(rule.cidr)
            same = found.setdefault((network.version, network.prefixlen), {})
            key = int(network.network_address)
            if key not in same or rule.action == "block":
                same[key] = rule
        self._tables: dict[int, list[tuple[int, dict[int, IpRule]]]] = {4: [], 6: []}
        for (version, length), table in sorted(found.items(), reverse=True):
            self._tables[version].append(((32 if version == 4 else 128) - length, table))

    def evaluate(self, address: str) -> tuple[bool, IpRule | None]:
        """Return whether an address is allowed, and the rule that applies, if any.

        This method performs one lookup for each prefix length in use.
        """
        rule = self._find_rule(address)
        if self.mode == "off":
            return True, rule
        if rule is None:
            return self.mode == "blocklist", None
        return rule.action == "allow", rule

    def _find_rule(self, address: str) -> IpRule | None:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:  # a peer without an IP address (a Unix socket) is in no network
            return None
        number = int(parsed)
        for shift, table in self._tables[parsed.version]:
            rule = table.get(number >> shift << shift)
            if rule is not None:
                return rule
        return None


# -- the stored rules


MODE_OFF = "off"
LOCKED_OUT = "These rules would refuse your own address; add a rule that allows it, or send `force`."


class ActiveIpRules(msgspec.Struct, frozen=True):
    """The IP rules that have not expired. `until` is the time at which the first of them expires."""

    version: int
    rules: IpRuleset
    count: int
    until: str | None


class IpRules:
    """Manages the IP rules. No other class writes to their tables."""

    audit: Audit | None = None

    def get_rules(self, client_ip: str) -> RulesView:
        """Return the stored rules, including expired ones, and their mode."""
        mode: Any = IpModeRow.get_by_id(ROW)
        rows = IpRuleRow.select().order_by(IpRuleRow.position)
        return RulesView(
            mode=mode.mode, rules=[_rule_view(row) for row in rows], version=mode.version, your_ip=client_ip
        )

    def version(self) -> int:
        """Return the version of the rules, which increases with every change."""
        return int(IpModeRow.select(IpModeRow.version).where(IpModeRow.id == ROW).scalar())

    def active_rules(self) -> ActiveIpRules:
        """Return the rules that apply now. Expired rules are omitted."""
        mode = IpModeRow.get_by_id(ROW)
        rows = list(IpRuleRow.select().where(_is_live()))
        rules = IpRuleset(mode.mode, [IpRule(row.id, row.cidr, row.action) for row in rows])
        until = min((row.expires_at for row in rows if row.expires_at is not None), default=None)
        return ActiveIpRules(mode.version, rules, len(rows), until)

    def check_address(self, address: str) -> AddressVerdict:
        """Check whether the rules allow an address. Raise `Invalid` if the text is not an IP address."""
        folded = canonical_ip(address)
        if not folded:
            raise Invalid.at("/ip", "bad_format", "Give an IPv4 or IPv6 address.")
        allowed, rule = self.active_rules().rules.evaluate(folded)
        return AddressVerdict(allowed=allowed, rule=None if rule is None else _rule_view(IpRuleRow.get_by_id(rule.id)))

    def replace_rules(self, new: NewRules, *, client_ip: str, if_match: IfMatch, by: Principal | None) -> RulesView:
        """Replace all rules.

        Raise `Invalid` for invalid rules, `Conflict` (`would_lock_out`) if the rules reject `client_ip` and `new.force`
        is false, or `PreconditionFailed` if `if_match` does not match.
        """
        rows = _to_rows(new.rules, by)
        before = self.get_rules(client_ip)
        if_match.check(before.version)
        now = clock.now()
        living = [
            IpRule(row.id, row.cidr, row.action) for row in rows if row.expires_at is None or row.expires_at > now
        ]
        if not new.force and not IpRuleset(new.mode, living).evaluate(client_ip)[0]:
            raise Conflict(LOCKED_OUT, code="would_lock_out", your_ip=client_ip)
        here = (IpModeRow.id == ROW) & (IpModeRow.version == before.version)
        update = IpModeRow.update(mode=new.mode, version=IpModeRow.version + 1, updated_at=now)
        if not update.where(here).execute():
            raise PreconditionFailed(
                "The rules were replaced in the meantime; fetch them again and repeat the change.",
                current_version=self.version(),
            )
        existing: dict[tuple[str, str], RuleView] = {(rule.cidr, rule.action): rule for rule in before.rules}
        for row in rows:
            if (same := existing.get((row.cidr, row.action))) is not None:
                row.id, row.created_by, row.created_at = same.id, same.created_by, same.created_at
        IpRuleRow.delete().execute()
        if rows:
            IpRuleRow.insert_many([row.__data__ for row in rows]).execute()
        self._publish_change(before, new, rows)
        return self.get_rules(client_ip)

    def turn_off(self) -> None:
        """Set the mode of the IP rules to `off`, in order to recover from a lockout. The rules are kept."""
        before = self.get_rules("")
        update = IpModeRow.update(mode=MODE_OFF, version=IpModeRow.version + 1, updated_at=clock.now())
        if update.where((IpModeRow.id == ROW) & (IpModeRow.mode != MODE_OFF)).execute():
            emit(IpRulesChanged(mode=MODE_OFF, count=len(before.rules)), object=("ip_rules", str(ROW)))
            self._record_audit({"mode": (before.mode, MODE_OFF)})

    @staticmethod
    def delete_expired() -> int:
        """Delete expired rules, which no longer have any effect. Return the number of deleted rules."""
        return int(IpRuleRow.delete().where(IpRuleRow.expires_at <= clock.now()).execute())

    def record_refusal(self) -> None:
        """Record a rejected request in the audit log, with the client address of the current unit of work."""
        if self.audit is not None:
            entry = AuditEntry(
                action="security.ip_rules.refuse",
                object_type="ip_rules",
                object_id=str(ROW),
                outcome="denied",
                code="ip_blocked",
            )
            self.audit.record(entry)

    def _publish_change(self, before: RulesView, new: NewRules, rows: list[IpRuleRow]) -> None:
        emit(IpRulesChanged(mode=new.mode, count=len(rows)), object=("ip_rules", str(ROW)))
        old, now = {_describe_rule(rule) for rule in before.rules}, {_describe_rule(row) for row in rows}
        changes: dict[str, tuple[Any, Any]] = {}
        if before.mode != new.mode:
            changes["mode"] = before.mode, new.mode
        if old != now:
            changes["rules"] = sorted(old - now), sorted(now - old)
        self._record_audit(changes)

    def _record_audit(self, changes: Mapping[str, tuple[Any, Any]]) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action="security.ip_rules.change", object_type="ip_rules", object_id=str(ROW), changes=changes
            )
            self.audit.record(entry)


def _to_rows(rules: list[NewRule], by: Principal | None) -> list[IpRuleRow]:
    """Build the database rows for the rules. Raise `Invalid` with an error for each invalid or duplicate network."""
    rows, faults, seen, now = [], [], set(), clock.now()
    for index, rule in enumerate(rules):
        try:
            cidr = parse_network(rule.cidr)
        except ValueError as error:
            faults.append(FieldError(f"/rules/{index}/cidr", "bad_format", f"{error}."))
            continue
        if (cidr, rule.action) in seen:
            faults.append(FieldError(f"/rules/{index}/cidr", "not_unique", f"{rule.action} {cidr} is listed twice."))
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


def _describe_rule(rule: RuleView | IpRuleRow) -> str:
    """Return a text representation of a rule for the audit log."""
    until = "" if rule.expires_at is None else f" until {rule.expires_at}"
    return f"{rule.action} {rule.cidr}{until}"


def _is_live() -> Any:
    return IpRuleRow.expires_at.is_null() | (IpRuleRow.expires_at > clock.now())


def _rule_view(row: IpRuleRow) -> RuleView:
    return RuleView(**{name: getattr(row, name) for name in RuleView.__struct_fields__})


# -- the gate


log = logging.getLogger("corral.security")

POLL_SECONDS = 1.0
AUDIT_SECONDS = 60.0
MAX_VERDICTS = 10_000  # maximum number of cached addresses
HEALTH = ("/health/", "/api/v1/health/")  # these paths and the paths below them, but no other path with the same prefix


class IpGate:
    """Checks the client address of each request against the IP rules. Implements `Gate`.

    If the rules are off, checking a request takes a single comparison. The verdict on each address is cached until the
    rules change.
    """

    def __init__(self) -> None:
        self.blocked = 0
        self._in_force: ActiveIpRules | None = None
        self._open = True
        self._verdicts: dict[str, bool] = {}
        self._recorded: dict[str, float] = {}
        self._pending: dict[str, None] = {}

    def check(self, client_ip: str, method: str, path: str) -> None:
        if self._open:
            return
        allowed = self._verdicts.get(client_ip)
        if allowed is None:
            allowed = self._evaluate_address(client_ip)
        if not allowed and not f"{path}/".startswith(HEALTH):
            self._refuse_address(client_ip)

    def set_rules(self, found: ActiveIpRules | None) -> None:
        """Replace the rules of this gate. None turns the gate off."""
        self._in_force, self._verdicts = found, {}
        self._open = found is None or found.rules.mode == "off"

    @property
    def version(self) -> int:
        """The version of the rules in this gate, or -1 if no rules are loaded."""
        return -1 if self._in_force is None else self._in_force.version

    @property
    def is_stale(self) -> bool:
        """Whether a rule in this gate has expired since the rules were loaded."""
        until = None if self._in_force is None else self._in_force.until
        return until is not None and until <= clock.now()

    def take_rejected_addresses(self) -> list[str]:
        """Return and clear the rejected addresses to record in the audit log.

        Each address is recorded at most once a minute.
        """
        now = clock.time_s()
        self._recorded = {client_ip: at for client_ip, at in self._recorded.items() if now - at < AUDIT_SECONDS}
        found, self._pending = list(self._pending), {}
        return found

    def _evaluate_address(self, client_ip: str) -> bool:
        assert self._in_force is not None
        if len(self._verdicts) >= MAX_VERDICTS:
            self._verdicts.clear()
        allowed, _ = self._in_force.rules.evaluate(client_ip)
        self._verdicts[client_ip] = allowed
        return allowed

    def _refuse_address(self, client_ip: str) -> None:
        self.blocked += 1
        now = clock.time_s()
        if now - self._recorded.get(client_ip, 0.0) >= AUDIT_SECONDS and len(self._recorded) < MAX_VERDICTS:
            self._recorded[client_ip] = now
            self._pending[client_ip] = None
        raise Forbidden(
            f"The IP rules refuse your address {client_ip}; ask an admin to allow this address.", code="ip_blocked"
        )


class IpGateUpdater:
    """Keeps the IP rules in this process's gate up to date.

    Rules are reloaded when an event reports a change or polling detects one.
    """

    def __init__(self, database: Database, rules: IpRules, gate: IpGate) -> None:
        self._database, self._work, self._rules, self._gate = database, database.work, rules, gate
        self._changed = asyncio.Event()

    async def load_rules(self) -> None:
        """Load the current rules into the gate."""
        self._gate.set_rules(await self._work(self._rules.active_rules, read=True))

    def on_events(self, records: Sequence[LoggedEvent]) -> None:
        """Wake up `follow_changes` if the IP rules changed. The event feed calls this method."""
        if any(record.type == "ip_rules.changed" for record in records):
            self._changed.set()

    async def follow_changes(self) -> None:
        """Reload changed rules and record rejected requests. Runs as a supervised task."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            try:
                if self._gate.is_stale or await self._stored_version() != self._gate.version:
                    await self.load_rules()
                await self._record_refusals()
            except Problem as problem:  # the database is unreachable; the loaded rules stay in force
                log.warning("the IP rules could not be read", extra={"reason": problem.detail})

    async def _stored_version(self) -> int:
        return await self._database.read(self._rules.version, SYSTEM_CONTEXT)

    async def _record_refusals(self) -> None:
        """Record each rejected request in its own unit of work, because a unit of work has only one client address."""
        for client_ip in self._gate.take_rejected_addresses():
            entry = UnitContext("ip rules", ANONYMOUS, client_ip=client_ip)
            with contextlib.suppress(Problem):  # the request was rejected anyway; the audit plugin reports failures
                await self._work(self._rules.record_refusal, entry=entry)
