"""The rows of calls: begun in one unit, settled in another, read by who may see them."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Problem
from corral.http.page import Page, newest_first, paginate
from corral.ids import new_id
from corral_plugins.llm.models import IN_FLIGHT, LlmCall
from corral_plugins.llm.shapes import CallQuery, CallView

log = logging.getLogger("corral.llm")

SWEEP_AT_ONCE = 500


class Ending(msgspec.Struct, kw_only=True):
    """How a call went, for its row."""

    status: str = "completed"
    provider: str = ""
    model: str = ""
    attempts: int = 1
    input_tokens: int = 0
    output_tokens: int = 0
    first_token_ms: int | None = None
    duration_ms: int | None = None
    finish_reason: str | None = None
    error: dict[str, Any] | None = None

    def note_answer(self, response: dict[str, Any]) -> None:
        """Usage and finish of a whole answer."""
        self.status = "completed"
        self.note_chunk(response)

    def note_chunk(self, chunk: dict[str, Any]) -> None:
        """Usage and finish, if this chunk tells them."""
        if usage := chunk.get("usage"):
            self.input_tokens = int(usage.get("prompt_tokens") or 0)
            self.output_tokens = int(usage.get("completion_tokens") or 0)
        for choice in chunk.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def note_failure(self, error: Exception) -> Exception:
        """Why it failed; the error comes back to be raised."""
        self.status = "failed"
        if isinstance(error, Problem):
            self.error = {"code": error.code, "detail": error.detail}
        else:
            log.error("a provider raised", exc_info=error, extra={"provider": self.provider})
            self.error = {"code": "internal", "detail": f"The provider {self.provider} failed with a bug; see the log."}
        return error


def begin(kind: str, provider: str, model: str, asked: str, by: Principal) -> str:
    """Write the row of a call that is about to be made; returns its id."""
    identifier = new_id()
    LlmCall.insert(
        id=identifier,
        created_at=clock.now(),
        kind=kind,
        provider=provider,
        model=model[:200],
        requested_model=asked,
        task_id=by.task_id,
        agent_id=by.agent_id,
        user_id=by.user_id,
    ).execute()
    return identifier


def settle(call_id: str, ending: Ending) -> bool:
    """Write how it went, once; False: it was settled before."""
    changed = (
        LlmCall.update(**msgspec.structs.asdict(ending))
        .where((LlmCall.id == call_id) & (LlmCall.status == IN_FLIGHT))
        .execute()
    )
    return bool(changed)


def sweep(older_than_seconds: float) -> int:
    """Calls whose process died are `failed`; at most 500 a time."""
    before = clock.now(-older_than_seconds)
    orphans = (
        LlmCall.select(LlmCall.id)
        .where((LlmCall.status == IN_FLIGHT) & (LlmCall.created_at < before))
        .limit(SWEEP_AT_ONCE)
    )
    error = {"code": "internal", "detail": "The process that made the call ended before the answer."}
    return int(
        LlmCall.update(status="failed", error=error)
        .where((LlmCall.status == IN_FLIGHT) & LlmCall.id.in_(orphans))
        .execute()
    )


def page(query: CallQuery, by: Principal) -> Page[CallView]:
    """Own calls and those of tasks, which every reader sees; an admin sees all."""
    wanted: Any = LlmCall.select().where(_seen(by))
    for field in ("task_id", "agent_id", "provider", "model"):
        value = getattr(query, field)
        if isinstance(value, str):
            wanted = wanted.where(getattr(LlmCall, field) == value)
    if isinstance(query.status, list):
        wanted = wanted.where(LlmCall.status.in_(query.status))
    if query.since is not msgspec.UNSET:
        wanted = wanted.where(LlmCall.created_at >= clock.from_datetime(query.since))
    return paginate(wanted, query, by, scope="llm.calls", order=newest_first(LlmCall), make=_view)


def _seen(by: Principal) -> Any:
    if by.is_admin or by.kind == "system":
        return peewee.SQL("1 = 1")
    return LlmCall.task_id.is_null(False) | (LlmCall.user_id == by.user_id)


def _view(row: LlmCall) -> CallView:
    return CallView(
        id=row.id,
        ts=row.created_at,
        kind=row.kind,
        provider=row.provider,
        model=row.model,
        requested_model=row.requested_model,
        task_id=row.task_id,
        agent_id=row.agent_id,
        conversation_id=row.conversation_id,
        user_id=row.user_id,
        status=row.status,
        attempts=row.attempts,
        input_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
        first_token_ms=row.first_token_ms,
        duration_ms=row.duration_ms,
        finish_reason=row.finish_reason,
        error=row.error,
    )
