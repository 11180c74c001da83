"""The first account of an installation, which becomes its admin.

If the server can be reached from other machines, registering the first account requires the set-up token, so that no
stranger becomes the admin. The token is derived from the master key and the installation's id, so every process can
compute it. It is stored only in a file for the operator.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from pathlib import Path

from corral.crypto import Sealer
from corral.database.engine import Work
from corral.errors import Forbidden
from corral.plugin import InstallationConfig
from corral_core.accounts.models import InstallationValueRow, UserRow, set_installation_value_once

PURPOSE = "accounts.setup_token"
CREATE = "corral user create --admin EMAIL"


class FirstAccountSetup:
    """Decides who may register the first account. Implements `corral.plugin.FirstAccount`."""

    def __init__(self, work: Work, sealer: Sealer, installation: InstallationConfig) -> None:
        self._work, self._sealer = work, sealer
        self._is_public, self.token_file = installation.is_public, installation.data_dir / "setup.token"

    async def instructions(self) -> str | None:
        token, has_admin = await self._work(lambda: (self._read_token(), _has_admin()), read=True)
        if token is None:
            self.discard_token()
            return None if has_admin else f"no account is an admin; create one on this machine: {CREATE}"
        if not self._is_public:
            return f"there is no account yet; the first person to register becomes the admin, or run: {CREATE}"
        if self._sealer.sealed:
            return f"there is no account yet; create the admin on this machine: {CREATE}"
        await asyncio.to_thread(_write_private, self.token_file, token)
        return (
            f"there is no account yet; create the admin on this machine: {CREATE}\n"
            f"  set-up token  {token}  (registers the admin; it is also in {self.token_file})"
        )

    def check_token(self, token: str | None) -> None:
        """Raise `Forbidden` if this token does not allow registering the first account.

        If the server listens only on the loopback interface, no token is needed. Runs in the caller's unit of work.
        """
        if token is None and not self._is_public:
            return
        if token is None or not self._sealer.verify(PURPOSE, _installation_id(), _decode_token(token)):
            raise Forbidden(
                "The first account needs the set-up token that the server printed when it started; the file "
                "setup.token in the data folder also contains it. Without the token, run this command on the server's "
                f"machine: {CREATE}",
                code="registration_closed",
            )

    @staticmethod
    def exists() -> bool:
        """Return whether an account exists. Runs in the caller's unit of work."""
        return bool(UserRow.select().exists())

    def claim(self) -> bool:
        """Return whether the caller's unit of work may create the first account.

        This is true for only one unit of work.
        """
        return not self.exists() and set_installation_value_once("first_admin", "registration")

    def discard_token(self) -> None:
        """Delete the file with the set-up token, which is not needed once an account exists."""
        with contextlib.suppress(OSError):
            self.token_file.unlink()

    def _read_token(self) -> str | None:
        if self.exists():
            return None
        return base64.urlsafe_b64encode(self._sealer.mac(PURPOSE, _installation_id())).decode().rstrip("=")


def _has_admin() -> bool:
    return bool(UserRow.select().where(UserRow.role == "admin").exists())


def _installation_id() -> bytes:
    return str(InstallationValueRow.get(InstallationValueRow.name == "installation_id").value).encode()


def _decode_token(token: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(token.strip() + "==")
    except ValueError:
        return b""


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(f"{text}\n")
