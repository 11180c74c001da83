"""The schedule that refreshes the templates from the remote index."""

from __future__ import annotations

from corral_plugins.marketplace.service.remote_index import RemoteIndex


async def refresh_index(index: RemoteIndex) -> None:
    """Fetch the remote index, which lists additional templates."""
    await index.refresh()
