"""Access to the two vault secrets of a repository."""

from __future__ import annotations

from urllib.parse import urlsplit

from corral.auth.principal import Principal
from corral_github.models import Repository
from corral_plugins.secrets.api import AttachedObject, Secrets


class RepositorySecrets:
    """Reads repositories' secrets, and records their use. Every method runs in the caller's unit of work."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    def token(self, repository: Repository) -> str:
        """Return the API token for the code host."""
        attached = _attached_object(repository.id, "token")
        host = urlsplit(repository.api_url).hostname
        return self._secrets.use_value(repository.token_secret, attached.consumer_name, host, attached=attached)

    def webhook_values(self, repository: Repository) -> list[str]:
        """Return all current values of the webhook secret. The code host may sign with any of them."""
        return self._secrets.valid_values(
            repository.webhook_secret, attached=_attached_object(repository.id, "webhook")
        )

    def attach(self, repository: Repository, part: str, *, by: Principal) -> None:
        """Record that the repository uses the secret named in its field `token_secret` or `webhook_secret`.

        `part` is `token` or `webhook`.
        """
        name = repository.token_secret if part == "token" else repository.webhook_secret
        attached, pointer = _attached_object(repository.id, part), f"/{part}_secret"
        self._secrets.attach(name, attached, title=repository.name, pointer=pointer, by=by)

    def detach(self, repository_id: str) -> None:
        """Record that a disconnected repository no longer uses its secrets."""
        for part in ("token", "webhook"):
            self._secrets.detach(_attached_object(repository_id, part))


def _attached_object(repository_id: str, part: str) -> AttachedObject:
    return AttachedObject(plugin="github", kind=f"repository_{part}", id=repository_id)
