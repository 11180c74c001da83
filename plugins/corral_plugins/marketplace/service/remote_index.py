"""Fetches the remote index, which lists additional templates.

The index is a JSON document: `{"templates": [{"sha256": "…", "manifest": {…}}]}`. Each hash must match its manifest. A
template whose hash does not match is listed, but cannot be installed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from corral.database.engine import Work
from corral.egress.client import Egress
from corral.errors import Problem
from corral.plugin import Settings
from corral.schema.json_schema_validation import json_schema_errors
from corral.schema.strict_json import parse_json
from corral_plugins.marketplace.service.catalogue import TemplateCatalogue
from corral_plugins.marketplace.service.manifests import check_manifest
from corral_plugins.marketplace.service.uploads import MAX_STORED, store_remote, stored_row
from corral_plugins.marketplace.settings import INDEX_URL

log = logging.getLogger("corral.marketplace")
Json = dict[str, Any]
MAX_BYTES = 5 * 1024 * 1024
ENTRY = {
    "type": "object",
    "required": ["sha256", "manifest"],
    "properties": {"sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"}, "manifest": {"type": "object"}},
}
SCHEMA = {
    "type": "object",
    "required": ["templates"],
    "properties": {"templates": {"type": "array", "maxItems": MAX_STORED, "items": ENTRY}},
}


class RemoteIndex:
    """Fetches the remote index, and stores its templates."""

    def __init__(self, work: Work, settings: Settings, egress: Egress, catalogue: TemplateCatalogue) -> None:
        self._work, self._settings, self._egress, self._catalogue = work, settings, egress, catalogue

    async def refresh(self) -> None:
        """Replace the stored remote templates with the templates that the remote index lists now.

        If the index cannot be read, the stored templates are kept.
        """
        url = await self._work(lambda: self._settings.get(INDEX_URL), read=True)
        if url is None:
            await self._work(lambda: store_remote([]))
            return
        entries = await self._fetch(url)
        if entries is not None:
            rows = await self._rows(entries)
            await self._work(lambda: store_remote(rows))

    async def _fetch(self, url: str) -> list[Json] | None:
        import httpx2

        from corral.egress.guard import EgressBlocked
        from corral.egress.transport import is_truncated

        async with self._egress.client("template_index", max_bytes=MAX_BYTES) as client:
            try:
                response = await client.get(url)
            except (httpx2.HTTPError, EgressBlocked) as error:
                log.warning("the index of templates cannot be fetched", extra={"error": str(error)[:200]})
                return None
        if response.status_code != 200 or is_truncated(response):
            log.warning("the index of templates cannot be fetched", extra={"status": response.status_code})
            return None
        try:
            document = parse_json(response.content)
        except Problem as problem:
            log.warning("the index of templates is not JSON", extra={"error": problem.detail})
            return None
        if faults := json_schema_errors(SCHEMA, document):
            log.warning("the index of templates is not valid", extra={"pointer": faults[0].pointer})
            return None
        entries: list[Json] = document["templates"]
        return entries

    async def _rows(self, entries: list[Json]) -> list[Json]:
        """Return the column values of the index entries that can be stored.

        These entries have a valid manifest, and a slug that is not used by any template from this release or a plugin.
        """
        others, rows = await self._catalogue.contributed(), {}
        for entry in entries:
            manifest = await asyncio.to_thread(check_manifest, entry["manifest"])
            if manifest.slug in others or manifest.faults:
                log.warning("template of the index ignored", extra={"slug": manifest.slug[:64]})
            else:
                row = stored_row(manifest, "remote", entry["sha256"], None)
                rows[manifest.slug, manifest.version] = row
        return list(rows.values())
