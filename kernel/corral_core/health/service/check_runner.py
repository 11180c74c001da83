"""Runs the health checks of the kernel and of all plugins, lists configuration warnings, and raises alerts.

The checks run concurrently, each with a timeout. An alert is raised when a check has been down for 60 s, and another
one when the check recovers. The states of the checks are stored in the database, so each alert is raised only once even
if several processes run the checks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Literal

import msgspec

from corral import clock
from corral.errors import Problem
from corral.events.alerts import raise_alert
from corral.events.event import SystemAlert, emit
from corral.plugin import Contributions, HealthCheck, InstallationConfig
from corral.redact.redactor import Redactor
from corral.schema.fields import Instant
from corral.settings.registry import SettingsRegistry
from corral_core.accounts.api import REGISTRATION
from corral_core.health.models import HealthRow
from corral_core.health.service.kernel_checks import CheckResult, KernelChecks

log = logging.getLogger("corral.health")

Status = Literal["ok", "degraded", "down", "disabled"]
WORST_LAST: tuple[Status, ...] = ("disabled", "ok", "degraded", "down")
ALWAYS = ("database", "redis", "storage", "mail", "vault", "queue", "plugins", "workers", "clock", "disk")
CHECK_SECONDS, KEEP_SECONDS = 2.0, 5.0
ABSENT: CheckResult = ("disabled", "No active plugin uses it.")


class CheckView(msgspec.Struct, kw_only=True):
    """The state of one dependency. `since` is the time at which this process first observed the current status."""

    status: Status
    latency_ms: int
    detail: str
    since: Instant


class HealthReport(msgspec.Struct, kw_only=True):
    """A report on all health checks. `status` is the worst status among all checks that are not `disabled`."""

    status: Status
    checked_at: Instant
    version: str
    uptime_ms: int
    checks: dict[str, CheckView]
    warnings: list[str]


class HealthBoard:
    """Runs the health checks at most once every 5 s, regardless of the number of callers."""

    def __init__(
        self,
        checks: KernelChecks,
        contributions: Contributions,
        redactor: Redactor,
        installation: InstallationConfig,
        settings: SettingsRegistry,
    ) -> None:
        self._own, self._contributions, self._redactor = checks, contributions, redactor
        self._installation, self._settings = installation, settings
        self._began = time.monotonic()
        self._views: dict[str, CheckView] = {}
        self._waiting: dict[str, asyncio.Task[CheckResult]] = {}
        self._wrong_statuses: set[str] = set()  # the checks whose unknown status was logged
        self._asked: tuple[float, asyncio.Task[str]] | None = None

    async def full_report(self) -> HealthReport:
        """Return the complete health report. This takes at most 2.5 s."""
        checked_at = await self.run_checks()
        statuses = [view.status for view in self._views.values() if view.status != "disabled"]
        return HealthReport(
            status=max(statuses, key=WORST_LAST.index, default="ok"),
            checked_at=checked_at,
            version=version("corral"),
            uptime_ms=round((time.monotonic() - self._began) * 1000),
            checks=dict(sorted(self._views.items())),
            warnings=self.configuration_warnings(),
        )

    async def run_checks(self) -> str:
        """Run all checks, unless they ran within the last 5 s. Return the time of the last run."""
        asked = self._asked
        if asked is None or (asked[1].done() and time.monotonic() - asked[0] > KEEP_SECONDS):
            asked = self._asked = (time.monotonic(), asyncio.ensure_future(self._run_all_checks()))
        return await asyncio.shield(asked[1])

    def last_results(self) -> dict[str, CheckView]:
        """Return the results of the last run, keyed by the name of the check."""
        return dict(self._views)

    def configuration_warnings(self) -> list[str]:
        """Return warnings about configuration that is unsuitable for production."""
        here = self._installation
        names = (item.setting.name for item in self._settings.settings_in_service())
        ignored = [name for name in names if name in self._settings.problems]
        found = {
            "rate_limits_off": not here.rate_limits,
            "synchronous_normal": here.is_synchronous_normal,
            "registration_open_on_public_bind": here.is_public and self._settings.get(REGISTRATION) == "open",
            "key_in_data_dir": here.key_in_data_dir,
            "safe_mode": here.safe_mode,
            "ip_rules_disabled": here.ip_rules_disabled,
        }
        return [name for name, holds in found.items() if holds] + [f"invalid_setting: {name}" for name in ignored]

    async def _run_all_checks(self) -> str:
        checks: list[tuple[str, str, Callable[[], Awaitable[CheckResult]]]] = [
            (name, name, check) for name, check in self._own.all_checks().items()
        ]
        checks += [
            (item.name, f"{plugin}.{item.name}", _check_in_thread(item)) for plugin, item in self._contributed_checks()
        ]
        told = await asyncio.gather(*[self._run_check(key, check) for _, key, check in checks])
        now = clock.now()
        for name in {*ALWAYS, *(name for name, _, _ in checks)}:
            found = [answer for (other, _, _), answer in zip(checks, told, strict=True) if other == name]
            status, detail, latency = _merge_same_name(found)
            before = self._views.get(name)
            since = before.since if before is not None and before.status == status else now
            self._views[name] = CheckView(status=status, latency_ms=latency, detail=detail, since=since)
        return now

    def _contributed_checks(self) -> Iterable[tuple[str, HealthCheck]]:
        return self._contributions.for_hook("corral_health_checks")

    async def _run_check(self, key: str, check: Callable[[], Awaitable[CheckResult]]) -> tuple[Status, str, int]:
        """Run one check. Return its status, a sentence that explains it, and the latency in milliseconds.

        A check that times out counts as `down`, and is not started again before it returns.
        """
        began = time.monotonic()
        task = self._waiting.get(key)
        if task is None:
            task = self._waiting[key] = asyncio.ensure_future(check())
            task.add_done_callback(lambda done: self._discard_late_result(key, done))
        await asyncio.wait({task}, timeout=CHECK_SECONDS)
        latency = round((time.monotonic() - began) * 1000)
        if not task.done():
            return "down", f"It did not answer within {CHECK_SECONDS:g} s.", latency
        status, detail = self._result_of(key, task)
        return status, self._redactor.redact(detail)[:500], latency

    def _discard_late_result(self, key: str, task: asyncio.Task[CheckResult]) -> None:
        """Discard the result of a check that returned after its timeout."""
        self._waiting.pop(key, None)
        if not task.cancelled():
            task.exception()

    def _result_of(self, key: str, task: asyncio.Task[CheckResult]) -> tuple[Status, str]:
        try:
            status, detail = task.result()
        except Problem as problem:
            return "down", problem.detail
        except Exception as error:  # the message may contain an address, so the report omits it
            log.warning("a health check failed", extra={"check": key}, exc_info=error)
            return "down", f"The check failed ({type(error).__name__})."
        known = next((known for known in WORST_LAST if known == status), None)
        if known is None and key not in self._wrong_statuses:
            self._wrong_statuses.add(key)
            told = {"check": key, "status": str(status)[:100], "allowed": ", ".join(WORST_LAST)}
            log.warning("a health check returned an unknown status, which counts as down", extra=told)
        return known or "down", str(detail)


def _check_in_thread(item: HealthCheck) -> Callable[[], Awaitable[CheckResult]]:
    return lambda: asyncio.to_thread(item.check)


def _merge_same_name(found: list[tuple[Status, str, int]]) -> tuple[Status, str, int]:
    """Combine the results of checks with the same name.

    Return the worst status, the details of the checks with this status, and the longest latency.
    """
    if not found:
        return "disabled", ABSENT[1], 0
    worst = max((status for status, _, _ in found), key=WORST_LAST.index)
    return worst, " ".join(detail for status, detail, _ in found if status == worst), max(took for _, _, took in found)


# -- alerts


PATIENCE_SECONDS = 60.0


def raise_alerts(views: Mapping[str, CheckView]) -> None:
    """Raise an alert for each check that has been down for 60 s or has recovered, and store the states of all checks.

    If little disk space is left, the alert `disk_low` is raised immediately, before writes fail. Runs in the caller's
    unit of work. At most one process at a time may call this function.
    """
    before = {row.name: row for row in HealthRow.select()}
    now, patience = clock.now(), clock.now(-PATIENCE_SECONDS)
    rows = []
    for name, view in views.items():
        row = before.get(name)
        since = row.since if row is not None and row.status == view.status else now
        alerted = row is not None and row.alerted
        if view.status == "down" and not alerted and since <= patience:
            _emit_alert(name, view, "critical", f"{name} is down")
            alerted = True
        elif view.status != "down" and alerted:
            _emit_alert(name, view, "info", f"{name} has recovered")
            alerted = False
        rows.append({"name": name, "status": view.status, "since": since, "alerted": alerted})
    kept = [HealthRow.status, HealthRow.since, HealthRow.alerted]
    HealthRow.insert_many(rows).on_conflict(conflict_target=[HealthRow.name], preserve=kept).execute()
    HealthRow.delete().where(HealthRow.name.not_in(list(views))).execute()
    if (disk := views.get("disk")) is not None and disk.status in ("degraded", "down"):
        severity = "warning" if disk.status == "degraded" else "critical"
        alert = SystemAlert(
            kind="disk_low", severity=severity, title="The disk has little free space", detail=disk.detail
        )
        raise_alert(alert, ("disk", "data"))


def _emit_alert(name: str, view: CheckView, severity: str, title: str) -> None:
    alert = SystemAlert(
        kind="health", severity=severity, title=title, detail=view.detail, check=name, status=view.status
    )
    emit(alert, object=("check", name))
