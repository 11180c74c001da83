"""What other plugins may know of tools: the shape of a tool, what its code is given, and the service `Tools`."""

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
"""From the loosest to the strictest."""

Json = dict[str, Any]


class ToolContext(msgspec.Struct, frozen=True, kw_only=True):
    """For whom and under what a tool runs. `caller` is the agent with the rights that its requester has now.

    `config` is the tool's own configuration, `work` opens units for tools that are `async`.
    """

    caller: Principal
    task_id: str
    lease_id: str
    call_id: str
    config: Mapping[str, Any]
    timeout_seconds: int
    work: Work


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What a call acts on. `ask`: the target's own rules want a person to be asked."""

    kind: str
    id: str
    ask: bool = False


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """A result with the untrusted sources that it holds, for tools whose output is untrusted only sometimes."""

    value: Any
    untrusted: tuple[str, ...] = ()


class Later(msgspec.Struct, frozen=True):
    """The result of a tool whose answer comes later, by `Tools.answered`."""


class ToolFailure(Failure):
    """The tool could not do it. `type` is stable; the message is for the model and for people, in the tool's own words:
    what strangers wrote goes into a result, which taints.
    """

    def __init__(self, type: str, message: str) -> None:
        self.type, self.message = type, message
        super().__init__(f"{type}: {message}")


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as a plugin contributes it (`corral_tools`).

    `run(context, arguments)` returns JSON, `Output` or `Later`, or raises `ToolFailure` or a `Problem`. A `def` runs
    in the unit that stores its result; an `async def` opens its own units with `context.work`. Worker tools have none.
    `sees(context, arguments)`: whether the requester sees the objects named in the arguments; in a unit.
    `admits(config, arguments)`: whether a configuration, the tool's or the agent's, lets the arguments pass.
    `trusts(config, arguments)`: whether the tool's configuration lets tainted runs do this unasked.
    """

    name: str
    title: str
    description: str
    risk: Risk
    schema: Json
    run: Callable[[ToolContext, Json], Any] | None = None
    runs: Runs = "server"
    output_schema: Json | None = None
    permission: str | None = None  # beside the one that its risk needs
    untrusted_output: bool = False
    idempotent: bool = False
    timeout_seconds: int | None = None  # None: as `tools.timeout_seconds` says
    config_schema: Json | None = None  # None: it takes no configuration
    target: Callable[[Json], Target | None] | None = None
    sees: Callable[[ToolContext, Json], bool] | None = None
    admits: Callable[[Mapping[str, Any], Json], bool] | None = None
    trusts: Callable[[Mapping[str, Any], Json], bool] | None = None


class ClaimTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as a claim tells it to a worker. `policy` is what holds for this agent while the run is not tainted."""

    name: str
    title: str
    description: str
    schema: Json
    risk: Risk
    runs: Runs
    policy: Policy


class Tools(Protocol):
    """Joins the caller's unit."""

    def offered(
        self, *, enabled: Sequence[str], policy: Mapping[str, Any], allowed: Sequence[str] | None, worker_id: str
    ) -> list[ClaimTool]:
        """The tools of a run: what agent and task let it call and server or worker bring, by name."""
        ...

    def of_server(self) -> frozenset[str]:
        """Names of the tools that every worker has, since the server runs them."""
        ...

    def refuse_beyond(
        self, by: Principal, *, enabled: Sequence[str], policy: Mapping[str, Any], before: Mapping[str, Any]
    ) -> None:
        """`Forbidden` unless this person may give an agent these tools and rules.

        Nobody gives away a tool that they may not use; only admins loosen rules of dangerous tools.
        """
        ...

    def answered(self, task_id: str, call_id: str, *, result: Any = None, error: Json | None = None) -> None:
        """A call that ended with `Later` has its answer; nothing happens when it has ended already."""
        ...
