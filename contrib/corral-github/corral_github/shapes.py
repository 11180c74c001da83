"""Request and response bodies."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, Name, line

PullRequests = Literal["code_review", "task", "ignore"]
DeliveryStatus = Literal["pending", "done", "ignored", "failed"]
PostStatus = Literal["pending", "posted", "failed"]
RepositoryName = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9._-]{1,100}(?![\s\S])", examples=["corral/kernel"])
]
ApiUrl = Annotated[str, Meta(max_length=300, pattern=r"^https?://[^\s?#@]+(?![\s\S])")]
Labels = Annotated[list[Annotated[str, line(100)]], Meta(max_length=20)]


class NewGitHubRepository(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A repository to connect.

    `token_secret` and `webhook_secret` are the names of vault secrets: the token with which Corral calls the code host,
    and the secret with which the code host signs its deliveries. `pull_requests` determines what Corral creates for a
    pull request: a code review, an agent task, or nothing. An issue becomes a task when it receives one of the
    `issue_labels`.
    """

    name: RepositoryName
    agent_id: Id
    token_secret: Name
    webhook_secret: Name
    api_url: ApiUrl = "https://api.github.com"
    reviewer_agent_id: Id | None = None
    pull_requests: PullRequests = "code_review"
    issue_labels: Labels = []
    enabled: bool = True


class GitHubRepositoryPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Changes to a connected repository. Absent fields stay unchanged.

    After the change, Corral uses the caller's permissions for all work on the repository.
    """

    agent_id: Id | UnsetType = UNSET
    token_secret: Name | UnsetType = UNSET
    webhook_secret: Name | UnsetType = UNSET
    reviewer_agent_id: Id | UnsetType | None = UNSET
    pull_requests: PullRequests | UnsetType = UNSET
    issue_labels: Labels | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class GitHubRepositoryView(msgspec.Struct, kw_only=True):
    """A connected repository.

    `hook_path` is the path of the webhook URL that the code host calls. `waiting` is the number of pull requests and
    issues with pending work. `is_token_tried` says whether the code host has accepted the token. It is false at first,
    because Corral sends no request to the code host before the first delivery.
    """

    id: str
    version: int
    name: str
    api_url: str
    token_secret: str
    webhook_secret: str
    agent_id: str
    reviewer_agent_id: str | None
    pull_requests: PullRequests
    issue_labels: list[str]
    enabled: bool
    owner_id: str
    hook_path: str
    waiting: int
    is_token_tried: bool
    paused_until: Instant | None
    last_error: str | None
    created_at: Instant
    updated_at: Instant
    warnings: list[str] | UnsetType = UNSET


class GitHubRepositoryQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for listing repositories. `search` matches substrings of repository names."""

    search: Annotated[str, line(200, 0)] = ""


class GitHubDeliveryView(msgspec.Struct, kw_only=True):
    """A webhook delivery from the code host, with its result."""

    id: str
    delivery_id: str
    event: str
    action: str
    status: DeliveryStatus
    detail: str | None
    number: int | None
    review_id: str | None
    task_id: str | None
    created_at: Instant
    finished_at: Instant | None


class GitHubPostView(msgspec.Struct, kw_only=True):
    """A comment or a review that Corral has posted or will post."""

    id: str
    kind: Literal["review", "comment"]
    number: int
    status: PostStatus
    attempts: int
    url: str | None
    detail: str | None
    created_at: Instant
    finished_at: Instant | None


class GitHubReceipt(msgspec.Struct, kw_only=True):
    """The response to a delivery. If `duplicate` is true, the same delivery was received before."""

    id: str
    status: DeliveryStatus
    duplicate: bool = False


class GitHubRetry(msgspec.Struct, kw_only=True):
    """The number of failed deliveries and posts that were queued again."""

    deliveries: int
    posts: int


Json = dict[str, Any]
