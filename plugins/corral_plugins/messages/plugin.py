"""The `messages` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.principal import READERS, WRITERS, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral.redact.redactor import Redactor
from corral_plugins.messages import jobs, models, routes, settings
from corral_plugins.messages.api import EVENTS, Messages
from corral_plugins.messages.service.agent_tools import MessageTools
from corral_plugins.messages.service.delivery import MessageDelivery
from corral_plugins.messages.service.listing import MessageListing
from corral_plugins.messages.service.messages import MessagesService
from corral_plugins.messages.service.metrics import MessageMetrics
from corral_plugins.messages.service.receipts import MessageReceipts
from corral_plugins.messages.service.sending import MessageSending
from corral_plugins.messages.service.trigger_actions import TAINT_CHECK, MessageTriggerAction
from corral_plugins.messages.service.workflow_steps import MessageSteps
from corral_plugins.tools.api import Tool
from corral_plugins.triggers.api import TaintCheck, TriggerAction
from corral_plugins.workflows.api import StepType

if TYPE_CHECKING:
    import click


class MessagesPlugin(Plugin):
    """Messages between agents, and between people and agents.

    A message is sent to one agent, one person or a channel. An agent receives its messages with the next task that it
    claims. A recipient can read, answer or acknowledge a message. Messages that nobody handles expire.
    """

    name = "messages"
    requires = ("accounts", "agents")
    wants = ("tasks", "tools", "triggers", "workflows")
    permissions = (
        Permission("messages.read", "Read messages, threads, channels and inboxes", holders=(*READERS, "agent")),
        Permission("messages.write", "Send, read and acknowledge messages", holders=(*WRITERS, "agent")),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics = MessageMetrics()
        self._tools, self._steps, self._trigger_action = MessageTools(), MessageSteps(), MessageTriggerAction()

    async def start(self, runtime: Runtime) -> None:
        sending, redactor = runtime.service(MessageSending), runtime.service(Redactor)
        for part in (self._tools, self._steps, self._trigger_action):
            part.set_implementation(sending, redactor)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (MessageSending, MessageDelivery, MessageReceipts, MessageListing)
        return [
            Provide(MessageMetrics, lambda: self._metrics),
            *(Provide(part, part) for part in parts),
            Provide(Messages, MessagesService),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes.routes, routes.agent_routes]

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
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return self._metrics.definitions()

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.messages.commands import messages_command_group

        return [messages_command_group]

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        return self._tools.all()

    @hookimpl(optionalhook=True)
    def corral_trigger_actions(self) -> Iterable[TriggerAction]:
        return [self._trigger_action.definition()]

    @hookimpl(optionalhook=True)
    def corral_trigger_taint_checks(self) -> Iterable[TaintCheck]:
        return [TAINT_CHECK]

    @hookimpl(optionalhook=True)
    def corral_workflow_steps(self) -> Iterable[StepType]:
        return self._steps.all()
