"""The public interface of the `backup` plugin: the protocol for steps that complete a restore."""

from __future__ import annotations

from typing import Protocol

from corral.auth.principal import Principal


class RestoreStep(Protocol):
    """Completes a restore for one plugin. The plugin provides an implementation as a service."""

    def after_restore(self, by: Principal) -> str | None:
        """Adapt the restored rows to the new installation. For example, end all sessions.

        This method runs in the restore transaction, so either all steps take effect or nothing is restored.
        Return a message if the operator must know about a problem with the restored data, otherwise None.
        """
        ...
