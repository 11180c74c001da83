"""How a call went: kept while it runs, for its row, its cost event and its headers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from corral.errors import Problem
from corral_plugins.cost.api import MAX_TOKENS, Tokens
from corral_plugins.llm.kinds.scripted import estimate
from corral_plugins.llm.service.registry import Target

log = logging.getLogger("corral.llm")


class Outcome(msgspec.Struct, kw_only=True):
    """`status`: completed | failed | cancelled. `reached`: a provider may have begun to work for money.

    `told`: the provider's own usage; without it tokens are counted from the texts.
    """

    target: Target
    input_estimate: int
    status: str = "cancelled"
    attempts: int = 0
    reached: bool = False
    told: Mapping[str, Any] | None = None
    output_bytes: int = 0
    first_token_ms: int | None = None
    duration_ms: int | None = None
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    credentials_refused: bool = False
    cost_micro_usd: int | None = None
    priced: bool = False
    response: Any = None

    def note_answer(self, response: Mapping[str, Any]) -> None:
        """Usage and finish of a whole answer."""
        self.status, self.reached = "completed", True
        self.note_chunk(response)

    def note_chunk(self, chunk: Mapping[str, Any]) -> None:
        """Usage and finish, if this chunk tells them, and how much text it holds."""
        self.reached = True
        if isinstance(told := chunk.get("usage"), dict) and told:
            self.told = told
        for choice in chunk.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            said = choice.get("delta") or choice.get("message") or {}
            self.output_bytes += len((said.get("content") or "").encode())
            for call in said.get("tool_calls") or ():
                self.output_bytes += len(((call.get("function") or {}).get("arguments") or "").encode())

    def note_failure(self, error: Exception) -> Exception:
        """Why it failed; the error comes back to be raised."""
        self.status = "failed"
        if isinstance(error, Problem):
            self.error = {"code": error.code, "detail": error.detail}
        else:
            log.error("a provider raised", exc_info=error, extra={"provider": self.target.provider.name})
            detail = f"The provider {self.target.provider.name} failed with a bug; see the log."
            self.error = {"code": "internal", "detail": detail}
        return error

    @property
    def estimated(self) -> bool:
        """Whether the counts are not the provider's."""
        return self.reached and self.told is None

    @property
    def tokens(self) -> Tokens:
        """As the provider reports them, those of the cache beside the input; else counted."""
        if not self.reached:
            return Tokens()
        if self.told is None:
            return Tokens(input_tokens=_count(self.input_estimate), output_tokens=_count(-(-self.output_bytes // 4)))
        details = self.told.get("prompt_tokens_details") or {}
        read = _count(details.get("cached_tokens") or self.told.get("prompt_cache_hit_tokens"))
        written = _count(details.get("cache_write_tokens"))
        return Tokens(
            input_tokens=max(0, _count(self.told.get("prompt_tokens")) - read - written),
            output_tokens=_count(self.told.get("completion_tokens")),
            cache_read_tokens=read,
            cache_write_tokens=written,
        )

    @property
    def reported_cost(self) -> Decimal | None:
        """What the provider says that it cost (OpenRouter does)."""
        told = (self.told or {}).get("cost")
        if not isinstance(told, (int, float, str)) or isinstance(told, bool):
            return None
        try:
            cost = Decimal(str(told))
        except InvalidOperation:
            return None
        return cost if cost.is_finite() and 0 <= cost < 1_000_000 else None

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage of an answer, whether the provider told it or not."""
        tokens = self.tokens
        counted = {
            "prompt_tokens": tokens.total - tokens.output_tokens,
            "completion_tokens": tokens.output_tokens,
            "total_tokens": tokens.total,
        }
        return {**(self.told or {}), **counted}

    def columns(self) -> dict[str, Any]:
        """For the call's row."""
        names = ("status", "attempts", "first_token_ms", "duration_ms", "finish_reason", "error", "cost_micro_usd")
        counted = msgspec.structs.asdict(self.tokens)
        return {
            **{name: getattr(self, name) for name in names}, **counted, "estimated": self.estimated,
            "provider": self.target.provider.name, "model": self.target.model[:200],
        }  # fmt: skip

    def cost_header(self) -> str:
        """`Corral-Cost-Usd`."""
        return "unpriced" if self.cost_micro_usd is None else f"{self.cost_micro_usd / 1_000_000:.6f}"


def estimate_input(request: Mapping[str, Any]) -> int:
    """Tokens of a request, counted high: 4 bytes each, an image as 1,500."""
    if "input" in request:
        given = request["input"]
        return sum(estimate(text) for text in ([given] if isinstance(given, str) else given))
    tokens = sum(_of_message(message) for message in request["messages"])
    tools = request.get("tools")
    return tokens + (len(msgspec.json.encode(tools)) // 4 if tools else 0)


def _of_message(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    texts = [content] if isinstance(content, str) else []
    images = 0
    for part in content if isinstance(content, list) else ():
        if part.get("type") == "text":
            texts.append(part["text"])
        else:
            images += 1
    texts += [call["function"]["arguments"] for call in message.get("tool_calls") or ()]
    return 4 + sum(estimate(text) for text in texts) + 1500 * images


def _count(value: Any) -> int:
    return max(0, min(value, MAX_TOKENS)) if isinstance(value, int) else 0
