"""The `code_reviews` plugin: its manifest and its hook implementations."""

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
from corral_plugins.code_reviews import jobs, models, settings
from corral_plugins.code_reviews.api import EVENTS, CodeReviews
from corral_plugins.code_reviews.routes import routes
from corral_plugins.code_reviews.service.agent_tools import AgentReviews, ReviewTools
from corral_plugins.code_reviews.service.comments import ReviewComments
from corral_plugins.code_reviews.service.decisions import ReviewDecisions
from corral_plugins.code_reviews.service.listing import ReviewListing
from corral_plugins.code_reviews.service.metrics import ReviewMetrics
from corral_plugins.code_reviews.service.opening import CodeReviewsService
from corral_plugins.code_reviews.service.patch_preparation import ReviewContents
from corral_plugins.code_reviews.service.review_tasks import ReviewTasks
from corral_plugins.tools.api import Tool

if TYPE_CHECKING:
    import click

PARTS = (
    ReviewContents,
    ReviewTasks,
    CodeReviewsService,
    ReviewListing,
    ReviewDecisions,
    ReviewComments,
    AgentReviews,
)


class CodeReviewsPlugin(Plugin):
    """Code reviews: people read the changes that agents propose, and approve them or send them back.

    A decision applies only to the exact diff that was read, and the agent receives all comments at once.
    """

    name = "code_reviews"
    requires = ("accounts", "agents", "tasks")
    wants = ("files", "tools")
    permissions = (
        Permission("code_reviews.read", "Read code reviews", holders=(*READERS, "agent")),
        Permission("code_reviews.write", "Open code reviews and comment on them", holders=(*WRITERS, "agent")),
        Permission("code_reviews.decide", "Decide code reviews", holders=WRITERS),
        Permission("code_reviews.manage", "Change the code reviews of others, and approve despite open blockers"),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics = ReviewMetrics()
        self._tools = ReviewTools()

    async def start(self, runtime: Runtime) -> None:
        self._tools.implementation = runtime.service(AgentReviews)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(ReviewMetrics, lambda: self._metrics),
            *(Provide(part, part) for part in PARTS),
            Provide(CodeReviews, _provide_reviews),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return EVENTS

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return [Subscriber("code_reviews.tasks", ("task.cancelled",), jobs.on_task_cancelled)]

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
        from corral_plugins.code_reviews.commands import reviews_command_group

        return [reviews_command_group]

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        return self._tools.all()


def _provide_reviews(service: CodeReviewsService) -> CodeReviews:
    return service
