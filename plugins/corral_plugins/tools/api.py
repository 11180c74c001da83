"""The public API of tools: definitions of tools, the context in which they run, and the service `Tools`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Failure, declare_codes

declare_codes(
    {
        "already_decided": (409, "It was decided before"),
        "tools.denied": (403, "The tool call is denied"),
    }
)

Risk = Literal["read", "write", "external", "dangerous"]
Policy = Literal["allow", "ask", "deny"]
Runs = Literal["server", "worker"]

RISKS: tuple[Risk, ...] = ("read", "write", "external", "dangerous")
POLICIES: tuple[Policy, ...] = ("allow", "ask", "deny")
"""Ordered from the least to the most strict."""

Json = dict[str, Any]


class ToolContext(msgspec.Struct, frozen=True, kw_only=True):
    """The context in which a tool runs. `caller`: the agent with the current rights of its requester.

    `config`: the tool's own configuration. `work`: opens units, for `async def` tools.
    """

    caller: Principal
    task_id: str
    lease_id: str
    call_id: str
    config: Mapping[str, Any]
    timeout_seconds: int
    work: Work


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The object on which a call acts. `ask`: the rules of the target require approval by a person."""

    kind: str
    id: str
    ask: bool = False


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """A result with the untrusted sources that it contains, for tools whose output is not always untrusted."""

    value: Any
    untrusted: tuple[str, ...] = ()


class Later(msgspec.Struct, frozen=True):
    """The result of a tool whose result arrives later, by `Tools.answered`."""


class ToolFailure(Failure):
    """The tool failed. `type` is stable; `message` is for the model and for people.

    The message must not contain untrusted text, which belongs into a result, where it taints the run.
    """

    def __init__(self, type: str, message: str) -> None:
        self.type, self.message = type, message
        super().__init__(f"{type}: {message}")


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as a plugin contributes it (`corral_tools`).

    `run(context, arguments)` returns JSON, `Output` or `Later`, or raises `ToolFailure` or a `Problem`. A `def` runs
    in the unit that stores its result; an `async def` opens its own units with `context.work`. Worker tools have none.
    `sees(context, arguments)`: whether the requester may see the objects named in the arguments; called in a unit.
    `admits(config, arguments)`: whether a configuration, the tool's or the agent's, allows the arguments.
    `trusts(config, arguments)`: whether the tool's configuration exempts the call from approval in tainted runs.
    """

    name: str
    title: str
    description: str
    risk: Risk
    schema: Json
    run: Callable[[ToolContext, Json], Any] | None = None
    runs: Runs = "server"
    output_schema: Json | None = None
    permission: str | None = None  # in addition to that of its risk
    untrusted_output: bool = False
    idempotent: bool = False
    timeout_seconds: int | None = None  # None: `tools.timeout_seconds`
    config_schema: Json | None = None  # None: the tool has no configuration
    target: Callable[[Json], Target | None] | None = None
    sees: Callable[[ToolContext, Json], bool] | None = None
    admits: Callable[[Mapping[str, Any], Json], bool] | None = None
    trusts: Callable[[Mapping[str, Any], Json], bool] | None = None


class ClaimTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as claims describe it to workers. `policy`: the agent's policy while the run is not tainted."""

    name: str
    title: str
    description: str
    schema: Json
    risk: Risk
    runs: Runs
    policy: Policy


class Tools(Protocol):
    """Tools, for other plugins. Joins the caller's unit."""

    def offered(
        self, *, enabled: Sequence[str], policy: Mapping[str, Any], allowed: Sequence[str] | None, worker_id: str
    ) -> list[ClaimTool]:
        """List the tools of a run by name: those that agent and task allow and server or worker offer."""
        ...

    def of_server(self) -> frozenset[str]:
        """The names of the tools that the server runs, which are available on every worker."""
        ...

    def refuse_beyond(
        self, by: Principal, *, enabled: Sequence[str], policy: Mapping[str, Any], before: Mapping[str, Any]
    ) -> None:
        """Raise `Forbidden` unless this person may give an agent these tools and rules.

        People can only give the tools that they may use themselves, and only admins loosen the policies of dangerous
        tools. `before`: the agent's present `tool_policy`.
        """
        ...

    def answered(self, task_id: str, call_id: str, *, result: Any = None, error: Json | None = None) -> None:
        """End a call that returned `Later`. Does nothing if the call has already ended."""
        ...
