"""How a call went: kept while it runs, for its row, its cost event and its headers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import msgspec

from corral.errors import Problem
from corral_plugins.cost.api import MAX_TOKENS, Tokens
from corral_plugins.llm.api import ProviderError
from corral_plugins.llm.kinds.scripted import estimate
from corral_plugins.llm.service.answers import TEXTS, usage_of
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
        self.told = chunk.get("usage") or self.told
        for choice in chunk.get("choices", ()):
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            said = choice.get("delta") or choice.get("message") or {}
            texts = [said.get(name) or "" for name in TEXTS]
            texts += [call["function"]["arguments"] for call in said.get("tool_calls", ())]
            self.output_bytes += sum(len(text.encode(errors="replace")) for text in texts)

    def note_refusal(self, failure: ProviderError) -> None:
        """A refusal costs nothing; whoever had begun to answer may be paid for it."""
        self.reached, self.told = failure.reached, usage_of(failure.usage)

    def note_failure(self, error: Exception) -> None:
        """Why it failed."""
        self.status = "failed"
        if isinstance(error, Problem):
            self.error = {"code": error.code, "detail": error.detail}
        else:
            log.error("a call failed", exc_info=error, extra={"provider": self.target.provider.name})
            self.error = {"code": "internal", "detail": "The gateway failed with a bug; see the log."}

    def least(self) -> Outcome:
        """What can be written of it whatever the provider answered: the counts."""
        error = {"code": "internal", "detail": "How the call went could not be written; see the log."}
        return msgspec.structs.replace(self, status="failed", finish_reason=None, response=None, error=error)

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
            counts = (self.input_estimate, -(-self.output_bytes // 4))
            return Tokens(input_tokens=min(counts[0], MAX_TOKENS), output_tokens=min(counts[1], MAX_TOKENS))
        details = self.told.get("prompt_tokens_details", {})
        read = details.get("cached_tokens") or self.told.get("prompt_cache_hit_tokens", 0)
        written = details.get("cache_write_tokens", 0)
        return Tokens(
            input_tokens=max(0, self.told.get("prompt_tokens", 0) - read - written),
            output_tokens=self.told.get("completion_tokens", 0),
            cache_read_tokens=read,
            cache_write_tokens=written,
        )

    @property
    def reported_cost(self) -> Decimal | None:
        """What the provider says that it cost (OpenRouter does)."""
        told = (self.told or {}).get("cost")
        if not isinstance(told, (int, float)) or isinstance(told, bool):
            return None
        cost = Decimal(str(told))
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
            **{name: getattr(self, name) for name in names},
            **counted,
            "estimated": self.estimated,
            "provider": self.target.provider.name,
            "model": self.target.model[:200],
        }

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
