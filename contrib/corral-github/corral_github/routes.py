"""The HTTP routes for repositories, deliveries and posts, and the webhook endpoint that GitHub calls."""

from __future__ import annotations

import msgspec

from corral.auth.principal import PUBLIC, Principal
from corral.database.engine import Work
from corral.egress.client import Egress
from corral.http.answers import Answer, IfMatch, Request
from corral.http.page import Page, PageQuery
from corral.http.routes import MIB, Routes
from corral_github.api import DELIVERY_REUSED, INVALID_SIGNATURE
from corral_github.service.ingress import DELIVERIES, GitHubIngress
from corral_github.service.repositories import Repositories
from corral_github.shapes import (
    GitHubDeliveryView,
    GitHubPostView,
    GitHubReceipt,
    GitHubRepositoryPatch,
    GitHubRepositoryQuery,
    GitHubRepositoryView,
    GitHubRetry,
    NewGitHubRepository,
)

READ, MANAGE = "github.read", "github.manage"
CHANGES = ("not_found", "precondition_failed", "unknown_reference", "invalid_state")

routes = Routes("/github", tag="GitHub")


@routes.get("/repositories", needs=READ, raises=("invalid_cursor",))
def list_github_repositories(
    query: GitHubRepositoryQuery, repositories: Repositories, caller: Principal
) -> Page[GitHubRepositoryView]:
    """List the connected repositories."""
    return repositories.list(query, by=caller)


@routes.post(
    "/repositories", needs=MANAGE, status=201, raises=("duplicate", "unknown_reference", "url_blocked", "forbidden")
)
async def connect_github_repository(
    body: NewGitHubRepository,
    repositories: Repositories,
    egress: Egress,
    caller: Principal,
    request: Request,
    work: Work,
) -> GitHubRepositoryView:
    """Connect a repository. Corral performs all work for the repository with the caller's permissions."""
    warnings = await egress.check_saved_url(body.api_url, pointer="/api_url")
    made = await work(lambda: repositories.create(body, by=caller), entry=request.unit_context(caller))
    return msgspec.structs.replace(made, warnings=warnings) if warnings else made


@routes.get("/repositories/{id}", needs=READ, live=True)
def get_github_repository(id: str, repositories: Repositories, caller: Principal) -> GitHubRepositoryView:
    """Get a connected repository."""
    return repositories.get(id, by=caller)


@routes.patch("/repositories/{id}", needs=MANAGE, raises=CHANGES)
def update_github_repository(
    id: str, body: GitHubRepositoryPatch, match: IfMatch, repositories: Repositories, caller: Principal
) -> GitHubRepositoryView:
    """Change a repository. From then on, Corral performs all work for the repository with the caller's permissions."""
    return repositories.update(id, body, match, by=caller)


@routes.delete("/repositories/{id}", needs=MANAGE, raises=CHANGES)
def disconnect_github_repository(id: str, match: IfMatch, repositories: Repositories, caller: Principal) -> None:
    """Disconnect a repository. Its code reviews and tasks remain."""
    repositories.delete(id, match, by=caller)


@routes.post("/repositories/{id}/retry", needs=MANAGE)
def retry_github_repository(id: str, repositories: Repositories, caller: Principal) -> GitHubRetry:
    """Retry failed deliveries and posts immediately, even if GitHub has asked Corral to wait."""
    return repositories.retry(id, by=caller)


@routes.get("/repositories/{id}/deliveries", needs=READ, raises=("invalid_cursor",))
def list_github_deliveries(
    id: str, query: PageQuery, repositories: Repositories, caller: Principal
) -> Page[GitHubDeliveryView]:
    """List the webhook deliveries for a repository, newest first."""
    return repositories.deliveries(id, query, by=caller)


@routes.get("/repositories/{id}/posts", needs=READ, raises=("invalid_cursor",))
def list_github_posts(id: str, query: PageQuery, repositories: Repositories, caller: Principal) -> Page[GitHubPostView]:
    """List the posts to a repository, including unsent posts, newest first."""
    return repositories.posts(id, query, by=caller)


@routes.post(
    "/hooks/{id}",
    needs=PUBLIC,
    status=202,
    also=(200,),
    keyed=False,
    body_limit=2 * MIB,
    rate=DELIVERIES,
    raises=(INVALID_SIGNATURE, DELIVERY_REUSED, "vault_sealed"),
)
async def receive_github_delivery(
    id: str, body: bytes, ingress: GitHubIngress, request: Request
) -> Answer[GitHubReceipt]:
    """Receive a webhook delivery from GitHub.

    The response is sent after the delivery has been stored. The status is 202, or 200 if the same delivery was received
    before.
    """
    receipt = await ingress.receive(id, body, request)
    return Answer(body=receipt, status=200 if receipt.duplicate else 202)
