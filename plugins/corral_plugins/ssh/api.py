"""The public API of the `ssh` plugin: its error codes and events."""

from __future__ import annotations

from corral.database.model import ADMIN
from corral.errors import Problem, declare_codes
from corral.events.event import Event

declare_codes(
    {
        "host_key_unverified": (
            409,
            "The host key has not been accepted",
            "Compare the fingerprint with the one that `ssh-keygen -lf` prints on the machine, and accept it with "
            "`corral ssh accept-key NAME FINGERPRINT`.",
        ),
        "host_key_mismatch": (
            409,
            "The host key has changed",
            "Find out why the machine's host key has changed. If the new key is legitimate, accept it with `corral ssh "
            "accept-key NAME FINGERPRINT`; otherwise delete the connection.",
        ),
        "ssh_connect_failed": (
            502,
            "The machine could not be reached over SSH",
            "Check the host name, the port and the network between Corral and the machine.",
        ),
        "ssh_auth_failed": (
            502,
            "The machine refused the login",
            "Check the user name and the credential of the connection.",
        ),
        "command_denied": (
            403,
            "The command rules of the connection forbid the command",
            "Use a command that allowed_commands permits, or ask an admin to change the rules of the connection.",
        ),
    }
)


class ConnectFailed(Problem):
    """The machine could not be reached, or it closed the connection before the login."""

    default = "ssh_connect_failed"


class LoginFailed(Problem):
    """The machine refused the login."""

    default = "ssh_auth_failed"


class LoginTimeout(Problem):
    """The machine did not answer in time."""

    default = "upstream_timeout"


class SshHostKeyMismatch(Event, kw_only=True):
    """Alerts admins that a machine presented a host key that differs from the accepted one.

    `old` is the fingerprint of the accepted key, and `new` is the fingerprint of the presented key. `name` is the name
    of the connection. `reason` explains what happened and what to do.
    """

    event = "ssh.host_key_mismatch"
    visibility = ADMIN

    connection_id: str
    name: str
    old: str
    new: str
    reason: str


class SshExecuted(Event, kw_only=True):
    """A command on a machine has ended. `actor` is the user, API key or agent that ran the command."""

    event = "ssh.executed"
    visibility = ADMIN

    execution_id: str
    connection_id: str
    actor: str
    status: str
    exit_code: int | None
    duration_ms: int


EVENTS = (SshHostKeyMismatch, SshExecuted)
