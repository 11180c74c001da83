"""Download links, each of which gives access to one file for an hour without a login."""

from __future__ import annotations

import base64
import binascii

from corral import clock
from corral.crypto import Sealer
from corral.errors import Forbidden, Gone, NotFound, Problem
from corral.http.answers import Request
from corral.http.routes import API_PREFIX
from corral.plugin import InstallationConfig
from corral_plugins.files.models import File
from corral_plugins.files.service.display_names import content_disposition
from corral_plugins.files.service.media_type_detection import served_type
from corral_plugins.files.service.registry import FileRegistry
from corral_plugins.files.service.storage import FileStorage
from corral_plugins.files.shapes import FileLink, LinkQuery

SECONDS = 3600
PURPOSE = "files.link"


class FileLinks:
    """Creates and checks download links. If files are in an object store, the links lead directly to the store."""

    def __init__(
        self, storage: FileStorage, registry: FileRegistry, sealer: Sealer, installation: InstallationConfig
    ) -> None:
        self._storage, self._registry, self._sealer = storage, registry, sealer
        self._public_url = (installation.public_url or "").rstrip("/")

    async def make(self, row: File) -> FileLink:
        """Return a new download link for a file."""
        expires = int(clock.time_s()) + SECONDS
        store = self._storage.object_store
        if store is not None:
            disposition, media = content_disposition(str(row.name)), served_type(str(row.detected_type))
            url = await store.link(str(row.key), SECONDS, disposition=disposition, media_type=media)
        else:
            signature = _encode(self._sealer.mac(PURPOSE, _signed_bytes(str(row.id), str(expires))))
            path = f"{API_PREFIX}/files/{row.id}/content?expires={expires}&signature={signature}"
            url = f"{self._public_url}{path}"
        return FileLink(url=url, expires_at=clock.format_instant(expires), expires_in_seconds=SECONDS)

    def open(self, file_id: str, query: LinkQuery) -> File:
        """Return the file to which a link leads.

        Raise `Forbidden` if the signature is wrong, `Gone` (`link_expired`) if the link has expired, or `NotFound` if
        the file does not exist.
        """
        if not self._sealer.verify(PURPOSE, _signed_bytes(file_id, query.expires), _decode(query.signature)):
            raise Forbidden("The link was modified; create a new link.", code="invalid_signature")
        if int(query.expires) <= clock.time_s():
            raise Gone("The link has expired; create a new link.", code="link_expired")
        row = self._registry.find_any(file_id)
        if row is None:
            raise NotFound()
        return row


def convert_to_forbidden(problem: Problem, request: Request | None) -> None:
    """Change the status of `invalid_signature` from 401 to 403, because a link does not authenticate a caller."""
    if problem.code == "invalid_signature":
        problem.status = 403


def _signed_bytes(file_id: str, expires: str) -> bytes:
    return f"GET\n{file_id.lower()}\n{expires}".encode()


def _encode(mac: bytes) -> str:
    return base64.urlsafe_b64encode(mac).rstrip(b"=").decode()


def _decode(signature: str) -> bytes:
    """Decode a signature. Return empty bytes unless the signature is in exactly the form that `_encode` produces."""
    try:
        mac = base64.b64decode(signature + "=" * (-len(signature) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
    return mac if _encode(mac) == signature else b""
