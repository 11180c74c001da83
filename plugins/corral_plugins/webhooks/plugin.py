"""The `webhooks` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.principal import READERS, WRITERS, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.events.live_feed import Feed
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral.redact.redactor import Redactor
from corral_plugins.triggers.api import TriggerAction
from corral_plugins.webhooks import jobs, models, routes, settings
from corral_plugins.webhooks.api import EVENTS, Signer
from corral_plugins.webhooks.service.claims import DeliveryClaims
from corral_plugins.webhooks.service.credentials import WebhookCredentials
from corral_plugins.webhooks.service.deliveries import WebhookDeliveries
from corral_plugins.webhooks.service.dispatcher import WebhookDispatcher, hosts_of_webhooks
from corral_plugins.webhooks.service.fan_out import WebhookFanOut
from corral_plugins.webhooks.service.management import WebhookManagement
from corral_plugins.webhooks.service.metrics import WebhookMetrics
from corral_plugins.webhooks.service.outcomes import DeliveryOutcomes
from corral_plugins.webhooks.service.payloads import WebhookEvents
from corral_plugins.webhooks.service.redactor_values import WebhookRedactorValues
from corral_plugins.webhooks.service.send_test import WebhookTester
from corral_plugins.webhooks.service.sender import WebhookSender
from corral_plugins.webhooks.service.signing import StandardSigner
from corral_plugins.webhooks.service.trigger_actions import WebhookTriggerAction
from corral_plugins.webhooks.service.validation import WebhookChecks

if TYPE_CHECKING:
    import click


class WebhooksPlugin(Plugin):
    """Webhooks, which send events to users' systems as signed HTTP requests.

    Corral retries each delivery for days. Owners see every attempt and can resend missed deliveries.
    """

    name = "webhooks"
    requires = ("accounts", "event_log")
    wants = ("admin", "circuit_breakers", "triggers")
    permissions = (
        Permission("webhooks.read", "Read one's own webhooks and their deliveries", holders=READERS),
        Permission("webhooks.write", "Create and change one's own webhooks", holders=WRITERS),
        Permission("webhooks.manage", "List the webhooks of all users without details, and disable them"),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics, self._trigger_action = WebhookMetrics(), WebhookTriggerAction()
        self._dispatcher: WebhookDispatcher | None = None
        self._unwatch: Callable[[], None] = lambda: None

    async def start(self, runtime: Runtime) -> None:
        values = runtime.service(WebhookRedactorValues)
        self._unwatch = runtime.service(Feed).watch(values.on_events)
        await values.refresh()
        self._trigger_action.set_implementation(runtime.service(Redactor))
        await runtime.service(WebhookFanOut).create_cursor()
        runtime.service(WebhookSender).declare(hosts_of_webhooks)
        self._dispatcher = runtime.service(WebhookDispatcher)
        self._dispatcher.start()
        runtime.supervise("redactor values", values.run)
        runtime.supervise("dispatch", self._dispatcher.run)
        runtime.when_draining(self._dispatcher.drain)

    async def stop(self) -> None:
        self._unwatch()
        if self._dispatcher is not None:
            await self._dispatcher.stop()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (
            StandardSigner,
            WebhookCredentials,
            WebhookEvents,
            WebhookChecks,
            WebhookManagement,
            WebhookDeliveries,
            WebhookFanOut,
            DeliveryClaims,
            DeliveryOutcomes,
            WebhookSender,
            WebhookTester,
            WebhookDispatcher,
            WebhookRedactorValues,
        )
        return [
            Provide(WebhookMetrics, lambda: self._metrics),
            *(Provide(part, part) for part in parts),
            Provide(Signer, _provide_signer),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes.routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return EVENTS

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return jobs.SUBSCRIBERS

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return settings.ALL

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return jobs.JOBS

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return self._metrics.definitions()

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.webhooks.commands import webhooks_command_group

        return [webhooks_command_group]

    @hookimpl(optionalhook=True)
    def corral_trigger_actions(self) -> Iterable[TriggerAction]:
        return [self._trigger_action.definition()]


def _provide_signer(signer: StandardSigner) -> Signer:
    return signer
