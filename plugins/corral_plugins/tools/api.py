"""The public API of the `tools` plugin: tool definitions, the context in which tools run, and the `Tools` service."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, Protocol, TypeVar

import msgspec

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import ExpectedFailure, declare_codes
from corral.events.event import Event, SystemAlert
from corral.schema.fields import text_format

if TYPE_CHECKING:
    import httpx2

declare_codes(
    {
        "already_decided": (
            409,
            "The request has already been decided",
            "Fetch the object again. The first decision counts.",
        ),
        "tools.denied": (
            403,
            "The tool call was denied",
            "The agent may not call this tool. An admin can permit it in the agent's tools or in the tool's policy.",
        ),
    }
)

ToolRisk = Literal["read", "write", "external", "dangerous"]
ToolPolicy = Literal["allow", "ask", "deny"]
RunLocation = Literal["server", "worker"]

RISKS: tuple[ToolRisk, ...] = ("read", "write", "external", "dangerous")
POLICIES: tuple[ToolPolicy, ...] = ("allow", "ask", "deny")
"""Tool policies, ordered from the least to the most strict."""

Json = dict[str, Any]
MCP_PREFIX = "mcp."
"""The prefix of the names of MCP tools: `mcp.<server>.<tool>`."""
TOOL_NAME = r"^[a-z][a-z0-9_]*(\.[a-z0-9_-]+)+\Z"
"""The pattern of tool names. Because of the dot, no tool name equals a fixed part of a route, such as `mcp-servers`."""


class ToolContext(msgspec.Struct, frozen=True, kw_only=True):
    """The context in which a tool runs.

    `caller` is the agent, with the current permissions of the person who requested the task. `config` is the
    configuration of the tool. `work` opens units of work for `async def` tools. `cause_chain` lists the ids of
    the triggers and tasks that led to the task. To record these causes for the events of a unit of work, pass them in
    the `UnitContext` with which `work` opens the unit.
    """

    caller: Principal
    task_id: str
    lease_id: str
    call_id: str
    config: Mapping[str, Any]
    timeout_seconds: int
    work: Work
    approval_id: str | None = None  # the approval of the call that runs
    cause_chain: tuple[str, ...] = ()


class CallTarget(msgspec.Struct, frozen=True, kw_only=True):
    """The object on which a tool call acts."""

    kind: str
    id: str


class ToolOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a tool, with the names of the untrusted sources of the result.

    A tool returns an instance of this class if only some of its results are untrusted.
    """

    value: Any
    untrusted: tuple[str, ...] = ()


class ResultLater(msgspec.Struct, frozen=True):
    """The return value of a tool whose actual result is delivered later with `Tools.deliver_result`."""


class ToolFailure(ExpectedFailure):
    """The failure of a tool. `type` is a stable identifier; `message` is text for the model and for people.

    The message must not contain untrusted text. Untrusted text belongs in a result, which taints the run.
    """

    def __init__(self, type: str, message: str) -> None:
        self.type, self.message = type, message
        super().__init__(f"{type}: {message}")


Implementation = TypeVar("Implementation")


class ToolSet(Generic[Implementation]):
    """Base class of the tools that a plugin contributes.

    The plugin creates the tools before the services exist, and calls `set_implementation` when the plugin starts.
    """

    def __init__(self) -> None:
        self._implementation: Implementation | None = None

    def set_implementation(self, implementation: Implementation) -> None:
        """Connect the tools to their implementation."""
        self._implementation = implementation

    @property
    def implementation(self) -> Implementation:
        """The implementation of the tools. Raise `ToolFailure` while the server is starting."""
        if self._implementation is None:
            raise ToolFailure("unavailable", "The server is starting; try again.")
        return self._implementation


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool definition that a plugin contributes with the `corral_tools` hook.

    The name, such as `oncall.who`, contains a dot and begins with a lower-case letter. A plugin that contributes a tool
    with any other name gets the state `failed`. `run(context, arguments)` returns JSON, `ToolOutput` or `ResultLater`,
    or raises `ToolFailure` or a `Problem`. A `def` function runs in the unit of work that stores the result. An `async
    def` function opens its own units of work with `context.work`. `run` is None for tools that run on workers.
    `is_visible(context, arguments)` returns whether the requester may see the objects named in the arguments. The
    function is called in a unit of work. `admits(config, arguments)` returns whether a configuration, of the tool or of
    the agent, allows the arguments. `trusts(config, arguments)` returns whether the configuration of the tool exempts
    the call from approval in tainted runs. `asks(context, arguments)` returns whether a person must approve the call
    regardless of the policies.
    """

    name: Annotated[
        str,
        text_format(TOOL_NAME, "a name with a dot, such as oncall.who, of a-z, 0-9, _ and -, beginning with a letter"),
    ]
    title: str
    description: str
    risk: ToolRisk
    schema: Json
    run: Callable[[ToolContext, Json], Any] | None = None
    runs: RunLocation = "server"
    output_schema: Json | None = None
    permission: str | None = None  # required in addition to the permission for the risk
    approver_permission: str | None = None  # whoever approves a call needs this one as well
    untrusted_output: bool = False
    idempotent: bool = False
    timeout_seconds: int | None = None  # None: `tools.timeout_seconds`
    config_schema: Json | None = None  # None: the tool has no configuration
    target: Callable[[Json], CallTarget | None] | None = None
    asks: Callable[[ToolContext, Json], bool] | None = None
    is_visible: Callable[[ToolContext, Json], bool] | None = None
    admits: Callable[[Mapping[str, Any], Json], bool] | None = None
    trusts: Callable[[Mapping[str, Any], Json], bool] | None = None


class McpEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An MCP server that is reached over HTTP.

    `http` is the only HTTP client that may be used to reach the server, because its connections pass through the egress
    guard. The client has no timeout, so the caller must set one. `headers` are sent with every request.
    """

    name: str
    url: str
    headers: Mapping[str, str]
    http: httpx2.AsyncClient

    def __repr__(self) -> str:  # hides the headers, which contain credentials
        return f"<McpEndpoint {self.name}>"


class McpTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as described by an MCP server. All fields contain untrusted text."""

    name: str
    title: str = ""
    description: str = ""
    schema: Json
    output_schema: Json | None = None


class McpResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an MCP server's tool. `content` contains MCP content blocks as JSON."""

    content: Sequence[Json] = ()
    structured: Any = None
    is_error: bool = False


class McpFailure(ExpectedFailure):
    """An MCP server could not be reached, did not follow the protocol, or refused a request.

    `type` is a stable identifier; `message` must not contain text from the server. `status` is the status of the
    server's HTTP response, if the response caused the failure. `neutral` is true if the failure says nothing about the
    health of the server.
    """

    def __init__(self, type: str, message: str, *, status: int | None = None, neutral: bool = False) -> None:
        self.type, self.message, self.status, self.neutral = type, message, status, neutral
        super().__init__(message)


class McpClient(Protocol):
    """Speaks the Model Context Protocol with servers.

    A plugin contributes the client with the `corral_mcp_clients` hook. Both methods raise `McpFailure` on any failure.
    """

    async def list_tools(self, endpoint: McpEndpoint) -> Sequence[McpTool]:
        """Connect to a server and return all of its tools."""
        ...

    async def call_tool(self, endpoint: McpEndpoint, tool: str, arguments: Json) -> McpResult:
        """Connect to a server and call one of its tools."""
        ...


def mcp_tool_name(server: str, remote_name: str) -> str:
    """Return the name that Corral gives to an MCP server's tool.

    Characters other than lower-case letters, digits, `_` and `-` become `_`.
    """
    return f"{MCP_PREFIX}{server}.{re.sub(r'[^a-z0-9_-]', '_', remote_name.lower())}"


def mcp_result_for_model(server: str, result: McpResult) -> Json:
    """Convert the result of an MCP tool into JSON for the model.

    Text blocks are joined. Other content, such as an image, is represented only by its type.
    """
    texts, other = [], []
    for block in result.content:
        text = block.get("text")
        if block.get("type") == "text" and isinstance(text, str):
            texts.append(text)
        else:
            other.append(str(block.get("type"))[:40])
    shown: Json = {"source": f"mcp:{server}", "trust": "untrusted", "is_error": result.is_error}
    if result.structured is not None:
        shown["structured"] = result.structured
    elif texts or not other:
        shown["text"] = "\n".join(texts)
    if other:
        shown["omitted"] = other
    return shown


class ClaimTool(msgspec.Struct, frozen=True, kw_only=True):
    """The description of a tool in a claim. `policy` is the agent's policy for the tool in an untainted run."""

    name: str
    title: str
    description: str
    schema: Json
    risk: ToolRisk
    runs: RunLocation
    policy: ToolPolicy


class Tools(Protocol):
    """The service of the `tools` plugin for other plugins. Its methods run in the caller's unit of work."""

    def tools_for_run(
        self, *, enabled: Sequence[str], policy: Mapping[str, Any], allowed: Sequence[str] | None, worker_id: str
    ) -> list[ClaimTool]:
        """List the tools that an agent can use in a run, sorted by name.

        A tool is listed if the agent and the task allow the tool, and the server or the worker offers the tool.
        """
        ...

    def server_tools(self) -> frozenset[str]:
        """Return the names of the tools that run on the server. These tools are available with every worker."""
        ...

    def unavailable_tools(self, names: Iterable[str]) -> list[str]:
        """Return the named tools that are disabled, or that neither the server nor an online worker offers.

        A name may be a pattern such as `prefix.*`.
        """
        ...

    def risks(self) -> Mapping[str, ToolRisk]:
        """Return the risks of all tools that plugins, MCP servers and online workers currently offer, keyed by name."""
        ...

    def refuse_missing_permissions(
        self, by: Principal, *, enabled: Sequence[str], policy: Mapping[str, Any], before: Mapping[str, Any]
    ) -> None:
        """Raise `Forbidden` unless the person `by` may give an agent the given tools and policies.

        People can give an agent only tools that they may use themselves. Only admins may set the policy of a dangerous
        tool to `allow`, change a rule that has this policy, or make a policy less strict than the default of the tool.
        `before` is the current `tool_policy` of the agent.
        """
        ...

    def approval_changed(self, call_row_id: str, *, status: str, note: str | None) -> None:
        """Continue a held call, which waits for an approval, after people have decided on it.

        Runs in the transaction that stores their decision.

        An approved call runs soon. Any other decision ends the call, and the call's task continues with the outcome.
        """
        ...

    def results_of_held_call(self, call_row_id: str) -> list[Json] | None:
        """Return the `tool_results` with which a task continues after people have decided whether to approve its call.

        Return None if the tool has to run first. The list is empty if the worker has to repeat the call in order to run
        the approved tool itself.
        """
        ...

    def target_of_held_call(self, call_row_id: str, arguments: Any, *, pointer: str) -> str | None:
        """Return the object that a held call would act on if its arguments were replaced by `arguments`.

        Raise `Invalid` at `pointer` if the tool no longer exists, or if the arguments do not match its schema.
        """
        ...

    def deliver_result(self, task_id: str, call_id: str, *, result: Any = None, error: Json | None = None) -> None:
        """Store the result or error of a call that returned `ResultLater`. Do nothing if the call has already ended."""
        ...


def includes_tools(offered: Iterable[str], wanted: Iterable[str]) -> bool:
    """Return whether the offered tools include all wanted tools.

    An offered pattern `prefix.*` includes every tool whose name starts with `prefix.`.
    """
    names = set(offered)
    prefixes = tuple(name[:-1] for name in names if name.endswith(".*"))
    return all(tool in names or (bool(prefixes) and tool.startswith(prefixes)) for tool in wanted)


def missing_tools(offered: Sequence[str], wanted: Iterable[str]) -> list[str]:
    """Return the wanted tools that are not offered."""
    return [tool for tool in wanted if not includes_tools(offered, [tool])]


def unserved_tools(enabled: Iterable[str], of_worker: Iterable[str] | None, of_server: Iterable[str]) -> list[str]:
    """Return an agent's tools that neither the worker nor the server offers.

    If `of_worker` is None, the worker offers every tool. The pattern `prefix.*` counts as offered if any offered tool
    has a name that starts with `prefix.`.
    """
    if of_worker is None:
        return []
    offered = {*of_worker, *of_server}
    return [
        tool
        for tool in enabled
        if tool not in offered and not (tool.endswith(".*") and any(name.startswith(tool[:-1]) for name in offered))
    ]


RISK_POLICY: Mapping[ToolRisk, ToolPolicy] = {
    "read": "allow",
    "write": "allow",
    "external": "allow",
    "dangerous": "ask",
}


class ToolCalled(Event, kw_only=True):
    """A tool call ended."""

    event = "tool.called"

    task_id: str
    call_id: str
    tool: str
    decision: str
    status: str
    duration_ms: int | None


class McpChanged(SystemAlert, kw_only=True):
    """Alerts admins that an MCP server changed or added tools.

    Agents cannot use these tools until an admin accepts their definitions.
    """

    server: str
    tools: list[str]
