"""Prepares the resources of a template outside units of work: fills in the parameters and checks the specs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.egress.client import Egress
from corral.errors import Conflict, FieldError, Forbidden, Invalid
from corral.ids import new_id
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.marketplace.api import Installer
from corral_plugins.marketplace.service.catalogue import ActiveParts, Template, TemplateCatalogue
from corral_plugins.marketplace.service.install_risks import url_findings
from corral_plugins.marketplace.service.manifest_traversal import uses_of
from corral_plugins.marketplace.service.manifests import Manifest, permission_faults
from corral_plugins.marketplace.service.rendering import (
    complete_parameters,
    with_ids,
    with_parameters,
    with_secrets,
)
from corral_plugins.marketplace.shapes import Finding, TemplateProblem

Json = dict[str, Any]


class PreparedResource(msgspec.Struct, frozen=True, kw_only=True):
    """A resource with its parameters filled in. `spec` contains references instead of ids."""

    position: int
    kind: str
    key: str
    spec: Json

    @property
    def title(self) -> str:
        """The name that the template gives to the object."""
        return str(self.spec.get("name", self.spec.get("title", self.key)))


class PreparedTemplate(msgspec.Struct, frozen=True, kw_only=True):
    """A template that can be installed, with its resources in the order of creation."""

    template: Template
    parameters: Json
    secrets_map: Mapping[str, str]
    resources: tuple[PreparedResource, ...]
    installers: Mapping[str, Installer]

    @property
    def manifest(self) -> Manifest:
        """The manifest of the template."""
        return self.template.manifest


CHECKED_SOURCES = ("bundled", "uploaded")  # their URLs were checked before they were stored


async def require_installable(
    catalogue: TemplateCatalogue, template: Template, parts: ActiveParts, egress: Egress, *, dry_run: bool = False
) -> None:
    """Raise `Conflict` (`plugin_required`) or `Invalid` unless the template can be installed.

    With `dry_run`, missing plugins are not an error, because the plan lists them.
    """
    problems = catalogue.install_problems(template, parts)
    others: list[TemplateProblem | Finding] = [each for each in problems if each.code != "plugin_required"]
    if not others and template.source not in CHECKED_SOURCES:
        others += await url_findings(template.manifest, egress)
    if others:
        raise Invalid(
            f"The template {template.slug} cannot be installed: {others[0].detail}",
            errors=[FieldError(each.pointer, each.code, each.detail) for each in others],
        )
    if problems and not dry_run:
        names = parts.missing_plugins(template.manifest.data)
        detail = f"The template {template.slug} needs plugins that are not active: {', '.join(names)}."
        raise Conflict(detail, code="plugin_required", references=names)


async def prepare(
    template: Template, parts: ActiveParts, given: Json, secrets_map: Mapping[str, str], prefix: str
) -> PreparedTemplate:
    """Fill in the parameters of the template's resources, and return the prepared template.

    Raise `Invalid` if the parameters or the specs are not valid. Resources of a kind for which no active plugin has an
    installer are omitted.
    """
    manifest = template.manifest
    parameters = complete_parameters(manifest.data.get("parameters", {"type": "object"}), given)
    filled = [{**each, "spec": with_parameters(each["spec"], parameters)} for each in manifest.resources]
    if faults := list(permission_faults(manifest.data, uses_of(filled))):  # parameters may name further tools and hosts
        raise Invalid(faults[0].detail, errors=faults)
    resources = []
    for position in manifest.order:
        spec = with_secrets(filled[position]["spec"], secrets_map)
        if isinstance(spec.get("name"), str):
            spec["name"] = f"{prefix}{spec['name']}"
        kind, key = filled[position]["kind"], filled[position]["key"]
        resources.append(PreparedResource(position=position, kind=kind, key=key, spec=spec))
    known = tuple(each for each in resources if each.kind in parts.installers)
    await asyncio.to_thread(check_specs, known, parts.installers, [each.key for each in resources])
    return PreparedTemplate(
        template=template,
        parameters=parameters,
        secrets_map=secrets_map,
        resources=known,
        installers=parts.installers,
    )


def check_specs(
    resources: Iterable[PreparedResource], installers: Mapping[str, Installer], keys: Iterable[str]
) -> None:
    """Check the specs of all resources. Raise `Invalid` with all errors found.

    For this check, references are replaced by ids of objects that do not exist.
    """
    ids = {key: new_id() for key in keys}
    faults: list[FieldError] = []
    for resource in resources:
        installer, spec = installers[resource.kind], with_ids(resource.spec, ids)
        prefix = f"/resources/{resource.position}/spec"
        found = json_schema_errors(installer.schema, spec, pointer_prefix=prefix)
        if not found:
            try:
                installer.check_spec(spec)
            except Invalid as invalid:
                found = faults_below(invalid, prefix)
        faults += found
    if faults:
        count = "an invalid value" if len(faults) == 1 else f"{len(faults)} invalid values"
        raise Invalid(f"The template contains {count}. The first problem: {faults[0].detail}", errors=faults)


def faults_below(invalid: Invalid, prefix: str) -> list[FieldError]:
    """Return the errors in a spec, with pointers that are relative to the whole manifest."""
    if not invalid.errors:
        return [FieldError(prefix, "not_allowed", invalid.detail)]
    return [msgspec.structs.replace(each, pointer=f"{prefix}{each.pointer}") for each in invalid.errors]


def require_permissions(
    resources: Iterable[PreparedResource], installers: Mapping[str, Installer], by: Principal
) -> None:
    """Raise `Forbidden` unless the caller may create objects of every kind that occurs in the resources."""
    for needed in sorted({installers[each.kind].write for each in resources}):
        if not by.may(needed):
            raise Forbidden(f"Installing this template needs the permission {needed}.")


def refuse_critical(findings: Iterable[Finding], by: Principal) -> None:
    """Raise `Forbidden` if the template has critical findings and the caller is not an admin."""
    critical = [each for each in findings if each.severity == "critical"]
    if critical and not by.may("marketplace.manage"):
        raise Forbidden(
            f"Only an admin may install this template: {critical[0].detail}",
            errors=[FieldError(each.pointer, each.code, each.detail) for each in critical],
        )
