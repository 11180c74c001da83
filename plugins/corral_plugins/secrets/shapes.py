"""Request and response bodies of the vault. Only the response to `reveal` contains a stored value."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Instant, MomentIn, Slug, text_format

MASK = "********"
NAME = r"^[A-Za-z][A-Za-z0-9_.-]{0,127}(?![\s\S])"
HOST = r"^(\*\.)?[A-Za-z0-9]([A-Za-z0-9-]{0,62})(\.[A-Za-z0-9]([A-Za-z0-9-]{0,62}))*(?![\s\S])"
CONSUMER = r"^(plugin|agent|workflow|trigger|tool|worker_group):[A-Za-z0-9][A-Za-z0-9_.:/-]{0,199}(?![\s\S])"

Status = Literal["active", "expiring", "expired", "deleted"]
Name = Annotated[str, text_format(NAME, "1 to 128 letters, digits, _, . and -, beginning with a letter")]
Value = Annotated[str, Meta(min_length=1, max_length=65536)]
Description = Annotated[str, Meta(max_length=2000)]
Consumers = Annotated[
    list[
        Annotated[
            str,
            text_format(
                CONSUMER,
                "plugin, agent, workflow, trigger, tool or worker_group, a colon, and a name or id, as in plugin:llm",
            ),
        ]
    ],
    Meta(max_length=100),
]
Hosts = Annotated[
    list[
        Annotated[
            str,
            text_format(
                HOST,
                "the name of a host, such as api.example.org or *.example.org, without a scheme, port or path",
                max_length=253,
            ),
        ]
    ],
    Meta(max_length=50),
]
MaxVersions = Annotated[int, Meta(ge=1, le=100)]


class NewSecret(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A secret to store."""

    name: Name
    value: Value
    category: Slug = "general"
    description: Description = ""
    expires_at: MomentIn | None = None
    allowed_consumers: Consumers = []
    allowed_hosts: Hosts = []
    max_versions: MaxVersions | None = None


class SecretPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Changes to a secret. Absent fields stay unchanged.

    A `value` is stored as a new version. `cas` is the version number that the caller expects to be current.
    """

    name: Name | UnsetType = UNSET
    value: Value | UnsetType = UNSET
    category: Slug | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    expires_at: MomentIn | UnsetType | None = UNSET
    allowed_consumers: Consumers | UnsetType = UNSET
    allowed_hosts: Hosts | UnsetType = UNSET
    max_versions: MaxVersions | UnsetType = UNSET
    cas: Annotated[int, Meta(ge=1)] | UnsetType = UNSET


class GenerationOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The length and character set of a value to generate."""

    length: Annotated[int, Meta(ge=8, le=4096)] = 32
    charset: Literal["alnum", "ascii", "hex", "base64url"] = "alnum"


class SecretRotation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The new value, or the options for generating one.

    For `grace_seconds` seconds, Corral still accepts signatures made with the previous value.
    """

    value: Value | None = None
    generate: GenerationOptions | None = None
    grace_seconds: Annotated[int, Meta(ge=0, le=86_400)] = 0


class RevealRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to reveal a value. The reason is recorded in the audit log."""

    reason: Annotated[str, Meta(min_length=3, max_length=500)]
    version: Annotated[int, Meta(ge=1)] | None = None


class RevealedSecret(msgspec.Struct, kw_only=True):
    """A revealed value, with its version number."""

    value: str
    version: int


class SecretQuery(PageQuery, kw_only=True, forbid_unknown_fields=True):
    """Filters for listing secrets.

    Deleted secrets are listed only if `status` includes them. `search` matches text in names and descriptions.
    """

    category: list[Slug] = msgspec.field(default_factory=list)
    status: list[Status] = msgspec.field(default_factory=list)
    search: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType = UNSET


class ExpiringQuery(PageQuery, kw_only=True, forbid_unknown_fields=True):
    """The query for listing secrets that have expired or will expire within `days` days."""

    days: Annotated[int, Meta(ge=1, le=365)] = 30


class SecretDeleteQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options for deleting a secret. `force` deletes the secret even if objects use it."""

    force: bool = False


class SecretUser(msgspec.Struct, kw_only=True):
    """An object that uses a secret."""

    kind: str
    id: str
    name: str


class SecretView(msgspec.Struct, kw_only=True):
    """A secret without its value.

    `read_only` means that the environment variable `CORRAL_SECRET_<NAME>` sets the secret.
    """

    id: str
    name: str
    masked: str = MASK
    category: str
    description: str
    status: Status
    version: int
    expires_at: Instant | None
    allowed_consumers: list[str]
    allowed_hosts: list[str]
    max_versions: int
    read_only: bool
    references: list[SecretUser]
    last_used_at: Instant | None
    last_revealed_at: Instant | None
    rotated_at: Instant | None
    created_by: str | None
    created_at: Instant | None
    updated_at: Instant | None
    warnings: list[str] | UnsetType = UNSET


class VersionView(msgspec.Struct, kw_only=True):
    """A version of a secret, without its value."""

    n: int
    state: Literal["current", "grace", "old", "destroyed"]
    created_by: str | None
    created_at: Instant
    grace_until: Instant | None


class KeyCount(msgspec.Struct, kw_only=True):
    """A master key, with the number of rows encrypted under it. `label` is null if the key is not loaded."""

    key_id: str
    label: str | None
    rows: int


class KeyStatus(msgspec.Struct, kw_only=True):
    """The master keys. `remaining` is the number of rows that are not encrypted under the active key."""

    sealed: bool
    active_key: str | None
    keys: list[KeyCount]
    remaining: int
    rotating: bool


class RemainingRows(msgspec.Struct, kw_only=True):
    """The number of rows that still have to be rewrapped."""

    remaining: int
