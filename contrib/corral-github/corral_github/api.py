"""The public interface of the plugin, which consists of its problem codes."""

from __future__ import annotations

from corral.errors import declare_codes

INVALID_SIGNATURE, DELIVERY_REUSED = "github.invalid_signature", "github.delivery_reused"

declare_codes(
    {
        INVALID_SIGNATURE: (
            401,
            "The delivery is not signed with the secret of the repository",
            "In the repository's webhook settings on GitHub, enter the value of the secret that webhook_secret names.",
        ),
        DELIVERY_REUSED: (
            409,
            "Another delivery with this id had a different body",
            "Give each delivery an id of its own. GitHub always does so, and repeats a delivery with the same body.",
        ),
    }
)
