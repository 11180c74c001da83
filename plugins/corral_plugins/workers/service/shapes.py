"""Shapes of the HTTP calls about workers: what comes in and what goes out."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, MomentIn, Name, Slug, line
from corral_plugins.tasks.api import LeaseRef, LeaseState, LeaseView, Signal

Status = Literal["pending", "online", "offline", "draining", "rejected"]
Percent = Annotated[float, Meta(ge=0, le=100)]
LabelKey = Annotated[str, Meta(pattern=r"^[a-z0-9._/-]{1,63}(?![\s\S])")]
Labels = Annotated[dict[LabelKey, Annotated[str, line(255, 0)]], Meta(max_length=50)]
ToolName = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.:/-]+(?![\s\S])")]
Capacity = Annotated[int, Meta(ge=1, le=1000)]


class ToolOffer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A tool that the worker brings along, with the JSON Schema of its arguments."""

    name: ToolName
    schema: dict[str, Any] | None = None
    risk: Literal["read", "write", "external", "dangerous"] | None = None


Tools = Annotated[list[ToolName | ToolOffer], Meta(max_length=500)]


class NewWorker(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A worker that registers. What is absent keeps its value when it registers again. `os_info`: at most 4 KiB."""

    name: Name
    hostname: Annotated[str, line(255, 0)] | UnsetType = UNSET
    ip_address: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET
    max_agents: Capacity | UnsetType = UNSET
    cpu_cores: Annotated[int, Meta(ge=1, le=4096)] | UnsetType | None = UNSET
    memory_total_mb: Annotated[int, Meta(ge=1, le=100000000)] | UnsetType | None = UNSET
    os_info: str | dict[str, Any] | UnsetType | None = UNSET
    labels: Labels | UnsetType = UNSET
    tools: Tools | UnsetType = UNSET
    agent_version: Annotated[str, line(100)] | UnsetType | None = UNSET
    fingerprint: Annotated[str, Meta(min_length=1, max_length=200)] | None = None


class Heartbeat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How a worker does, and the leases that it holds: they are renewed."""

    cpu_usage_percent: Percent | UnsetType | None = UNSET
    memory_usage_percent: Percent | UnsetType | None = UNSET
    disk_usage_percent: Percent | UnsetType | None = UNSET
    leases: Annotated[list[LeaseRef], Meta(max_length=1000)] = []
    tools: Tools | UnsetType = UNSET
    labels: Labels | UnsetType = UNSET


class HeartbeatReply(msgspec.Struct, kw_only=True):
    """`commands`: drain | resume | config_changed | reregister. A lease that is `lost` must be dropped at once."""

    server_time: Instant
    status: str
    next_heartbeat_seconds: int
    pending_tasks: int
    leases: list[LeaseState]
    commands: list[str]


class ClaimBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """How much work is wanted, for which agents, and how long an empty answer is held back."""

    max_tasks: Annotated[int, Meta(ge=1, le=50)] = 1
    agent_ids: Annotated[list[Id], Meta(max_length=1000)] | None = None
    wait_seconds: Annotated[int, Meta(ge=0, le=30)] = 0

    @functools.cached_property
    def until(self) -> float:
        """When a long poll must answer; fixed at its first look, for the handler runs again at every bell."""
        return clock.time_s() + self.wait_seconds


class SignalsQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """`after` is the `seq` of the last signal that was heard; `wait` seconds long an empty answer is held back."""

    after: Annotated[int, Meta(ge=0)] = 0
    wait: Annotated[int, Meta(ge=0, le=55)] = 0

    @functools.cached_property
    def began(self) -> float:
        """When the call came."""
        return clock.time_s()


class Signals(msgspec.Struct, kw_only=True):
    """What a worker has to hear at once. `commands` as in the reply to heartbeats."""

    signals: list[Signal]
    commands: list[str]


class TasksQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How many are shown."""

    limit: Annotated[int, Meta(ge=1, le=200)] = 50


class WorkerView(msgspec.Struct, kw_only=True):
    """A worker. Its fingerprint and token are never shown."""

    id: str
    version: int
    created_by: str | None
    created_at: Instant
    updated_at: Instant
    name: str
    hostname: str
    ip_address: str
    max_agents: int
    cpu_cores: int | None
    memory_total_mb: int | None
    os_info: Any
    labels: dict[str, str]
    tools: list[Any]
    agent_version: str | None
    group: str | None
    is_approved: bool
    status: str
    cpu_usage_percent: float | None
    memory_usage_percent: float | None
    disk_usage_percent: float | None
    last_heartbeat_at: Instant | None
    active_leases: int
    capacity: int
    embedded: bool


class WorkerDetail(WorkerView, kw_only=True):
    """A worker with its live leases."""

    leases: list[LeaseView]


class WorkerError(msgspec.Struct, kw_only=True):
    """Why a task failed on this worker."""

    at: Instant
    task_id: str
    type: str
    message: str


class AdminWorker(WorkerView, kw_only=True):
    """A worker as admins see it, with its last failures, the newest first."""

    last_errors: list[WorkerError]


class RegisteredWorker(WorkerView, kw_only=True):
    """A worker with its token, which is shown this once."""

    token: str
    heartbeat_seconds: int
    lease_seconds: int
    ack_seconds: int


class WorkerToken(WorkerView, kw_only=True):
    """A worker with its new token, which is shown this once. The old one is good for 60 s more."""

    token: str


class WorkerListQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`label` is `key` or `key=value`; `search` looks into name and host name."""

    status: list[Status] = msgspec.field(default_factory=list)
    group: list[Slug] = msgspec.field(default_factory=list)
    label: list[Annotated[str, line(320)]] = msgspec.field(default_factory=list)
    search: Annotated[str, line(200, 0)] = ""


class ApproveWorker(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Approve, or reject and withdraw."""

    is_approved: bool
    group: Slug | UnsetType | None = UNSET


class WorkerPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What admins change; absent fields stay."""

    name: Name | UnsetType = UNSET
    group: Slug | UnsetType | None = UNSET
    labels: Labels | UnsetType = UNSET
    max_agents: Capacity | UnsetType = UNSET


class DeleteQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`force`: release the leases that it holds."""

    force: bool = False


class GroupFigures(msgspec.Struct, kw_only=True):
    """The approved workers of a group; capacity of those online."""

    total: int = 0
    online: int = 0
    capacity: int = 0
    active_leases: int = 0


class FleetOverview(msgspec.Struct, kw_only=True):
    """Capacity, utilization and averages are of online workers; null: there is nothing to say."""

    total: int
    online: int
    offline: int
    draining: int
    pending_approval: int
    rejected: int
    capacity: int
    active_leases: int
    utilization: float | None
    avg_cpu_percent: float | None
    avg_memory_percent: float | None
    avg_disk_percent: float | None
    queue_depth: int
    oldest_pending_ms: int | None
    by_group: dict[str, GroupFigures]


class NewRegistrationKey(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A key that registers workers into `group`. `expires_at`: at most 365 days from now, 7 days if absent."""

    name: Name
    group: Slug | None = None
    auto_approve: bool = False
    max_uses: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    expires_at: MomentIn | None = None


class RegistrationKeyView(msgspec.Struct, kw_only=True):
    """A registration key, without its secret."""

    id: str
    name: str
    group: str | None
    auto_approve: bool
    max_uses: int | None
    uses: int
    expires_at: Instant
    created_by: str | None
    created_at: Instant
    last_used_at: Instant | None


class NewKeyView(RegistrationKeyView, kw_only=True):
    """A registration key with its secret, which is shown this once."""

    key: str
