"""Request and response bodies of the workers API."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.http.page import PageQuery
from corral.schema.fields import IDENTIFIER, Id, Instant, MomentIn, Name, Slug, line, text_format
from corral_plugins.tasks.api import LeaseRef, LeaseSignal, LeaseState, LeaseView, ToolName

Status = Literal["pending", "online", "offline", "draining", "rejected"]
Percent = Annotated[float, Meta(ge=0, le=100)]
LabelKey = Annotated[
    str,
    text_format(r"^[a-z0-9._/-]{1,63}(?![\s\S])", "the name of a label: 1 to 63 characters of a-z, 0-9, ., _, / and -"),
]
Labels = Annotated[dict[LabelKey, Annotated[str, line(255, 0)]], Meta(max_length=50)]
Capacity = Annotated[int, Meta(ge=1, le=1000)]


class ToolOffer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A tool that a worker offers, with the JSON Schema of the arguments."""

    name: ToolName
    schema: dict[str, Any] | None = None
    risk: Literal["read", "write", "external", "dangerous"] | None = None


Tools = Annotated[list[ToolName | ToolOffer], Meta(max_length=500)]


class NewWorker(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A worker to register. If the worker registers again, absent fields keep their values.

    `os_info` may contain at most 4 KiB of JSON. If `tools` is empty, the worker offers no tools; if it is null, the
    tools are unknown, and the worker is assumed to offer every tool.
    """

    name: Name
    hostname: Annotated[str, line(255, 0)] | UnsetType = UNSET
    ip_address: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET
    max_agents: Capacity | UnsetType = UNSET
    cpu_cores: Annotated[int, Meta(ge=1, le=4096)] | UnsetType | None = UNSET
    memory_total_mb: Annotated[int, Meta(ge=1, le=100000000)] | UnsetType | None = UNSET
    os_info: str | dict[str, Any] | UnsetType | None = UNSET
    labels: Labels | UnsetType = UNSET
    tools: Tools | UnsetType | None = UNSET
    agent_version: Annotated[str, line(100)] | UnsetType | None = UNSET
    fingerprint: Annotated[str, Meta(min_length=1, max_length=200), IDENTIFIER] | None = None


class Heartbeat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The resource usage of a worker, and the leases that it holds. The server renews these leases.

    If `tools` is absent, the stored tools stay unchanged; an empty list means that the worker offers no tools, and null
    means that its tools are unknown.
    """

    cpu_usage_percent: Percent | UnsetType | None = UNSET
    memory_usage_percent: Percent | UnsetType | None = UNSET
    disk_usage_percent: Percent | UnsetType | None = UNSET
    leases: Annotated[list[LeaseRef], Meta(max_length=1000)] = []
    tools: Tools | UnsetType | None = UNSET
    labels: Labels | UnsetType = UNSET


class HeartbeatReply(msgspec.Struct, kw_only=True):
    """The response to a heartbeat.

    `commands` may contain `drain`, `resume`, `config_changed` and `reregister`. If a lease has the state `lost`, the
    worker must stop the task immediately.
    """

    server_time: Instant
    status: str
    next_heartbeat_seconds: int
    pending_tasks: int
    leases: list[LeaseState]
    commands: list[str]


class ClaimBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """A claim request.

    `max_tasks` is the maximum number of tasks to claim. `agent_ids` restricts the claim to the tasks of these agents.
    `wait_seconds` is the maximum time to wait if no task can be claimed.
    """

    max_tasks: Annotated[int, Meta(ge=1, le=50)] = 1
    agent_ids: Annotated[list[Id], Meta(max_length=1000)] | None = None
    wait_seconds: Annotated[int, Meta(ge=0, le=30)] = 0

    @functools.cached_property
    def poll_deadline(self) -> float:
        """The time at which the long poll ends, in seconds since the epoch.

        The value is set on first use and then kept, because the handler runs again for every event.
        """
        return clock.time_s() + self.wait_seconds


class SignalsQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """Query parameters of the request for signals.

    `after` is the `seq` of the last signal that the worker received. `wait` is the maximum number of seconds to wait
    for a new signal.
    """

    after: Annotated[int, Meta(ge=0)] = 0
    wait: Annotated[int, Meta(ge=0, le=55)] = 0

    @functools.cached_property
    def began(self) -> float:
        """The time at which the request arrived, in seconds since the epoch.

        The value is set on first use and then kept, because the handler runs again for every event.
        """
        return clock.time_s()


class WorkerSignals(msgspec.Struct, kw_only=True):
    """Signals about leases, and the same commands as in the response to a heartbeat."""

    signals: list[LeaseSignal]
    commands: list[str]


class ClaimableTasksQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Query parameters of the list of claimable tasks. `limit` is the maximum number of tasks to list."""

    limit: Annotated[int, Meta(ge=1, le=200)] = 50


class WorkerView(msgspec.Struct, kw_only=True):
    """A worker. The fingerprint and the token are never shown."""

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
    tools: list[Any] | None
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
    """The failure of a task on a worker."""

    at: Instant
    task_id: str
    type: str
    message: str


class AdminWorker(WorkerView, kw_only=True):
    """A worker as shown to admins, with its last failures, newest first."""

    last_errors: list[WorkerError]


class RegisteredWorker(WorkerView, kw_only=True):
    """A worker with its token, which is shown only once."""

    token: str
    heartbeat_seconds: int
    lease_seconds: int
    ack_seconds: int


class WorkerToken(WorkerView, kw_only=True):
    """A worker with its new token, which is shown only once. The old token stays valid for 60 s."""

    token: str


class WorkerListQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for the list of workers.

    `label` is `key` or `key=value`. `search` is text to find in the name or the host name.
    """

    status: list[Status] = msgspec.field(default_factory=list)
    group: list[Slug] = msgspec.field(default_factory=list)
    label: list[Annotated[str, line(320)]] = msgspec.field(default_factory=list)
    search: Annotated[str, line(200, 0)] = ""


class ApproveWorker(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The approval of a worker, or its rejection if `is_approved` is false."""

    is_approved: bool
    group: Slug | UnsetType | None = UNSET


class WorkerPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The worker fields to change. Absent fields keep their values."""

    name: Name | UnsetType = UNSET
    group: Slug | UnsetType | None = UNSET
    labels: Labels | UnsetType = UNSET
    max_agents: Capacity | UnsetType = UNSET


class WorkerDeleteQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options for deleting a worker. `force` releases the worker's leases first."""

    force: bool = False


class GroupTotals(msgspec.Struct, kw_only=True):
    """Totals of the approved workers in a group. `capacity` includes only online workers."""

    total: int = 0
    online: int = 0
    capacity: int = 0
    active_leases: int = 0


class FleetOverview(msgspec.Struct, kw_only=True):
    """Totals of all workers.

    Capacity, utilisation and averages include only online workers. Null means that there is no data.
    """

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
    by_group: dict[str, GroupTotals]


class NewRegistrationKey(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A registration key to create.

    `group` is the group to which workers that register with the key are assigned. `expires_at` may be at most 365 days
    from now; the default is 7 days.
    """

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
    """A registration key with its secret, which is shown only once."""

    key: str
