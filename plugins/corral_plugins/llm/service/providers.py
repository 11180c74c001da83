"""Providers by name, and from what a caller names to the models that may serve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.errors import Forbidden, Invalid
from corral.plugin import Contributions
from corral.schema.data import json_schema_problems
from corral_plugins.agents.api import AgentFacts
from corral_plugins.llm.api import Connection, LLMProvider, ModelFacts

SCRIPTED = "scripted"
MAX_FALLBACKS = 5


class Target(msgspec.Struct, frozen=True):
    """A model of a connection. `name` is `provider/model`."""

    connection: Connection
    provider: LLMProvider
    model: str

    @property
    def name(self) -> str:
        """`provider/model`."""
        return f"{self.connection.name}/{self.model}"


class Providers:
    """The connections of `[plugins.llm.providers]`, and `scripted`, which is always there."""

    def __init__(self, contributions: Contributions, table: Mapping[str, Mapping[str, Any]]) -> None:
        self._contributions = contributions
        self._table: dict[str, Mapping[str, Any]] = {SCRIPTED: {"kind": SCRIPTED}, **table}
        self._connections = {
            name: Connection(name=name, config={key: value for key, value in given.items() if key != "kind"})
            for name, given in self._table.items()
        }

    def check(self) -> None:
        """Raise `ValueError` for a provider of no known kind, or whose configuration its kind does not take."""
        kinds = self._kinds()
        for name, given in self._table.items():
            kind = given.get("kind")
            if kind not in kinds:
                raise ValueError(f"llm.providers.{name}.kind: one of {', '.join(sorted(kinds))}")
            faults = json_schema_problems(dict(kinds[kind].config_schema), dict(self._connections[name].config))
            if faults:
                raise ValueError(f"llm.providers.{name}{faults[0].pointer.replace('/', '.')}: {faults[0].detail}")

    def all(self) -> list[tuple[Connection, LLMProvider]]:
        """By name; those whose kind is out of service are left out."""
        kinds = self._kinds()
        found = ((self._connections[name], kinds.get(self._table[name]["kind"])) for name in sorted(self._table))
        return [(connection, kind) for connection, kind in found if kind is not None]

    def get(self, name: str) -> tuple[Connection, LLMProvider] | None:
        """A provider by name."""
        given = self._table.get(name)
        kind = self._kinds().get(given["kind"]) if given is not None else None
        return (self._connections[name], kind) if kind is not None else None

    def facts(self, name: str) -> ModelFacts | None:
        """What is known of `provider/model`."""
        provider, _, model = name.partition("/")
        found = self.get(provider)
        listed = found[1].list_models(found[0]) if found is not None else ()
        return next((item for item in listed if item.id == model), None)

    def default_of(self, name: str) -> str | None:
        """The first model of a provider."""
        found = self.get(name)
        listed = found[1].list_models(found[0]) if found is not None else ()
        return listed[0].id if listed else None

    def target(self, name: str) -> Target | None:
        """`provider/model` as something to call; None: no such provider."""
        provider, _, model = name.partition("/")
        found = self.get(provider)
        return Target(found[0], found[1], model) if found is not None and model else None

    def listing(self, bare: str) -> list[str]:
        """Every `provider/model` whose model is called so."""
        return [
            f"{connection.name}/{bare}"
            for connection, kind in self.all()
            if any(item.id == bare for item in kind.list_models(connection))
        ]

    def _kinds(self) -> dict[str, LLMProvider]:
        return {item.kind: item for _, item in self._contributions.of("corral_llm_providers")}


class Choice:
    """Which models may serve a request of this caller, in order."""

    def __init__(self, providers: Providers, default_model: str) -> None:
        self._providers, self._default = providers, default_model

    def model_of(self, agent: AgentFacts) -> str:
        """The agent's own model as `provider/model`."""
        provider = agent.llm_provider or self._default.partition("/")[0]
        if agent.llm_model is None:
            model = self._providers.default_of(provider) if agent.llm_provider else self._default.partition("/")[2]
            return f"{provider}/{model or ''}"
        if agent.llm_provider is None and self._providers.target(agent.llm_model) is not None:
            return agent.llm_model
        return f"{provider}/{agent.llm_model}"

    def models_of(self, agent: AgentFacts) -> list[str]:
        """The agent's model and its fallbacks."""
        fallbacks = [self._full(str(name)) for name in (agent.config.get("fallback_models") or [])[:MAX_FALLBACKS]]
        return list(dict.fromkeys([self.model_of(agent), *fallbacks]))

    def candidates(self, asked: str, caller: Principal, agent: AgentFacts | None) -> list[Target]:
        """What to try, first to last. `Invalid` at `/model`; `Forbidden` for a model that is not the agent's."""
        if asked == "agent":
            if agent is None:
                raise Invalid.at("/model", "not_allowed", "`agent` is for agents; name a model, or `default`.")
            names = self.models_of(agent)
        else:
            names = [self._default if asked == "default" else self._full(asked)]
            if agent is not None:
                names = self._within(names[0], agent)
            elif self._providers.facts(names[0]) is None and not self._is_open(names[0]):
                raise Invalid.at("/model", "unknown_reference", self._unknown(asked), problem="unknown_reference")
        targets = [target for name in names if (target := self._providers.target(name)) is not None]
        if not targets:
            raise Invalid.at("/model", "unknown_reference", self._unknown(asked), problem="unknown_reference")
        return targets

    def _within(self, name: str, agent: AgentFacts) -> list[str]:
        """The model and the agent's fallbacks behind it."""
        allowed = self.models_of(agent)
        if name not in allowed:
            raise Forbidden(f"This agent may use {', '.join(allowed)} only; {name} is none of them.")
        return allowed[allowed.index(name) :]

    def _full(self, asked: str) -> str:
        if self._providers.target(asked) is not None:
            return asked
        found = self._providers.listing(asked)
        if len(found) > 1:
            raise Invalid.at("/model", "unknown_reference", f"Several providers have it: {', '.join(found)}. Name one.")
        return found[0] if found else asked

    def _is_open(self, name: str) -> bool:
        """A script may come with the request, so any name of this provider is good."""
        return name.partition("/")[0] == SCRIPTED

    def _unknown(self, asked: str) -> str:
        known: Sequence[str] = [
            f"{connection.name}/{item.id}"
            for connection, kind in self._providers.all()
            for item in kind.list_models(connection)
        ]
        return f"There is no model {asked[:100]}. Known: {', '.join(known[:20])}{' …' if len(known) > 20 else ''}."
