"""The manifest and the hook implementations of the `security` plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from corral.auth.principal import Authenticator, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.events.live_feed import Feed
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import (
    Gate,
    InstallationConfig,
    Metric,
    Plugin,
    Provide,
    RateLimiter,
    RateLimits,
    Runtime,
    Setting,
    Settings,
    hookimpl,
)
from corral_core.accounts.api import UserApiKeys
from corral_core.redis.api import SharedBuckets
from corral_plugins.security import jobs, models
from corral_plugins.security.api import EVENTS, ApiKeyCounts
from corral_plugins.security.routes import admin, keys
from corral_plugins.security.service.api_keys import (
    RESULTS,
    STATUSES,
    ApiKeyAuthenticator,
    ApiKeys,
    KeyMetrics,
    LastUseRecorder,
)
from corral_plugins.security.service.ip_rules import IpGate, IpGateUpdater, IpRules
from corral_plugins.security.service.policies import SecurityPolicies
from corral_plugins.security.service.rate_limits import RequestLimits
from corral_plugins.security.settings import SETTINGS

if TYPE_CHECKING:
    import click


class SecurityPlugin(Plugin):
    """Security: the sign-in policy, IP rules, rate limits and API keys.

    Each change to a policy or to the IP rules is validated as a whole, and rejected if it would lock out its author. An
    accepted change takes effect in all processes within 2 seconds.
    """

    name = "security"
    requires = ("accounts", "redis")
    protected = "essential"
    prefixes = ("http",)
    permissions = (
        Permission("security.read", "View the sign-in policy, the IP rules and the sessions of all users"),
        Permission("security.write", "Change the sign-in policy and the IP rules, and end sessions"),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._gate, self._limits, self._metrics = IpGate(), RequestLimits(), KeyMetrics()
        self._unwatch: Callable[[], None] = lambda: None
        self._last_used: LastUseRecorder | None = None
        self._shared: SharedBuckets | None = None

    async def start(self, runtime: Runtime) -> None:
        here = runtime.service(InstallationConfig)
        runtime.service(SecurityPolicies).register_checks()
        self._last_used, self._shared = runtime.service(LastUseRecorder), runtime.service(SharedBuckets)
        settings: Settings = runtime.service(Settings)
        self._limits.start(settings, self._shared, self._last_used, on=here.rate_limits, processes=here.processes)
        runtime.supervise("last_used", self._last_used.write_regularly)
        if here.rate_limits:
            runtime.supervise("rate_limits", self._limits.apply_settings_regularly)
            if self._shared.is_configured:
                runtime.supervise("shared_rate_limits", self._limits.exchange_counts_regularly)
        if not here.ip_rules_disabled:
            keeper = runtime.service(IpGateUpdater)
            await keeper.load_rules()
            self._unwatch = runtime.service(Feed).watch(keeper.on_events)
            runtime.supervise("ip_rules", keeper.follow_changes)

    async def stop(self) -> None:
        self._unwatch()
        if self._last_used is not None:
            await self._last_used.write_pending()
        if self._shared is not None:
            await self._shared.close()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(IpGate, lambda: self._gate),
            Provide(KeyMetrics, lambda: self._metrics),
            Provide(RateLimits, lambda: self._limits),
            Provide(ApiKeyCounts, _provide_key_counts),
            Provide(UserApiKeys, _provide_user_keys),
            *(Provide(part, part) for part in (IpRules, IpGateUpdater, LastUseRecorder, ApiKeys, SecurityPolicies)),
        ]

    @hookimpl
    def corral_gates(self) -> Iterable[Gate | RateLimiter]:
        return [self._gate, self._limits]

    @hookimpl
    def corral_authenticators(self) -> Iterable[type[Authenticator]]:
        return [ApiKeyAuthenticator]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [admin.routes, keys.routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return EVENTS

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return SETTINGS

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return jobs.SUBSCRIBERS

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.security.command import security_command

        return [security_command]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_ip_blocked_total",
                help="Number of requests refused by the IP rules.",
                kind="counter",
                collect=lambda: {(): float(self._gate.blocked)},
            ),
            Metric(
                name="corral_rate_limited_total",
                help="Number of requests refused by a rate limit or the concurrency limit.",
                kind="counter",
                labels={"bucket": self._limits.names},
                collect=lambda: _counter_values(self._limits.limited),
            ),
            Metric(
                name="corral_api_key_requests_total",
                help="Number of requests with an API key, by result.",
                kind="counter",
                labels={"result": RESULTS},
                collect=lambda: _counter_values(self._metrics.results + self._limits.keys),
            ),
            Metric(
                name="corral_api_keys",
                help="Number of API keys by status.",
                labels={"status": STATUSES},
                collect=ApiKeys.count_by_status,
            ),
        ]


def _counter_values(counter: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    return {(name,): float(count) for name, count in dict(counter).items()}


def _provide_key_counts(keys: ApiKeys) -> ApiKeyCounts:
    return keys


def _provide_user_keys(keys: ApiKeys) -> UserApiKeys:
    return keys
