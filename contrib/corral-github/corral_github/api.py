"""The public interface of the plugin, which consists of its problem codes."""

from __future__ import annotations

from corral.errors import declare_codes

INVALID_SIGNATURE, DELIVERY_REUSED = "github.invalid_signature", "github.delivery_reused"

declare_codes(
    {
        INVALID_SIGNATURE: (
            401,
            "The delivery is not signed with the secret of the repository",
            "Enter the value of the secret that webhook_secret names at the webhook of the repository on GitHub.",
        ),
        DELIVERY_REUSED: (
            409,
            "Another delivery with this id had a different body",
            "Nothing: GitHub gives each delivery an id of its own, and repeats a delivery with the same body.",
        ),
    }
)
