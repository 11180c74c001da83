"""Connects repositories, and lists their deliveries and posts."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET
from peewee import Case

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.database.unit import locked
from corral.errors import Conflict, Invalid, NotFound
from corral.http.answers import IfMatch
from corral.http.page import Page, PageQuery, newest_first, paginate
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_github.models import Delivery, Post, Repository, Thread
from corral_github.service.secrets import RepositorySecrets
from corral_github.service.work_queue import BATCH_SIZE, wake
from corral_github.shapes import (
    GitHubDeliveryView,
    GitHubPostView,
    GitHubRepositoryPatch,
    GitHubRepositoryQuery,
    GitHubRepositoryView,
    GitHubRetry,
    NewGitHubRepository,
)
from corral_plugins.agents.api import Agents

MAX_REPOSITORIES = 1000
FIELDS = (
    "agent_id",
    "token_secret",
    "webhook_secret",
    "reviewer_agent_id",
    "pull_requests",
    "issue_labels",
    "enabled",
)


class Repositories:
    """The service for repositories. Every method runs in the caller's unit of work."""

    audit: Audit | None

    def __init__(self, agents: Agents, secrets: RepositorySecrets) -> None:
        self._agents, self._secrets = agents, secrets

    def list(self, query: GitHubRepositoryQuery, *, by: Principal) -> Page[GitHubRepositoryView]:
        """Return the repositories, newest first."""
        rows = Repository.select().where(visible(Repository, by))
        if query.search:
            rows = rows.where(Repository.name.contains(query.search.lower()))
        page = paginate(
            rows, query, by, scope="github.repositories", order=newest_first(Repository), make=lambda row: row
        )
        ids = [row.id for row in page.items]
        waiting, tried = _count_waiting_threads(ids), _answering_repositories(ids)
        shown = [_view(row, waiting.get(row.id, 0), row.id in tried) for row in page.items]
        return Page(items=shown, total=page.total, limit=page.limit, offset=page.offset, next=page.next)

    def get(self, repository_id: str, *, by: Principal) -> GitHubRepositoryView:
        """Return a repository. Raise `NotFound` if no connected repository has this id."""
        row = _find(repository_id, by)
        return _view(row, _count_waiting_threads([row.id]).get(row.id, 0), bool(_answering_repositories([row.id])))

    def create(self, new: NewGitHubRepository, *, by: Principal) -> GitHubRepositoryView:
        """Connect a repository. Raise `Conflict` (`duplicate`) if the repository is already connected."""
        if Repository.select().count() >= MAX_REPOSITORIES:
            raise Invalid.at("/name", "not_allowed", f"There can be at most {MAX_REPOSITORIES} repositories.")
        now = clock.now()
        row = Repository(
            id=new_id(),
            name=new.name.lower(),
            api_url=new.api_url.rstrip("/"),
            owner_id=by.user_id,
            created_at=now,
            updated_at=now,
            **{name: getattr(new, name) for name in FIELDS},
        )
        self._check_agents(row)
        if not Repository.insert(row.__data__).on_conflict_ignore().as_rowcount().execute():
            same = (Repository.name == row.name) & (Repository.api_url == row.api_url)
            detail = f"{row.name} is connected already."
            raise Conflict(detail, code="duplicate", existing_id=Repository.get(same).id)
        self._secrets.attach(row, "token", by=by)
        self._secrets.attach(row, "webhook", by=by)
        self._record_audit("connect", row, {name: (None, getattr(row, name)) for name in ("api_url", *FIELDS)})
        return _view(row, 0, is_tried=False)

    def update(
        self, repository_id: str, patch: GitHubRepositoryPatch, match: IfMatch, *, by: Principal
    ) -> GitHubRepositoryView:
        """Change a repository. From then on, Corral performs all work for it with the caller's permissions."""
        row = _find(repository_id, by)
        match.check(row.version)
        given = {name: value for name in FIELDS if (value := getattr(patch, name)) is not UNSET}
        changes = {name: (getattr(row, name), value) for name, value in given.items() if value != getattr(row, name)}
        unchanged = (Repository.id == row.id) & (Repository.version == row.version)
        written = {**given, "owner_id": by.user_id, "version": row.version + 1, "updated_at": clock.now()}
        for name, value in written.items():
            setattr(row, name, value)
        self._check_agents(row)
        if row.enabled and "enabled" in changes:
            _end_pauses(row.id, set())
        # Only these columns: the worker changes others, such as `paused_until`, without a new version.
        if not Repository.update({name: getattr(row, name) for name in written}).where(unchanged).execute():
            raise Conflict("Another request changed the repository at the same time; repeat the request.")
        for part in ("token", "webhook"):
            if f"{part}_secret" in changes:
                self._secrets.attach(row, part, by=by)
        self._record_audit("update", row, changes)
        return _view(row, _count_waiting_threads([row.id]).get(row.id, 0), bool(_answering_repositories([row.id])))

    def delete(self, repository_id: str, match: IfMatch, *, by: Principal) -> None:
        """Disconnect a repository. Its code reviews and tasks remain, but pending posts are not sent."""
        same = Repository.id == repository_id.lower()
        locked(Repository.select(Repository.id).where(same)).first()  # keeps the version as it is
        row = _find(repository_id, by)
        match.check(row.version)
        for model in (Thread, Delivery, Post):  # waits for what wakes a thread, so that its rows are deleted as well
            model.delete().where(model.repository_id == row.id).execute()
        Repository.delete().where(Repository.id == row.id).execute()
        self._secrets.detach(row.id)
        self._record_audit("disconnect", row, {})

    def retry(self, repository_id: str, *, by: Principal) -> GitHubRetry:
        """Requeue the newest failed deliveries and posts, at most `BATCH_SIZE` of each.

        If the code host has asked Corral to wait, the wait ends, so that they are processed immediately.
        """
        row = _find(repository_id, by)
        counts, woken = {}, set()
        models: tuple[Any, ...] = (Delivery, Post)
        for model in models:
            failed = (model.repository_id == row.id) & (model.status == "failed")
            found = list(
                model.select(model.id, model.thread_id).where(failed).order_by(model.id.desc()).limit(BATCH_SIZE)
            )
            again = {"status": "pending", "detail": None, "finished_at": None, "waiting_since": clock.now()}
            model.update(again).where(model.id.in_([each.id for each in found]) & (model.status == "failed")).execute()
            counts[model] = len(found)
            woken |= {each.thread_id for each in found}
        _end_pauses(row.id, woken)
        Repository.update(paused_until=None, last_error=None).where(Repository.id == row.id).execute()
        self._record_audit("retry", row, {})
        return GitHubRetry(deliveries=counts[Delivery], posts=counts[Post])

    def deliveries(self, repository_id: str, query: PageQuery, *, by: Principal) -> Page[GitHubDeliveryView]:
        """Return the webhook deliveries for a repository, newest first."""
        mine = Delivery.repository_id == _find(repository_id, by).id
        return _with_threads(Delivery, mine, query, by, _delivery_view)

    def posts(self, repository_id: str, query: PageQuery, *, by: Principal) -> Page[GitHubPostView]:
        """Return the comments and reviews that Corral has posted or will post to a repository, newest first."""
        mine = Post.repository_id == _find(repository_id, by).id
        return _with_threads(Post, mine, query, by, _post_view)

    def _check_agents(self, row: Repository) -> None:
        wanted = {"/agent_id": row.agent_id.lower()}
        row.agent_id = wanted["/agent_id"]
        if row.reviewer_agent_id is not None:
            row.reviewer_agent_id = wanted["/reviewer_agent_id"] = row.reviewer_agent_id.lower()
        found = self._agents.find_many(list(wanted.values()))
        for pointer, agent_id in wanted.items():
            if agent_id not in found:
                detail = "There is no agent with this id."
                raise Invalid.at(pointer, "unknown_reference", detail, problem="unknown_reference")
        if row.reviewer_agent_id == row.agent_id:
            raise Invalid.at(
                "/reviewer_agent_id", "not_allowed", "An agent cannot review its own changes; name another reviewer."
            )

    def _record_audit(self, verb: str, row: Repository, changes: dict[str, Any]) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"github.repository.{verb}",
                object_type="github_repository",
                object_id=row.id,
                object_name=row.name,
                changes=changes,
            )
            self.audit.record(entry)


def _find(repository_id: str, by: Principal) -> Repository:
    row: Repository | None = Repository.get_or_none((Repository.id == repository_id.lower()) & visible(Repository, by))
    if row is None:
        raise NotFound("There is no connected repository with this id.")
    return row


def _end_pauses(repository_id: str, thread_ids: set[str]) -> None:
    """Make the given threads, and up to `BATCH_SIZE` waiting threads of the repository, due immediately.

    A thread is a pull request or an issue. To avoid deadlocks, every unit of work locks the thread rows before the
    repository row.
    """
    waiting = (Thread.repository_id == repository_id) & Thread.run_at.is_null(False)
    woken = thread_ids | {each.id for each in Thread.select(Thread.id).where(waiting).limit(BATCH_SIZE)}
    # Every row is locked: a condition on `lease_until` would not wait for a holder that is about to release the thread.
    due = Case(None, [(Thread.lease_until.is_null(), clock.now())], Thread.run_at)
    Thread.update(run_at=due).where(Thread.id.in_(list(woken))).execute()
    for thread_id in sorted(woken):
        wake(thread_id)


def _count_waiting_threads(repository_ids: list[str]) -> dict[str, int]:
    """Return the number of pull requests and issues with pending work, keyed by repository id. Sends a single query."""
    from peewee import fn

    waits = Thread.repository_id.in_(repository_ids) & Thread.run_at.is_null(False)
    found: Any = Thread.select(Thread.repository_id, fn.COUNT(Thread.id)).where(waits).group_by(Thread.repository_id)
    return dict(list(found.tuples())) if repository_ids else {}


def _answering_repositories(repository_ids: list[str]) -> set[str]:
    """Return the ids of the repositories in which Corral has already read a pull request or posted something."""
    if not repository_ids:
        return set()
    is_read = (Thread.kind == "pull") & (Thread.review_id.is_null(False) | Thread.task_id.is_null(False))
    read: Any = Thread.select(Thread.repository_id).where(Thread.repository_id.in_(repository_ids) & is_read)
    sent: Any = Post.select(Post.repository_id).where(
        Post.repository_id.in_(repository_ids) & (Post.status == "posted")
    )
    return {row[0] for rows in (read, sent) for row in rows.distinct().tuples()}


def _view(row: Repository, waiting: int, is_tried: bool) -> GitHubRepositoryView:
    computed = {"waiting": waiting, "is_token_tried": is_tried, "hook_path": f"/api/v1/github/hooks/{row.id}"}
    fields = {name: getattr(row, name) for name in Repository._meta.fields}
    return msgspec.convert({**fields, **computed}, GitHubRepositoryView)


def _with_threads(model: Any, mine: Any, query: PageQuery, by: Principal, make: Any) -> Page[Any]:
    """Return a page of deliveries or posts, each with its thread. All threads are read with a single query."""
    rows = model.select().where(mine & visible(model, by))
    page = paginate(rows, query, by, scope=model._meta.table_name, order=newest_first(model), make=lambda row: row)
    ids = [row.thread_id for row in page.items if row.thread_id is not None]
    found = {each.id: each for each in Thread.select().where(Thread.id.in_(ids))} if ids else {}
    shown = [make(row, found.get(row.thread_id)) for row in page.items]
    return Page(items=shown, total=page.total, limit=page.limit, offset=page.offset, next=page.next)


def _delivery_view(row: Delivery, thread: Thread | None) -> GitHubDeliveryView:
    names = ("id", "delivery_id", "event", "action", "status", "detail", "created_at", "finished_at")
    return GitHubDeliveryView(
        **{name: getattr(row, name) for name in names},
        number=None if thread is None else thread.number,
        review_id=None if thread is None else thread.review_id,
        task_id=None if thread is None else thread.task_id,
    )


def _post_view(row: Post, thread: Thread | None) -> GitHubPostView:
    names = ("id", "kind", "status", "attempts", "url", "detail", "created_at", "finished_at")
    return GitHubPostView(**{name: getattr(row, name) for name in names}, number=0 if thread is None else thread.number)
