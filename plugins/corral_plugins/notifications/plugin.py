"""The `notifications` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.principal import READERS, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.events.live_feed import Feed
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_plugins.marketplace.api import Installer
from corral_plugins.notifications import hookspecs, jobs, models, routes, settings
from corral_plugins.notifications.api import EVENTS, ChannelType
from corral_plugins.notifications.service.apprise_services import AppriseChannelTypes
from corral_plugins.notifications.service.channel_types import ChannelTypeRegistry
from corral_plugins.notifications.service.channels import ChannelManagement
from corral_plugins.notifications.service.claims import DeliveryClaims
from corral_plugins.notifications.service.credentials import ChannelCredentials
from corral_plugins.notifications.service.deliveries import NotificationDeliveries
from corral_plugins.notifications.service.direct_notifications import DirectNotifications
from corral_plugins.notifications.service.dispatcher import NotificationDispatcher
from corral_plugins.notifications.service.email import EmailChannel
from corral_plugins.notifications.service.fan_out import NotificationFanOut, RuleMatching
from corral_plugins.notifications.service.http import ChannelHttp
from corral_plugins.notifications.service.inbox import Inbox
from corral_plugins.notifications.service.mentions import Mentions
from corral_plugins.notifications.service.metrics import NotificationMetrics
from corral_plugins.notifications.service.notify_action_and_step import NotifyActionAndStep
from corral_plugins.notifications.service.outcomes import DeliveryOutcomes
from corral_plugins.notifications.service.outgoing_messages import OutgoingMessages
from corral_plugins.notifications.service.preferences import PreferenceManagement
from corral_plugins.notifications.service.recipients import People
from corral_plugins.notifications.service.redactor_values import ChannelRedactorValues
from corral_plugins.notifications.service.rule_previews import RulePreviews
from corral_plugins.notifications.service.rules import RuleManagement
from corral_plugins.notifications.service.send_test import ChannelTester
from corral_plugins.notifications.service.sender import ChannelSender
from corral_plugins.notifications.service.slack import SlackChannel
from corral_plugins.notifications.service.telegram import TelegramChannel
from corral_plugins.notifications.service.template_installer import RuleTemplateInstaller
from corral_plugins.notifications.service.validation import ChannelChecks, RuleChecks
from corral_plugins.notifications.service.webhook import WebhookChannel
from corral_plugins.triggers.api import TriggerAction
from corral_plugins.workflows.api import StepType

if TYPE_CHECKING:
    import click

PARTS: tuple[type[Any], ...] = (
    ChannelHttp,
    EmailChannel,
    SlackChannel,
    TelegramChannel,
    WebhookChannel,
    ChannelTypeRegistry,
    ChannelCredentials,
    ChannelRedactorValues,
    ChannelChecks,
    RuleChecks,
    ChannelManagement,
    RuleManagement,
    PreferenceManagement,
    NotificationDeliveries,
    Inbox,
    People,
    Mentions,
    RuleMatching,
    RulePreviews,
    NotificationFanOut,
    OutgoingMessages,
    ChannelSender,
    ChannelTester,
    DeliveryClaims,
    DeliveryOutcomes,
    NotificationDispatcher,
    DirectNotifications,
)


class NotificationsPlugin(Plugin):
    """Notifications about events that need people's attention, in the app and through other channels.

    People see notifications in the app immediately. Rules that admins create also send them by email, Slack, Telegram
    or a webhook. A burst of events becomes one message, and no message is lost while a channel is down.
    """

    name = "notifications"
    requires = ("accounts", "event_log", "expressions", "secrets")
    wants = (
        "admin",
        "approvals",
        "circuit_breakers",
        "code_reviews",
        "marketplace",
        "messages",
        "triggers",
        "webhooks",
        "workflows",
    )
    permissions = (
        Permission("notifications.read", "Read and mark one's own notifications", holders=READERS),
        Permission("notifications.manage", "Manage the channels and rules of notifications, and read deliveries"),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics, self._notify, self._installer = (
            NotificationMetrics(),
            NotifyActionAndStep(),
            RuleTemplateInstaller(),
        )
        self._apprise = AppriseChannelTypes()
        self._unwatch: Callable[[], None] = lambda: None
        self._dispatcher: NotificationDispatcher | None = None

    async def start(self, runtime: Runtime) -> None:
        values = runtime.service(ChannelRedactorValues)
        self._unwatch = runtime.service(Feed).watch(values.on_events)
        await values.refresh()
        self._notify.set_implementation(runtime.service(DirectNotifications))
        self._installer.management = runtime.service(RuleManagement)
        self._installer.checks = runtime.service(RuleChecks)
        self._apprise.http = runtime.service(ChannelHttp)
        await runtime.service(NotificationFanOut).create_cursor()
        runtime.service(ChannelSender).declare()
        self._dispatcher = runtime.service(NotificationDispatcher)
        self._dispatcher.start()
        runtime.supervise("redactor values", values.run)
        runtime.supervise("dispatch", self._dispatcher.run)
        runtime.when_draining(self._dispatcher.drain)

    async def stop(self) -> None:
        self._unwatch()
        if self._dispatcher is not None:
            await self._dispatcher.stop()

    @hookimpl
    def corral_hookspecs(self) -> Iterable[Any]:
        return [hookspecs]

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(NotificationMetrics, lambda: self._metrics), *(Provide(part, part) for part in PARTS)]

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
        from corral_plugins.notifications.commands import notifications_command_group

        return [notifications_command_group]

    @hookimpl
    def corral_notification_channels(self) -> Iterable[ChannelType]:
        return self._apprise.definitions()

    @hookimpl(optionalhook=True)
    def corral_trigger_actions(self) -> Iterable[TriggerAction]:
        return [self._notify.action()]

    @hookimpl(optionalhook=True)
    def corral_workflow_steps(self) -> Iterable[StepType]:
        return [self._notify.step()]

    @hookimpl(optionalhook=True)
    def corral_template_installers(self) -> Iterable[Installer]:
        return [self._installer.definition()]
