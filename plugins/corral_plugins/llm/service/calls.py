"""Model calls: the state of a running call, its outcome, its database row and payload, and queries for past calls."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.database.unit import UnitContext
from corral.errors import Invalid, NotFound, Problem
from corral.http.page import Page, newest_first, paginate
from corral.ids import new_id
from corral.plugin import Settings
from corral_plugins.cost.api import MAX_TOKENS, Hold, TokenCounts
from corral_plugins.llm.api import ProviderError
from corral_plugins.llm.models import IN_FLIGHT, LlmCall, LlmPayload
from corral_plugins.llm.providers.scripted import estimate_tokens
from corral_plugins.llm.service.registry import ModelTarget
from corral_plugins.llm.service.responses import TEXT_FIELDS, normalize_usage
from corral_plugins.llm.service.slots import ConcurrencySlot
from corral_plugins.llm.settings import PAYLOAD_DAYS, STORE_PAYLOADS
from corral_plugins.llm.shapes import CallDetail, ChatRequest, EmbeddingRequest, LlmCallQuery, LlmCallView

log = logging.getLogger("corral.llm")

BATCH_ROWS = 500
DAY_SECONDS = 86_400
IMAGE_TOKENS = 1500
MAX_INPUTS = 256
MAX_REPORTED_USD = 1_000_000
UNPRICED = "unpriced"
"""The header value for the cost of a call without a known price."""
# Fields that the gateway handles itself, so that they do not count as unsupported by the provider.
GATEWAY_FIELDS = frozenset({"model", "messages", "input", "n"})
OPENAI_FIELDS = frozenset({*ChatRequest.__struct_fields__, *EmbeddingRequest.__struct_fields__})


class CallOutcome(msgspec.Struct, kw_only=True):
    """The outcome of a call, updated while the call runs. `status` is completed, failed or cancelled.

    `billable` means that a provider may charge for the call. `reported_usage` is the usage that the provider reported;
    if it is missing, tokens are estimated from the text of the request and the response.
    """

    target: ModelTarget
    input_estimate: int
    status: str = "cancelled"
    attempts: int = 0
    billable: bool = False
    reported_usage: Mapping[str, Any] | None = None
    output_bytes: int = 0
    first_token_ms: int | None = None
    duration_ms: int | None = None
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    credentials_refused: bool = False
    cost_micro_usd: int | None = None
    budget_left_micro_usd: int | None = None
    response: Any = None

    def begin_target(self, target: ModelTarget) -> None:
        """Record that the call now goes to the next target, and discard the usage that the previous target reported."""
        self.target, self.billable, self.reported_usage = target, False, None

    def add_chunk(self, chunk: Mapping[str, Any]) -> None:
        """Record the usage, the finish reason and the text length of a chunk, or of a whole response."""
        self.billable = True
        self.reported_usage = chunk.get("usage") or self.reported_usage
        for choice in chunk.get("choices", ()):
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            message = choice.get("delta") or choice.get("message") or {}
            texts = [message.get(name) or "" for name in TEXT_FIELDS]
            texts += [call["function"]["arguments"] for call in message.get("tool_calls", ())]
            self.output_bytes += sum(len(text.encode(errors="replace")) for text in texts)

    def add_provider_error(self, error: ProviderError) -> None:
        """Record that the provider returned an error.

        A rejected request costs nothing, but if the provider had begun to respond, it may charge for the request.
        """
        self.billable, self.reported_usage = error.billable, normalize_usage(error.usage)

    def fail(self, error: Exception) -> None:
        """Record the error with which the call failed."""
        self.status = "failed"
        if isinstance(error, Problem):
            self.error = {"code": error.code, "detail": error.detail}
        else:
            log.error("call failed", exc_info=error, extra={"provider": self.target.provider.name})
            self.error = {"code": "internal", "detail": "The gateway failed with an internal error; see the log."}

    def without_details(self) -> CallOutcome:
        """Return a copy of the outcome that contains only the token counts and a generic error.

        The copy is stored if the outcome itself cannot be stored.
        """
        error = {"code": "internal", "detail": "The outcome of the call could not be stored; see the log."}
        return msgspec.structs.replace(self, status="failed", finish_reason=None, response=None, error=error)

    @property
    def estimated(self) -> bool:
        """Whether the token counts are estimates, because the provider reported none."""
        return self.billable and self.reported_usage is None

    @property
    def tokens(self) -> TokenCounts:
        """The token counts that the provider reported, or estimates. `input_tokens` excludes cache tokens."""
        if not self.billable:
            return TokenCounts()
        usage = self.reported_usage
        if usage is None:
            output = -(-self.output_bytes // 4)
            return TokenCounts(input_tokens=min(self.input_estimate, MAX_TOKENS), output_tokens=min(output, MAX_TOKENS))
        details = usage.get("prompt_tokens_details", {})
        cache_read = details.get("cached_tokens") or usage.get("prompt_cache_hit_tokens", 0)
        cache_write = details.get("cache_write_tokens", 0)
        return TokenCounts(
            input_tokens=max(0, usage.get("prompt_tokens", 0) - cache_read - cache_write),
            output_tokens=usage.get("completion_tokens", 0),
            cache_read_tokens=cache_read,
            cache_write_tokens=cache_write,
        )

    @property
    def reported_cost(self) -> Decimal | None:
        """The cost in USD if the provider reports it, as OpenRouter does, or else None."""
        reported = (self.reported_usage or {}).get("cost")
        if not isinstance(reported, (int, float)) or isinstance(reported, bool):
            return None
        cost = Decimal(str(reported))
        return cost if cost.is_finite() and 0 <= cost < MAX_REPORTED_USD else None

    def usage(self) -> dict[str, Any]:
        """Return the usage in OpenAI's format, either reported or estimated."""
        tokens = self.tokens
        counts = {
            "prompt_tokens": tokens.total - tokens.output_tokens,
            "completion_tokens": tokens.output_tokens,
            "total_tokens": tokens.total,
        }
        return {**(self.reported_usage or {}), **counts}

    def budget_header(self) -> str | None:
        """Return the value of the response header `Corral-Budget-Remaining-Usd`, or None if no budget applies."""
        left = self.budget_left_micro_usd
        return None if left is None else f"{left / 1_000_000:.6f}"

    def cost_header(self) -> str:
        """Return the value of the response header `Corral-Cost-Usd`."""
        return UNPRICED if self.cost_micro_usd is None else f"{self.cost_micro_usd / 1_000_000:.6f}"


class CallRecord(msgspec.Struct, kw_only=True):
    """A call in progress: the id of its row, the targets to try, in order, and its slot at the current provider.

    `max_tokens` limits the response if the request sets no limit. `hold` is the money reserved for the call, or None if
    no budget applies to the call. `run_id` is the id of the workflow run if a workflow step makes the call directly,
    without a task. `limit_micro` is the amount in micro-USD that this run may still spend, or None if the run has no
    limit.
    """

    id: str
    kind: str
    targets: list[ModelTarget]
    slot: ConcurrencySlot | None
    request: dict[str, Any]
    input_tokens: int
    max_tokens: int
    by: Principal
    entry: UnitContext
    started: float
    hold: Hold | None = None
    run_id: str | None = None
    limit_micro: int | None = None

    def new_outcome(self) -> CallOutcome:
        """Return a new outcome for this call. Its status is `cancelled` until the call completes or fails."""
        return CallOutcome(target=self.targets[0], input_estimate=self.input_tokens)

    def fields_for(self, target: ModelTarget) -> dict[str, Any]:
        """Return the request fields to send to the target.

        These are the fields that the target supports and, if the provider's `passthrough` option is on, the fields that
        OpenAI does not define.
        """
        supported = target.provider.supported_fields | {"messages", "input"}
        if target.provider.fields.passthrough:
            supported |= vendor_fields(self.request)
        return {name: value for name, value in self.request.items() if name in supported}

    def ignored_fields(self, target: ModelTarget) -> list[str]:
        """Return the names of the request fields that the target ignores."""
        ignored = self.request.keys() - GATEWAY_FIELDS - self.fields_for(target).keys()
        if self.request.get("store"):  # no provider may store requests, so the field is sent as false
            ignored.add("store")
        return sorted(ignored)


class CallResult(msgspec.Struct, frozen=True):
    """The response of a call and its response headers.

    `cost` is an amount in USD as text, or `unpriced`. `budget_left` is the amount in USD that is left in the budget, or
    None if no budget applies. If several budgets apply, it is the smallest amount.
    """

    response: dict[str, Any]
    call_id: str
    model: str
    ignored: list[str]
    cost: str
    budget_left: str | None = None


def vendor_fields(request: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the request fields that OpenAI does not define."""
    return frozenset(request.keys() - OPENAI_FIELDS)


def inputs_of(given: Any) -> list[Any]:
    """Return the inputs of an embedding request as a list of strings or of lists of token ids.

    Raise `Invalid` unless there are 1 to `MAX_INPUTS` inputs, all of which are texts or all of which are non-empty
    lists of token ids.
    """
    is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    inputs = [given] if is_one else list(given)
    kinds = {type(each) for each in inputs}
    if len(inputs) > MAX_INPUTS or len(kinds) != 1 or [] in inputs or not all(map(_is_input, inputs)):
        detail = f"Send a text, a list of token ids, or a list of 1 to {MAX_INPUTS} texts or of lists of token ids."
        raise Invalid.at("/input", "wrong_type", detail)
    return inputs


def _is_input(value: Any) -> bool:
    return isinstance(value, str) or all(isinstance(token, int) for token in value)


def estimate_input(request: Mapping[str, Any]) -> int:
    """Estimate the number of input tokens: one per 4 bytes of text, and 1,500 per image. Token ids are counted exactly.

    The estimate tends to be too high.
    """
    if "input" in request:
        return sum(estimate_tokens(each) if isinstance(each, str) else len(each) for each in request["input"])
    tokens = sum(_estimate_message(message) for message in request["messages"])
    tools = request.get("tools")
    return tokens + (len(msgspec.json.encode(tools)) // 4 if tools else 0)


def _estimate_message(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    texts = [content] if isinstance(content, str) else []
    images = 0
    for part in content if isinstance(content, list) else ():
        if part.get("type") == "text":
            texts.append(part["text"])
        else:
            images += 1
    texts += [call["function"]["arguments"] for call in message.get("tool_calls") or ()]
    return 4 + sum(estimate_tokens(text) for text in texts) + IMAGE_TOKENS * images


# -- rows

_INSERTED = (
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
_COUNTS = ("attempts", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
_FROM_OUTCOME = ("status", "attempts", "first_token_ms", "duration_ms", "finish_reason", "error", "cost_micro_usd")
_UPDATED = ("provider", "model", "estimated", *_FROM_OUTCOME, *_COUNTS[1:])

_INSERT = Statement(
    lambda p: LlmCall.insert(
        {
            **{getattr(LlmCall, name): p(name) for name in _INSERTED},
            **{getattr(LlmCall, name): 0 for name in _COUNTS},
            LlmCall.status: IN_FLIGHT,
            LlmCall.estimated: False,
        }
    )
)
_SETTLE = Statement(
    lambda p: LlmCall.update({getattr(LlmCall, name): p(name) for name in _UPDATED}).where(
        (LlmCall.id == p("id")) & (LlmCall.status == IN_FLIGHT)
    )
)


def insert_call(kind: str, target: ModelTarget, requested_model: str, by: Principal) -> str:
    """Insert the row of a call that is about to start, and return its id."""
    call_id = new_id()
    _INSERT.run(
        {
            "id": call_id,
            "created_at": clock.now(),
            "kind": kind,
            "provider": target.provider.name,
            "model": target.model[:200],
            "requested_model": requested_model,
            "task_id": by.task_id,
            "lease_id": by.lease_id,
            "agent_id": by.agent_id,
            "user_id": by.user_id,
        }
    )
    return call_id


def settle_call(call_id: str, outcome: CallOutcome) -> bool:
    """Store the outcome of a call in its row. Return False if the row already contains an outcome."""
    columns = {name: getattr(outcome, name) for name in _FROM_OUTCOME} | msgspec.structs.asdict(outcome.tokens)
    target = outcome.target
    columns |= {"provider": target.provider.name, "model": target.model[:200], "estimated": outcome.estimated}
    columns["error"] = LlmCall.error.db_value(outcome.error)
    return bool(_SETTLE.run({"id": call_id, **columns}))


def fail_abandoned(older_than_seconds: float) -> int:
    """Mark at most 500 abandoned calls as failed, and return their number.

    A call counts as abandoned if it has been in flight for longer than `older_than_seconds`, because the process that
    made it must have died by then.
    """
    in_flight, before = LlmCall.status == IN_FLIGHT, clock.now(-older_than_seconds)
    abandoned = LlmCall.select(LlmCall.id).where(in_flight & (LlmCall.created_at < before)).limit(BATCH_ROWS)
    error = {"code": "internal", "detail": "The process that made the call ended before the response arrived."}
    update = LlmCall.update(status="failed", error=error)
    return int(update.where(in_flight & LlmCall.id.in_(abandoned)).execute())


# -- payloads


class PayloadStore:
    """Stores redacted requests and responses as the `llm.store_payloads` setting specifies.

    Runs in the caller's unit of work.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def stores_completed(self) -> bool:
        """Return whether responses of completed calls are stored.

        If so, the chunks of each stream must be assembled into a whole response.
        """
        return self._settings.get(STORE_PAYLOADS) == "all"

    def store_payload(self, call_id: str, request: dict[str, Any], outcome: CallOutcome) -> None:
        """Store the request and the response of a call if the `llm.store_payloads` setting requires it."""
        which = self._settings.get(STORE_PAYLOADS)
        if which == "all" or (which == "errors" and outcome.status == "failed"):
            LlmPayload.insert(
                call_id=call_id, created_at=clock.now(), request=request, response=outcome.response
            ).on_conflict_ignore().execute()

    def delete_of_user(self, user_id: str) -> bool:
        """Delete at most 500 payloads of a purged user. Return whether more might remain."""
        of_calls = LlmPayload.select(LlmPayload.call_id).join(LlmCall, on=(LlmCall.id == LlmPayload.call_id))
        of_user = of_calls.where(LlmCall.user_id == user_id).limit(BATCH_ROWS)
        return bool(LlmPayload.delete().where(LlmPayload.call_id.in_(of_user)).execute() == BATCH_ROWS)

    def delete_expired(self) -> int:
        """Delete at most 500 payloads older than `llm.payload_days`, and return their number."""
        before = clock.now(-self._settings.get(PAYLOAD_DAYS) * DAY_SECONDS)
        old = LlmPayload.select(LlmPayload.call_id).where(LlmPayload.created_at < before).limit(BATCH_ROWS)
        return int(LlmPayload.delete().where(LlmPayload.call_id.in_(old)).execute())


# -- queries


def list_calls(query: LlmCallQuery, by: Principal) -> Page[LlmCallView]:
    """Return a page of calls, newest first.

    Admins see all calls; other users see their own calls and the calls of all tasks.
    """
    calls: Any = LlmCall.select().where(_visible_to(by))
    for field in ("task_id", "agent_id", "provider", "model"):
        value = getattr(query, field)
        if isinstance(value, str):
            calls = calls.where(getattr(LlmCall, field) == value)
    if isinstance(query.status, list):
        calls = calls.where(LlmCall.status.in_(query.status))
    if query.since is not msgspec.UNSET:
        calls = calls.where(LlmCall.created_at >= clock.from_datetime(query.since))
    return paginate(calls, query, by, scope="llm.calls", order=newest_first(LlmCall), make=_call_view)


def get_call(call_id: str, by: Principal) -> CallDetail:
    """Return a call, with its payload if one is stored.

    Raise `NotFound` if the call does not exist or is not visible to the caller.
    """
    row = LlmCall.get_or_none((LlmCall.id == call_id) & _visible_to(by))
    if row is None:
        raise NotFound("There is no call with this id.")
    stored = LlmPayload.get_or_none(LlmPayload.call_id == call_id)
    payload = None if stored is None else {"request": stored.request, "response": stored.response}
    return CallDetail(**msgspec.structs.asdict(_call_view(row)), payload=payload)


def _visible_to(by: Principal) -> Any:
    if by.is_admin or by.kind == "system":
        return peewee.SQL("1 = 1")
    return LlmCall.task_id.is_null(False) | (LlmCall.user_id == by.user_id)


def _call_view(row: LlmCall) -> LlmCallView:
    values = {name: getattr(row, name) for name in LlmCallView.__struct_fields__ if name not in ("ts", "cost_usd")}
    cost = row.cost_micro_usd
    return LlmCallView(ts=row.created_at, cost_usd=None if cost is None else cost / 1e6, **values)
