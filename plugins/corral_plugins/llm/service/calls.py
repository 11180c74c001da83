"""The rows of calls: begun in one unit, settled in another, read by who may see them."""

from __future__ import annotations

from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.errors import NotFound
from corral.http.page import Page, newest_first, paginate
from corral.ids import new_id
from corral_plugins.llm.models import IN_FLIGHT, LlmCall
from corral_plugins.llm.service.outcome import Outcome
from corral_plugins.llm.service.payloads import payload_of
from corral_plugins.llm.shapes import CallDetail, CallQuery, CallView

SWEEP_AT_ONCE = 500


_GIVEN = (
    "id",
    "created_at",
    "kind",
    "provider",
    "model",
    "requested_model",
    "task_id",
    "lease_id",
    "agent_id",
    "user_id",
)
_ZERO = ("attempts", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
_SETTLED = (
    "provider",
    "model",
    "status",
    *_ZERO,
    "estimated",
    "cost_micro_usd",
    "first_token_ms",
    "duration_ms",
    "finish_reason",
    "error",
)

_BEGIN = Statement(
    lambda p: LlmCall.insert(
        {
            **{getattr(LlmCall, name): p(name) for name in _GIVEN},
            **{getattr(LlmCall, name): 0 for name in _ZERO},
            LlmCall.status: IN_FLIGHT,
            LlmCall.estimated: False,
        }
    )
)
_SETTLE = Statement(
    lambda p: LlmCall.update({getattr(LlmCall, name): p(name, getattr(LlmCall, name)) for name in _SETTLED}).where(
        (LlmCall.id == p("id")) & (LlmCall.status == IN_FLIGHT)
    )
)


def begin(kind: str, provider: str, model: str, asked: str, by: Principal) -> str:
    """Write the row of a call that is about to be made; returns its id."""
    identifier = new_id()
    _BEGIN.run(
        {
            "id": identifier,
            "created_at": clock.now(),
            "kind": kind,
            "provider": provider,
            "model": model[:200],
            "requested_model": asked,
            "task_id": by.task_id,
            "lease_id": by.lease_id,
            "agent_id": by.agent_id,
            "user_id": by.user_id,
        }
    )
    return identifier


def settle(call_id: str, outcome: Outcome) -> bool:
    """Write how it went, once; False: it was settled before."""
    return bool(_SETTLE.run({"id": call_id, **outcome.columns()}))


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


def get(call_id: str, by: Principal) -> CallDetail:
    """One call, with what was asked and answered if that was kept; `NotFound` too when the caller may not see it."""
    row = LlmCall.get_or_none((LlmCall.id == call_id) & _seen(by))
    if row is None:
        raise NotFound("There is no call with this id.")
    fields = msgspec.structs.asdict(_view(row))
    return CallDetail(**fields, payload=payload_of(row.id))


def _seen(by: Principal) -> Any:
    if by.is_admin or by.kind == "system":
        return peewee.SQL("1 = 1")
    return LlmCall.task_id.is_null(False) | (LlmCall.user_id == by.user_id)


def _view(row: LlmCall) -> CallView:
    names = [name for name in CallView.__struct_fields__ if name not in ("ts", "cost_usd")]
    cost = row.cost_micro_usd
    values = {name: getattr(row, name) for name in names}
    return CallView(ts=row.created_at, cost_usd=None if cost is None else cost / 1e6, **values)
