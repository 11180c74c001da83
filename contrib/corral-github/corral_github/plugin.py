"""The `github` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from corral.auth.principal import READERS, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Metric, Plugin, Provide, hookimpl
from corral_github import jobs, models
from corral_github.routes import routes
from corral_github.service.ingress import GitHubIngress
from corral_github.service.issues import Issues
from corral_github.service.pull_requests import PullRequests
from corral_github.service.repositories import Repositories
from corral_github.service.rest_client import RepositoryClients
from corral_github.service.secrets import RepositorySecrets
from corral_github.service.worker import ThreadWorker

if TYPE_CHECKING:
    import click

PARTS = (RepositorySecrets, Repositories, GitHubIngress, RepositoryClients, PullRequests, Issues, ThreadWorker)
DECISIONS = ("code_review.approved", "code_review.changes_requested", "code_review.rejected")


class GitHubPlugin(Plugin):
    """The GitHub integration. Pull requests become code reviews, and issues become tasks.

    Each human decision and each agent result is posted to GitHub exactly once.
    """

    name = "github"
    requires = ("accounts", "agents", "code_reviews", "secrets", "tasks")
    wants = ("admin",)
    permissions = (
        Permission("github.read", "Read connected GitHub repositories", holders=READERS),
        Permission("github.manage", "Connect GitHub repositories"),
    )

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(part, part) for part in PARTS]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return jobs.JOBS

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return [
            Subscriber("github.decisions", DECISIONS, jobs.on_decision),
            Subscriber("github.results", ("task.completed", "task.failed"), jobs.on_task_ended),
        ]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_github_waiting",
                help="Number of pull requests and issues that are waiting to be processed.",
                collect=_count_waiting,
            )
        ]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_github.commands import github_command_group

        return [github_command_group]


def _count_waiting() -> dict[tuple[str, ...], float]:
    return {(): float(models.Thread.select().where(models.Thread.run_at.is_null(False)).count())}
