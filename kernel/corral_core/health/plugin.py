"""The manifest and the hook implementations of the `health` plugin."""

from __future__ import annotations

from collections.abc import Iterable

from corral import clock
from corral.auth.principal import Permission
from corral.database.engine import Database, Work
from corral.database.model import Model
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, hookimpl
from corral_core.health.jobs import SCHEDULES
from corral_core.health.models import HealthRow
from corral_core.health.routes import egress, health
from corral_core.health.service.check_runner import HealthBoard
from corral_core.health.service.egress_audit import METRICS, EgressAudit
from corral_core.health.service.heap_trimming import HeapTrimming
from corral_core.health.service.kernel_checks import KernelChecks, last_recorded_time
from corral_core.health.service.process_metrics import LoopLag, ProcessMetrics
from corral_core.health.service.readiness import ReadinessProbe
from corral_core.health.service.scrape import MetricsRenderer
from corral_core.health.service.sibling_processes import SiblingProcesses
from corral_core.health.service.single_machine_lock import SingleMachineLock


class HealthPlugin(Plugin):
    """Health: readiness, health checks, metrics, and the rules for outgoing connections."""

    name = "health"
    wants = ("accounts",)
    protected = "essential"
    starts_first = True  # the single-machine lock must be acquired before any write
    prefixes = ("settings",)
    permissions = (Permission("settings.read", "View settings, health and the rules for outgoing connections"),)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(ReadinessProbe, ReadinessProbe),
            Provide(SiblingProcesses, SiblingProcesses),
            Provide(LoopLag, LoopLag),
            Provide(ProcessMetrics, ProcessMetrics),
            Provide(MetricsRenderer, MetricsRenderer),
            Provide(KernelChecks, KernelChecks),
            Provide(HealthBoard, HealthBoard),
            Provide(EgressAudit, EgressAudit),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [health.routes, health.settings_routes, egress.routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [HealthRow]

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return SCHEDULES

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return METRICS

    async def start(self, runtime: Runtime) -> None:
        """Start the background tasks of this process.

        First, ensure that this process's clock is not behind the latest time recorded by the installation. If the
        database is a file, also acquire the lock that lets the processes of only one machine use it.
        """
        clock.continue_from(await runtime.service(Work)(last_recorded_time, read=True))
        if runtime.service(Database).is_file:
            lock = SingleMachineLock(runtime.service(Work))
            await lock.acquire()
            runtime.supervise("single_machine_lock", lock.renew_regularly)
        runtime.supervise("egress_audit", runtime.service(EgressAudit).write_refusals)
        runtime.supervise("loop_lag", runtime.service(LoopLag).measure_lag)
        runtime.supervise("heap_trimming", HeapTrimming().trim_regularly)
        runtime.when_draining(runtime.service(ReadinessProbe).begin_shutdown)
        scrape = runtime.service(MetricsRenderer)
        self._siblings = runtime.service(SiblingProcesses)
        runtime.when_serving(lambda address: self._siblings.serve_metrics(address, scrape.render_own))

    async def stop(self) -> None:
        await self._siblings.stop_serving()
