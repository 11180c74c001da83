"""The HTTP routes for SSH connections."""

from __future__ import annotations

import asyncio
import functools

from msgspec import UNSET

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked, Policy
from corral.egress.resolver import Unresolved
from corral.errors import Invalid
from corral.http.answers import Answer, IfMatch, Request
from corral.http.page import Page
from corral.http.routes import Rate, Routes
from corral_plugins.ssh.api import LoginTimeout
from corral_plugins.ssh.service.connections import SshConnections, check_policy, view_of
from corral_plugins.ssh.service.credentials import ConnectionCredentials
from corral_plugins.ssh.service.executions import SshExecutions
from corral_plugins.ssh.service.runner import RunContext, SshRunner
from corral_plugins.ssh.service.submitted_keys import normalize_host_key
from corral_plugins.ssh.shapes import (
    AcceptedHostKey,
    CommandExecutionView,
    CommandRequest,
    CommandResult,
    ConnectionPatch,
    ConnectionQuery,
    ConnectionTest,
    ConnectionView,
    ExecutionItem,
    ExecutionQuery,
    NewConnection,
)

READ, WRITE, EXECUTE = "ssh.read", "ssh.write", "ssh.execute"
CHANGES = ("not_found", "precondition_failed", "invalid_state")
STORED = ("url_blocked", "unknown_reference", "masked_value_submitted", "duplicate", "vault_sealed", "secret_expired")
CONNECTING = (
    "not_found",
    "host_key_unverified",
    "host_key_mismatch",
    "invalid_state",
    "url_blocked",
    "ssh_connect_failed",
    "ssh_auth_failed",
    "upstream_timeout",
    "circuit_open",
    "vault_sealed",
    "secret_expired",
    "forbidden",
)
EXECUTIONS = Rate("SSH execute", 30, 60, "person")
EXTRA_SECONDS = 30.0

routes = Routes("/ssh-connections", tag="SSH Connections", no_store=True)


@routes.get("/", needs=READ)
def list_connections(query: ConnectionQuery, connections: SshConnections, caller: Principal) -> Page[ConnectionView]:
    """List SSH connections, sorted by name."""
    return connections.list(query, by=caller)


@routes.post("/", needs=WRITE, status=201, raises=(*STORED, "quota_exceeded"))
async def create_connection(
    body: NewConnection,
    connections: SshConnections,
    credentials: ConnectionCredentials,
    egress: Egress,
    caller: Principal,
    request: Request,
    work: Work,
) -> ConnectionView:
    """Create an SSH connection. A submitted credential is stored in the vault and never returned.

    The first test reveals the machine's host key. An admin must accept this key before any credential is sent to the
    machine.
    """
    check_policy(body.host_key_policy, body.host_key, has_key=False)
    await credentials.check(body, body.auth_method)
    host_key = None if body.host_key is None else await normalize_host_key(body.host_key)
    warnings = await _check_address(egress, body.hostname, body.port)
    entry = request.unit_context(caller)
    row = await work(lambda: connections.create(body, host_key, by=caller), entry=entry)
    return view_of(row, warnings)


@routes.get("/{id}", needs=READ, live=True, raises=("not_found",))
def get_connection(id: str, connections: SshConnections) -> ConnectionView:
    """Get an SSH connection."""
    return view_of(connections.find(id))


@routes.put("/{id}", needs=WRITE, raises=(*CHANGES, *STORED))
async def update_connection(
    id: str,
    body: ConnectionPatch,
    match: IfMatch,
    connections: SshConnections,
    credentials: ConnectionCredentials,
    egress: Egress,
    caller: Principal,
    request: Request,
    work: Work,
) -> ConnectionView:
    """Change an SSH connection. Absent fields stay unchanged.

    If the host name or port changes, the host key must be accepted again. If `auth_method` changes, the credential must
    be submitted again.
    """
    stored = await work(lambda: connections.find(id), read=True)
    policy = stored.host_key_policy if body.host_key_policy is UNSET else body.host_key_policy
    moved = body.hostname not in (UNSET, stored.hostname) or body.port not in (UNSET, stored.port)
    given_key = body.host_key if isinstance(body.host_key, str) else None
    check_policy(policy, given_key, has_key=stored.host_key is not None and not moved)
    await credentials.check(body, stored.auth_method if body.auth_method is UNSET else body.auth_method)
    host_key = None if given_key is None else await normalize_host_key(given_key)
    warnings: list[str] = []
    if moved:
        hostname = body.hostname if isinstance(body.hostname, str) else stored.hostname
        warnings = await _check_address(egress, hostname, body.port if isinstance(body.port, int) else stored.port)
    entry = request.unit_context(caller)
    update = functools.partial(connections.update, id, body, host_key, match, checked_version=stored.version, by=caller)
    row = await work(update, entry=entry)
    return view_of(row, warnings)


@routes.delete("/{id}", needs=WRITE, raises=(*CHANGES, "in_use"))
def delete_connection(id: str, match: IfMatch, connections: SshConnections, caller: Principal) -> None:
    """Delete an SSH connection and the credential that was submitted with it. The records of its commands are kept."""
    connections.delete(id, match, by=caller)


@routes.post("/{id}/test", needs=WRITE, seconds=180.0, raises=CONNECTING)
async def test_connection(id: str, runner: SshRunner, caller: Principal, request: Request) -> ConnectionTest:
    """Test an SSH connection by checking the host key and logging in.

    If the host key has not been accepted, no credential is sent, and the error response contains the key's fingerprint.
    """
    return await runner.test(id, RunContext(by=caller, entry=request.unit_context(caller)))


@routes.post(
    "/{id}/execute",
    needs=EXECUTE,
    seconds=660.0,
    abandoned=True,
    rate=EXECUTIONS,
    raises=(*CONNECTING, "command_denied", "concurrency_limit"),
)
async def execute_command(
    id: str, body: CommandRequest, runner: SshRunner, caller: Principal, request: Request
) -> CommandResult:
    """Run a command over SSH, and wait until it ends.

    The status is 200 even if the command itself fails. If the client disconnects, the command is stopped.
    """
    context = RunContext(by=caller, entry=request.unit_context(caller))
    try:
        async with asyncio.timeout(body.timeout_seconds + EXTRA_SECONDS):
            return await runner.execute(id, body, context)
    except TimeoutError:
        raise LoginTimeout("The machine did not answer in time.") from None


@routes.post("/{id}/host-key/accept", needs=WRITE, raises=CHANGES)
def accept_host_key(id: str, body: AcceptedHostKey, match: IfMatch, connections: SshConnections) -> ConnectionView:
    """Accept the host key that the machine presented most recently.

    The fingerprint in the request must match this key.
    """
    return view_of(connections.accept_host_key(id, body.fingerprint, match))


@routes.get("/{id}/executions", needs=READ, raises=("not_found", "invalid_cursor"))
def list_executions(
    id: str, query: ExecutionQuery, executions: SshExecutions, caller: Principal
) -> Page[ExecutionItem]:
    """List the commands that were run on a machine, newest first.

    The commands remain listed after the connection is deleted.
    """
    return executions.list(id, query, by=caller)


@routes.get("/{id}/executions/{execution_id}", needs=READ, raises=("not_found",))
def get_execution(id: str, execution_id: str, executions: SshExecutions) -> CommandExecutionView:
    """Get the record of a command, with the beginning of its output."""
    return executions.get(id, execution_id)


@routes.post("/{id}/executions/{execution_id}/cancel", needs=EXECUTE, raises=("not_found", "invalid_state"))
async def cancel_execution(
    id: str,
    execution_id: str,
    executions: SshExecutions,
    runner: SshRunner,
    caller: Principal,
    request: Request,
    work: Work,
) -> Answer[CommandExecutionView]:
    """Cancel a running command. The command stops on the machine within seconds."""
    view = await work(lambda: executions.cancel(id, execution_id), entry=request.unit_context(caller))
    runner.cancel_here(view.id)
    return Answer(body=view)


async def _check_address(egress: Egress, hostname: str, port: int) -> list[str]:
    """Check an address before it is stored.

    Return warnings, or raise `Invalid` (`url_blocked`) if egress to the address is blocked.
    """
    try:
        await egress.addresses(hostname, port, Policy("internal"))
    except EgressBlocked as blocked:
        raise Invalid.at("/hostname", blocked.code, blocked.reason, problem="url_blocked") from None
    except Unresolved:
        return ["unresolved_host"]
    return []
