"""Receives webhook deliveries: verifies the signature over the raw bytes, and stores the data that the handlers need.

The response is sent only after the delivery's row has been committed. A job calls the code host later.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any

import msgspec

from corral import clock
from corral.database.engine import Work
from corral.database.unit import ANONYMOUS, UnitContext
from corral.errors import Conflict, Malformed, Problem, Unauthorized, Unavailable
from corral.http.answers import Request
from corral.http.routes import Rate
from corral.ids import new_id
from corral.plugin import RateLimits
from corral.schema.strict_json import parse_json
from corral_github.api import DELIVERY_REUSED, INVALID_SIGNATURE
from corral_github.models import Delivery, Repository, Thread
from corral_github.service.secrets import RepositorySecrets
from corral_github.service.work_queue import wake
from corral_github.shapes import DeliveryStatus, GitHubReceipt, Json

DELIVERIES = Rate("github delivery", 1200, 60, "key")
UNSIGNED = Rate("unsigned github delivery", 120, 60, "key")
SEEN_ACTIONS = {
    "pull_request": ("opened", "reopened", "synchronize", "ready_for_review", "closed"),
    "issues": ("labeled",),
}
TEXT_CHARACTERS = 60_000
TRIES = 3
NO_SIGNATURE = "The signature is missing or wrong."


class ReceivedDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """A verified delivery.

    `number` is the number of the pull request or issue. If it is not set, the delivery requires no work, and `detail`
    contains the reason.
    """

    delivery_id: str
    sha256: str
    event: str
    action: str
    kind: str = ""
    number: int | None = None
    facts: Json | None = None
    detail: str | None = None


class GitHubIngress:
    """Receives webhook deliveries. Call `receive` outside units of work."""

    limits: RateLimits | None

    def __init__(self, work: Work, repository_secrets: RepositorySecrets) -> None:
        self._work, self._secrets = work, repository_secrets

    async def receive(self, repository_id: str, body: bytes, request: Request) -> GitHubReceipt:
        """Store a delivery. Raise `Unauthorized` if the signature is wrong or the repository is not connected."""
        repository, values = await self._work(lambda: self._find(repository_id.lower()), read=True)
        is_signed = _is_signed(body, request.header("x-hub-signature-256"), values)
        if repository is None or not is_signed:
            self._take_token(UNSIGNED, request.client_ip)  # strangers do not use up the limit of the repository
            raise Unauthorized(NO_SIGNATURE, code=INVALID_SIGNATURE)
        self._take_token(DELIVERIES, repository.id)
        received = _read_delivery(repository, body, request)
        entry = UnitContext(
            label=request.label, actor=ANONYMOUS, request_id=request.request_id, client_ip=request.client_ip
        )
        return await self._work(lambda: _record(repository.id, received), entry=entry)

    def _take_token(self, rate: Rate, key: str) -> None:
        if self.limits is not None:
            self.limits.take(rate, key)

    def _find(self, repository_id: str) -> tuple[Repository | None, list[str]]:
        row: Repository | None = Repository.get_or_none(Repository.id == repository_id)
        if row is None:
            return None, []
        try:
            return row, self._secrets.webhook_values(row)
        except Problem as problem:
            if problem.status >= 500:  # the vault is sealed: the host delivers again when an admin asks it to
                raise
            return row, []


def _is_signed(body: bytes, header: str | None, values: list[str]) -> bool:
    """Return whether the body was signed with one of the secrets in `values`. The comparison takes constant time."""
    given = (header or "").strip().lower().encode("utf-8", "replace")
    keys = values or [secrets.token_hex()]  # an unknown repository takes as long as a wrong signature
    wanted = [b"sha256=" + hmac.new(key.encode(), body, hashlib.sha256).hexdigest().encode() for key in keys]
    matches = [hmac.compare_digest(given, each) for each in wanted]
    return any(matches) and bool(values)


def _read_delivery(repository: Repository, body: bytes, request: Request) -> ReceivedDelivery:
    media = (request.header("content-type") or "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Problem("Set the content type of the webhook to application/json.", code="unsupported_media_type")
    event, delivery_id = request.header("x-github-event") or "", request.header("x-github-delivery") or ""
    if not 1 <= len(event) <= 50 or not 1 <= len(delivery_id) <= 100 or not f"{event}{delivery_id}".isprintable():
        raise Malformed("The headers X-GitHub-Event and X-GitHub-Delivery are missing or unusable.")
    payload = parse_json(body, lenient=True)
    if not isinstance(payload, dict):
        raise Malformed("The payload is not a JSON object.")
    action = _text(payload, "action", limit=50)
    common: Json = {
        "delivery_id": delivery_id,
        "sha256": hashlib.sha256(body).hexdigest(),
        "event": event,
        "action": action,
    }
    if detail := _why_ignored(repository, event, action, payload):
        return ReceivedDelivery(**common, detail=detail)
    kind, name = ("pull", "pull_request") if event == "pull_request" else ("issue", "issue")
    found = payload.get(name)
    number = found.get("number") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(number, int) or not 0 < number < 2**31:
        raise Malformed(f"The payload has no {name} with a number.")
    return ReceivedDelivery(**common, kind=kind, number=number, facts=_issue_facts(found) if kind == "issue" else {})


def _why_ignored(repository: Repository, event: str, action: str, payload: Json) -> str | None:
    owner = payload.get("repository")
    name = _text(owner, "full_name", limit=200).lower() if isinstance(owner, dict) else ""
    if event == "ping":
        return "The webhook works."
    if action not in SEEN_ACTIONS.get(event, ()):
        return "Corral ignores this event."
    if name != repository.name:
        return "The delivery is about another repository."
    if not repository.enabled:
        return "The repository is disabled."
    if event == "pull_request":
        return "Pull requests are ignored." if repository.pull_requests == "ignore" else None
    label = payload.get("label")
    if not isinstance(label, dict) or label.get("name") not in repository.issue_labels:
        return "No task is created for this label."
    return None


def _issue_facts(issue: Json) -> Json:
    author = issue.get("user")
    return {
        "title": _text(issue, "title", limit=500),
        "body": _text(issue, "body", limit=TEXT_CHARACTERS),
        "url": _text(issue, "html_url", limit=500),
        "state": _text(issue, "state", limit=20),
        "updated_at": _text(issue, "updated_at", limit=40),
        "author": _text(author, "login", limit=100) if isinstance(author, dict) else "",
    }


def _text(found: Json, name: str, *, limit: int) -> str:
    value = found.get(name)
    return value[:limit] if isinstance(value, str) else ""


def _record(repository_id: str, received: ReceivedDelivery) -> GitHubReceipt:
    """Insert the row of a delivery and return its receipt, or the receipt of an earlier delivery with the same body.

    Raise `Conflict` if an earlier delivery has the same id but another body. Retry if another unit of work deletes old
    rows, or the rows of a disconnected repository, at the same time. Raise `Unavailable` after too many attempts.
    """
    for _ in range(TRIES):
        receipt = _insert(repository_id, received) or _receipt_of_duplicate(repository_id, received)
        if receipt is not None:
            return receipt
    raise Unavailable(
        "Deliveries from this repository are being deleted at the moment; send this delivery again.", code="overloaded"
    )


def _insert(repository_id: str, received: ReceivedDelivery) -> GitHubReceipt | None:
    """Insert the row of a delivery.

    Return None if the row conflicts with the row of another delivery, or if the delivery's thread has just been
    deleted.
    """
    thread_id = None
    if received.number is not None:
        thread_id = _thread_of(repository_id, received.kind, received.number)
        if thread_id is None:
            return None
    now = clock.now()
    status: DeliveryStatus = "ignored" if thread_id is None else "pending"
    made: dict[str, Any] = {
        "id": new_id(),
        "repository_id": repository_id,
        "thread_id": thread_id,
        "delivery_id": received.delivery_id,
        "body_sha256": received.sha256,
        "event": received.event,
        "action": received.action,
        "facts": received.facts,
        "status": status,
        "detail": received.detail,
        "created_at": now,
        "waiting_since": now,
        "finished_at": None if thread_id else now,
    }
    if not Delivery.insert(made).on_conflict_ignore().as_rowcount().execute():
        return None
    if thread_id is not None and not wake(thread_id):
        raise Unauthorized(NO_SIGNATURE, code=INVALID_SIGNATURE)  # the repository was disconnected meanwhile
    return GitHubReceipt(id=made["id"], status=status)


def _thread_of(repository_id: str, kind: str, number: int) -> str | None:
    new = {"id": new_id(), "repository_id": repository_id, "kind": kind, "number": number, "heads": {}}
    Thread.insert(new).on_conflict_ignore().execute()
    same = (Thread.repository_id == repository_id) & (Thread.kind == kind) & (Thread.number == number)
    found: Thread | None = Thread.get_or_none(same)
    return None if found is None else str(found.id)


def _receipt_of_duplicate(repository_id: str, received: ReceivedDelivery) -> GitHubReceipt | None:
    """Return the receipt of an earlier delivery with the same body, or None if there is none.

    Deliveries with equal bodies count as identical, because the signature covers only the body. Raise `Conflict` if an
    earlier delivery has the same id but another body.
    """
    mine = Delivery.repository_id == repository_id
    first: Delivery | None = Delivery.get_or_none(mine & (Delivery.body_sha256 == received.sha256))
    if first is not None:
        status: Any = first.status
        return GitHubReceipt(id=first.id, status=status, duplicate=True)
    if Delivery.select().where(mine & (Delivery.delivery_id == received.delivery_id)).exists():
        raise Conflict(
            "Another delivery with this id had a different body; use a new id for each delivery.", code=DELIVERY_REUSED
        )
    return None
