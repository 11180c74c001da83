"""The request and response bodies of the marketplace routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, line, text_format

Json = dict[str, Any]
Version = Annotated[
    str,
    text_format(
        r"^[0-9]+\.[0-9]+\.[0-9]+(?![\s\S])", "three numbers, such as 1.0.0", max_length=40, examples=["1.0.0"]
    ),
]
Slug = Annotated[
    str,
    text_format(
        r"^[a-z][a-z0-9-]{1,62}[a-z0-9](?![\s\S])",
        "3 to 64 characters of a-z, 0-9 and -, beginning with a letter, not ending with -",
        examples=["my-template"],
    ),
]
Category = Annotated[
    str,
    text_format(
        r"^[a-z][a-z0-9-]{0,39}(?![\s\S])",
        "1 to 40 characters of a-z, 0-9 and -, beginning with a letter",
        examples=["general"],
    ),
]
SecretName = Annotated[
    str,
    text_format(
        r"^[A-Za-z_][A-Za-z0-9_.-]{0,127}(?![\s\S])",
        "1 to 128 letters, digits, _, . and -, beginning with a letter or _",
    ),
]
Parameters = Annotated[dict[str, Any], Meta(examples=[{}])]
Severity = Literal["warning", "error", "critical"]
Status = Literal["installed", "partly_removed", "removed"]
OnConflict = Literal["rename", "fail", "skip"]
Ids = Annotated[list[Id], Meta(max_length=50)]


class ManifestBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A template manifest. `GET /marketplace/schema` returns the schema that describes all members and their types."""

    schema: Any = UNSET
    slug: Any = UNSET
    name: Any = UNSET
    version: Any = UNSET
    category: Any = UNSET
    tags: Any = UNSET
    license: Any = UNSET
    description: Any = UNSET
    readme: Any = UNSET
    author: Any = UNSET
    requires: Any = UNSET
    parameters: Any = UNSET
    secrets: Any = UNSET
    permissions: Any = UNSET
    resources: Any = UNSET
    changes: Any = UNSET
    sha256: Any = UNSET

    def data(self) -> Json:
        """Return the members that the request contains."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not UNSET}


class TemplateQuery(PageQuery, kw_only=True):
    """Filters for listing templates. `search` matches text in names, descriptions, slugs and tags."""

    category: list[Annotated[str, line(40)]] | UnsetType = UNSET
    search: Annotated[str, line(200)] | UnsetType = UNSET
    source: list[Annotated[str, line(100)]] | UnsetType = UNSET
    tag: list[Annotated[str, line(64)]] | UnsetType = UNSET


class VersionQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The version to return. The default is the latest version."""

    version: Version | UnsetType = UNSET


class TemplateVersionsQuery(PageQuery, kw_only=True):
    """The page of versions to return. Versions are sorted newest first."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a template that a person should review before installing the template.

    A finding with the severity `error` prevents an upload. If there is a `critical` finding, only admins can install
    the template.
    """

    severity: Severity
    code: str
    pointer: str
    detail: str


class TemplateProblem(msgspec.Struct, frozen=True, kw_only=True):
    """A reason why a template cannot be installed. `pointer` refers to the relevant place in the manifest."""

    code: str
    pointer: str
    detail: str


class TemplatePermissions(msgspec.Struct, kw_only=True):
    """The tools, secrets and hosts that a template's resources may use.

    In `egress`, the value `*` stands for any public host.
    """

    tools: list[str]
    secrets: list[str]
    egress: list[str]


class TemplateResource(msgspec.Struct, kw_only=True):
    """A resource that a template contains."""

    kind: str
    key: str
    title: str


class TemplateView(msgspec.Struct, kw_only=True):
    """A template.

    `source` is `bundled`, `plugin:<name>`, `uploaded` or `remote`. If `installable` is false, `problems` contains the
    reasons. `installations` is the number of installations that have not been removed.
    """

    id: str
    slug: str
    name: str
    version: str
    category: str
    description: str
    readme: str
    author: Json | None
    license: str | None
    tags: list[str]
    requires: Json
    parameters: Json
    secrets: list[Json]
    permissions: TemplatePermissions
    resources: list[TemplateResource]
    sha256: str
    source: str
    findings: list[Finding]
    installable: bool
    problems: list[TemplateProblem]
    installations: int


class TemplateDetails(TemplateView, kw_only=True):
    """A template with its manifest."""

    manifest: Json


class TemplateVersionView(msgspec.Struct, kw_only=True):
    """A version of a template. `published_at` is null for templates that are part of a distribution package."""

    version: str
    sha256: str
    published_at: Instant | None
    changes: str


class CategoryView(msgspec.Struct, kw_only=True):
    """A category, with the number of templates in it."""

    category: str
    templates: int


class CategoryList(msgspec.Struct, kw_only=True):
    """All categories, sorted by name."""

    items: list[CategoryView]


class ManifestFault(msgspec.Struct, kw_only=True):
    """An error in a manifest."""

    pointer: str
    code: str
    detail: str


class ManifestValidation(msgspec.Struct, kw_only=True):
    """The result of checking a manifest. A manifest is not valid if one of its findings is an error."""

    valid: bool
    errors: list[ManifestFault]
    findings: list[Finding]


class InstallTemplate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options for installing a template.

    `secrets_map` maps the secret names in the template to names in the vault. `on_conflict` determines what happens if
    an object with the same name as a resource exists: with `rename`, the new object gets another name; with `fail`, the
    installation fails; and with `skip`, the existing object is used. With `dry_run`, nothing is created, and the
    response is the plan.
    """

    version: Version | UnsetType = UNSET
    parameters: Parameters = {}
    name_prefix: Annotated[str, line(40, 0)] = ""
    secrets_map: Annotated[dict[SecretName, SecretName], Meta(max_length=50)] = {}
    on_conflict: OnConflict = "rename"
    dry_run: bool = False


class MissingGrant(msgspec.Struct, kw_only=True):
    """An existing secret that an object of the installation is not yet allowed to use.

    To allow this, an admin adds `consumer` to the secret's `allowed_consumers`. In a plan, `consumer` is null.
    """

    secret: str
    kind: str
    key: str
    consumer: str | None


class MissingParts(msgspec.Struct, kw_only=True):
    """The missing requirements of an installation: secrets, unavailable tools, and permissions to use secrets."""

    secrets: list[str] = []
    tools: list[str] = []
    grants: list[MissingGrant] = []


class PlannedObject(msgspec.Struct, kw_only=True):
    """An object that the installation would create, with its final name, or an existing object that it would use."""

    kind: str
    key: str
    name: str
    action: Literal["create", "reuse"]
    renamed_from: str | None


class ToolPlan(msgspec.Struct, kw_only=True):
    """The tools that the agents get, and the tools that the installing user is not allowed to grant to them."""

    granted: list[str]
    refused: list[str]


class InstallationPlan(msgspec.Struct, kw_only=True):
    """The objects that an installation would create. A plan itself creates nothing.

    `missing_plugins` lists the inactive plugins without which the installation would fail.
    """

    slug: str
    version: str
    sha256: str
    objects: list[PlannedObject]
    permissions: TemplatePermissions
    tools: ToolPlan
    missing: MissingParts
    missing_plugins: list[str]
    findings: list[Finding]
    warnings: list[str]


class CreatedObject(msgspec.Struct, kw_only=True):
    """An object of an installation.

    `edited` says whether a person has changed the object since the installation. It is null in lists. A `reused` object
    already existed before the installation. `state` is `present`, `removed` (by the marketplace) or `deleted` (by a
    person). `once` contains values that are returned only when the template is installed, such as the URL of a webhook
    trigger.
    """

    kind: str
    key: str
    id: str
    name: str
    edited: bool
    reused: bool
    state: Literal["present", "removed", "deleted"]
    once: dict[str, str] = {}


class InstallationItem(msgspec.Struct, kw_only=True):
    """An installation of a template. `version_available` is a newer version, or null if there is none."""

    id: str
    template_id: str
    slug: str
    version: str
    sha256: str
    parameters: Json
    name_prefix: str
    missing: MissingParts
    status: Status
    installed_by: str | None
    created_at: Instant
    updated_at: Instant
    version_available: str | None


class InstallationView(InstallationItem, kw_only=True):
    """An installation, with its objects and their current state."""

    created: list[CreatedObject]


class NewInstallation(InstallationView, kw_only=True):
    """A new installation, with its objects."""

    warnings: list[str]


class InstallationQuery(PageQuery, kw_only=True):
    """Filters for listing installations."""

    status: list[Status] | UnsetType = UNSET
    template_id: list[Id] | UnsetType = UNSET


class UpgradeInstallation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options for upgrading an installation.

    `version` defaults to the latest version. Parameters that are omitted keep their values.
    """

    version: Version | UnsetType = UNSET
    parameters: Parameters = {}
    dry_run: bool = False


class ChangedObject(msgspec.Struct, kw_only=True):
    """An object, with the fields that the upgrade changes."""

    kind: str
    key: str
    id: str
    name: str
    fields: list[str]


class KeptField(msgspec.Struct, kw_only=True):
    """A field that a person edited and that the new template changes. The upgrade keeps the `current` value."""

    field: str
    installed: Any
    new: Any
    current: Any


class EditedObject(ChangedObject, kw_only=True):
    """An object, with the fields that the upgrade keeps because a person edited them.

    If a person has deleted the object, `fields` contains only `id`, and `values` is empty.
    """

    values: list[KeptField]


class KeptObject(msgspec.Struct, kw_only=True):
    """An object that is not removed. `reason` is `edited`, `running`, `in_use`, `reused` or `plugin_required`."""

    kind: str
    key: str
    id: str
    name: str
    reason: str


class ObjectRef(msgspec.Struct, kw_only=True):
    """A reference to an object."""

    kind: str
    key: str
    id: str
    name: str


class UpgradeResult(msgspec.Struct, kw_only=True):
    """The changes that an upgrade made or would make.

    `kept_local` lists edited fields that keep their local values. `warnings` lists problems such as missing
    requirements and tools that agents do not get.
    """

    version: str
    upgraded_from: str
    updated: list[ChangedObject]
    kept_local: list[EditedObject]
    created: list[ObjectRef]
    removed: list[ObjectRef]
    kept: list[KeptObject]
    warnings: list[str]


class UninstallInstallation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options for uninstalling. `force` also removes edited objects, but not objects that are running or in use."""

    dry_run: bool = False
    force: bool = False


class UninstallResult(msgspec.Struct, kw_only=True):
    """The objects that were removed or would be removed, and the objects that are kept, with the reasons."""

    removed: list[ObjectRef]
    kept: list[KeptObject]


class ExportMeta(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The description of the exported template."""

    slug: Slug
    name: Annotated[str, line(100)]
    version: Version = "1.0.0"
    category: Category = "general"
    description: Annotated[str, line(1000)] | UnsetType = UNSET
    readme: Annotated[str, Meta(max_length=65536)] = ""
    tags: Annotated[list[Annotated[str, line(64)]], Meta(max_length=20)] = []
    license: Annotated[str, line(100)] | UnsetType = UNSET
    author: Annotated[str, line(100)] | UnsetType = UNSET
    changes: Annotated[str, Meta(max_length=4000)] = ""


class ExportTemplate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The objects from which to create a template. At least one object is required."""

    meta: Annotated[ExportMeta, Meta(examples=[{"slug": "my-team", "name": "My team"}])]
    agent_ids: Ids = []
    workflow_ids: Ids = []
    trigger_ids: Ids = []
    knowledge_ids: Ids = []
