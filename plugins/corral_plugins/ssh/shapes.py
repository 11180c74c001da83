"""The request and response bodies of the SSH routes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, Name, Tags, line, text_format

AuthMethod = Literal["password", "key"]
HostKeyPolicy = Literal["tofu", "strict"]
HostKeyState = Literal["unknown", "pending", "trusted", "mismatch"]
Status = Literal["untested", "ok", "failing", "blocked"]
ExecutionStatus = Literal["running", "completed", "failed", "timed_out", "cancelled", "interrupted"]

Hostname = Annotated[str, line(253), Meta(examples=["build.example.org"])]
Port = Annotated[int, Meta(ge=1, le=65535)]
Username = Annotated[str, line(64)]
Patterns = Annotated[list[Annotated[str, line(500)]], Meta(max_length=100)]
Password = Annotated[str, line(1024)]
PrivateKey = Annotated[str, Meta(min_length=1, max_length=65_536)]
HostKey = Annotated[str, line(16_384)]
Concurrency = Annotated[int, Meta(ge=1, le=20)]
Description = Annotated[str, Meta(max_length=2000)]
Command = Annotated[str, Meta(min_length=1, max_length=8192)]
Seconds = Annotated[int, Meta(ge=1, le=600)]
Stdin = Annotated[str, Meta(max_length=65_536)]
Environment = Annotated[
    dict[
        Annotated[
            str,
            text_format(
                r"^[A-Za-z_][A-Za-z0-9_]{0,127}(?![\s\S])",
                "the name of a variable: 1 to 128 letters, digits and _, not beginning with a digit",
            ),
        ],
        Annotated[str, line(8192, 0)],
    ],
    Meta(max_length=20),
]
Argv = Annotated[list[Annotated[str, Meta(max_length=8192)]], Meta(min_length=1, max_length=200)]


class NewConnection(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields of a new connection.

    The credential is either a secret in the vault (`secret_id`), or a submitted `password` or `private_key`. Submitted
    credentials are stored in the vault and never returned. The credential can also be added later. `host_key` is an
    OpenSSH public key line, which the policy `strict` requires.
    """

    name: Name
    hostname: Hostname
    username: Username
    port: Port = 22
    auth_method: AuthMethod = "key"
    secret_id: Id | None = None
    passphrase_secret_id: Id | None = None
    password: Password | None = None
    private_key: PrivateKey | None = None
    passphrase: Password | None = None
    host_key_policy: HostKeyPolicy = "tofu"
    host_key: HostKey | None = None
    allowed_commands: Patterns = []
    denied_commands: Patterns = []
    require_approval: bool = True
    max_concurrency: Concurrency = 2
    description: Description = ""
    tags: Tags = []


class ConnectionPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields of a connection to change. Absent fields stay unchanged.

    If `hostname` or `port` changes, the machine's host key must be accepted again.
    """

    name: Name | UnsetType = UNSET
    hostname: Hostname | UnsetType = UNSET
    username: Username | UnsetType = UNSET
    port: Port | UnsetType = UNSET
    auth_method: AuthMethod | UnsetType = UNSET
    secret_id: Id | UnsetType | None = UNSET
    passphrase_secret_id: Id | UnsetType | None = UNSET
    password: Password | UnsetType = UNSET
    private_key: PrivateKey | UnsetType = UNSET
    passphrase: Password | UnsetType = UNSET
    host_key_policy: HostKeyPolicy | UnsetType = UNSET
    host_key: HostKey | UnsetType = UNSET
    allowed_commands: Patterns | UnsetType = UNSET
    denied_commands: Patterns | UnsetType = UNSET
    require_approval: bool | UnsetType = UNSET
    max_concurrency: Concurrency | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET


class ConnectionView(msgspec.Struct, kw_only=True):
    """A connection.

    `host_key_fingerprint` is the fingerprint of the accepted host key, and `seen_fingerprint` is the fingerprint of the
    host key that the machine presented most recently. `status` is `blocked` while the machine presents a host key other
    than the accepted one. `warnings` may contain `unresolved_host`.
    """

    id: str
    version: int
    created_by: str | None
    created_at: Instant
    updated_at: Instant
    name: str
    hostname: str
    port: int
    username: str
    auth_method: AuthMethod
    secret_id: str | None
    passphrase_secret_id: str | None
    has_credential: bool
    host_key_policy: HostKeyPolicy
    host_key_state: HostKeyState
    host_key_fingerprint: str | None
    seen_fingerprint: str | None
    allowed_commands: list[str]
    denied_commands: list[str]
    require_approval: bool
    max_concurrency: int
    description: str
    tags: list[str]
    status: Status
    last_tested_at: Instant | None
    last_error: str | None
    warnings: list[str] | UnsetType = UNSET


class ConnectionQuery(PageQuery, kw_only=True):
    """Filters for listing connections. `search` matches text in names, host names and descriptions."""

    search: Annotated[str, line(200)] | UnsetType = UNSET
    tag: list[Annotated[str, line(64)]] | UnsetType = UNSET
    status: list[Status] | UnsetType = UNSET


class ConnectionTest(msgspec.Struct, kw_only=True):
    """The result of a successful test. `auth` is always `ok`, because a refused login returns an error response."""

    ok: Literal[True] = True
    fingerprint: str
    server_version: str
    latency_ms: int
    auth: Literal["ok"] = "ok"


class AcceptedHostKey(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fingerprint of the host key to accept. It must match the key that the machine presented most recently."""

    fingerprint: Annotated[str, line(100), Meta(examples=["SHA256:nThbg6kXUpJWGl7E1IGOCspRomTxdCARLviKw6E5SY8"])]


class CommandRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A command to run: either `command`, a command line for the machine's shell, or `argv`, a list of arguments.

    The arguments in `argv` are quoted for a POSIX shell. The machine ignores variables in `env` that its SSH server's
    `AcceptEnv` option does not list.
    """

    command: Command | UnsetType = UNSET
    argv: Argv | UnsetType = UNSET
    timeout_seconds: Seconds = 60
    stdin: Stdin = ""
    env: Environment = {}


class CommandResult(msgspec.Struct, kw_only=True):
    """The result of a command. Credentials have been redacted from the output.

    `exit_code` is null if a signal ended the command. `truncated` means that the command was stopped because its output
    was too long, and `timed_out` means that it was stopped because its time limit expired.
    """

    execution_id: str
    exit_code: int | None
    signal: str | None
    stdout: str
    stderr: str
    truncated: bool
    timed_out: bool
    duration_ms: int


class ExecutionItem(msgspec.Struct, kw_only=True):
    """The record of a command in a list.

    `actor` is the user, API key or agent that ran the command. `error` is the reason why the command did not run or was
    interrupted.
    """

    id: str
    connection_id: str
    command: str
    actor: str
    task_id: str | None
    approval_id: str | None
    status: ExecutionStatus
    exit_code: int | None
    signal: str | None
    truncated: bool
    error: str | None
    bytes_out: int
    started_at: Instant
    finished_at: Instant | None
    duration_ms: int | None


class CommandExecutionView(ExecutionItem, kw_only=True):
    """The record of a command, with the first 64 KiB of its standard output and of its standard error."""

    stdout: str
    stderr: str


class ExecutionQuery(PageQuery, kw_only=True):
    """Filters for listing the commands that were run on a machine."""

    status: list[ExecutionStatus] | UnsetType = UNSET
