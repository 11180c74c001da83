"""The models of all providers as OpenAI lists them, with their prices."""

from __future__ import annotations

from corral_plugins.cost.api import Cost, Tokens
from corral_plugins.llm.api import ModelFacts
from corral_plugins.llm.service.provider import Provider
from corral_plugins.llm.service.registry import Registry
from corral_plugins.llm.shapes import ModelPrice, ModelView

MILLION = 1_000_000
TOKENS = 10_000  # longer calls have another price with some


class Catalogue:
    """Joins the caller's unit."""

    def __init__(self, registry: Registry, cost: Cost) -> None:
        self._registry, self._cost = registry, cost

    def all(self) -> list[ModelView]:
        """Every listed model, by provider."""
        return [self._view(provider, facts) for provider in self._registry.all() for facts in provider.models()]

    def get(self, name: str) -> ModelView | None:
        """One of them."""
        target, facts = self._registry.target(name), self._registry.facts(name)
        return self._view(target.provider, facts) if target is not None and facts is not None else None

    def _view(self, provider: Provider, facts: ModelFacts) -> ModelView:
        return ModelView(
            id=f"{provider.name}/{facts.id}",
            owned_by=provider.name,
            capabilities=facts.capabilities,
            context_window=facts.context_window,
            max_output_tokens=facts.max_output_tokens,
            price=self._price(provider, facts.id),
            available=provider.usable,
        )

    def _price(self, provider: Provider, model: str) -> ModelPrice | None:
        """What a million tokens of each sort cost, in calls of an ordinary length and beside what each call costs."""

        def micro(**tokens: int) -> int | None:
            return self._cost.price(provider.name, model, Tokens(**tokens), free=provider.free).cost_micro_usd

        def usd(**tokens: int) -> float | None:
            cost = micro(**tokens)
            return None if cost is None else (cost - (micro() or 0)) * (MILLION // TOKENS) / MILLION

        output = usd(output_tokens=TOKENS)
        given = usd(input_tokens=TOKENS)
        if given is None and output is None:
            return None
        return ModelPrice(
            input_usd=given,
            output_usd=output,
            cache_read_usd=usd(cache_read_tokens=TOKENS),
            cache_write_usd=usd(cache_write_tokens=TOKENS),
        )
