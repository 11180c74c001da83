"""The templates from all sources: this release, plugins, uploads and the remote index."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import peewee
from msgspec import UNSET

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import ContributionFailed, FieldError, NotFound
from corral.http.page import Page, paginate_names
from corral.plugin import Contributions
from corral.redact.redactor import Redactor
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.marketplace.api import Installer
from corral_plugins.marketplace.models import Installation, StoredTemplate
from corral_plugins.marketplace.service.install_risks import text_findings, tool_findings
from corral_plugins.marketplace.service.manifest_traversal import asks_for_reviews
from corral_plugins.marketplace.service.manifests import (
    Manifest,
    corral_release,
    read_manifest,
    release_fits,
    template_id,
    version_key,
)
from corral_plugins.marketplace.service.metrics import MarketplaceMetrics
from corral_plugins.marketplace.service.rendering import default_parameters
from corral_plugins.marketplace.shapes import (
    CategoryList,
    CategoryView,
    Finding,
    TemplateDetails,
    TemplatePermissions,
    TemplateProblem,
    TemplateQuery,
    TemplateResource,
    TemplateVersionsQuery,
    TemplateVersionView,
    TemplateView,
)
from corral_plugins.tools.api import Tools

log = logging.getLogger("corral.marketplace")
Json = dict[str, Any]
OWN = "marketplace"
KIND_PLUGINS = {
    "agent": "agents",
    "workflow": "workflows",
    "trigger": "triggers",
    "knowledge": "knowledge",
    "memory": "agent_memory",
    "notification_rule": "notifications",
    "collaboration": "collaboration",
}
"""Maps each kind of resource to the plugin that defines it."""
_COLUMNS = ("slug", "template_version", "source", "sha256", "created_at")


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """A version of a template.

    `findings` lists only the risks in the template's text. Risks from tools are added later, because they depend on the
    tools that exist at that time.
    """

    manifest: Manifest
    source: str
    published_at: str | None
    findings: tuple[Finding, ...]

    @property
    def slug(self) -> str:
        """The slug of the template."""
        return self.manifest.slug

    @property
    def id(self) -> str:
        """The id of the template."""
        return template_id(self.manifest.slug)


Templates = list[Template]


class ActiveParts(msgspec.Struct, frozen=True, kw_only=True):
    """The active installers, keyed by kind, and the names of the active plugins."""

    installers: Mapping[str, Installer]
    plugins: frozenset[str]

    def missing_plugins(self, data: Json) -> list[str]:
        """Return the plugins that a manifest requires but that are not active."""
        kinds = {resource["kind"] for resource in data["resources"]} - self.installers.keys()
        needed = {*data.get("requires", {}).get("plugins", ()), *used_plugins(data["resources"])}
        return sorted(needed - self.plugins | {KIND_PLUGINS.get(kind, kind) for kind in kinds})


def used_plugins(resources: Sequence[Json]) -> set[str]:
    """Return the plugins that the resources need, apart from the plugins that define the kinds of these resources."""
    return {"code_reviews"} if asks_for_reviews(resources) else set()


class TemplateCatalogue:
    """Finds templates. Each process reads and checks every manifest only once."""

    tools: Tools | None

    def __init__(
        self, work: Work, contributions: Contributions, redactor: Redactor, metrics: MarketplaceMetrics
    ) -> None:
        self._work, self._contributions, self._redactor, self._metrics = work, contributions, redactor, metrics
        self._contributed: dict[str, Templates] = {}
        self._sources: tuple[tuple[str, str], ...] | None = None
        self._stored: dict[tuple[str, str, str], Template] = {}
        self._loading = asyncio.Lock()

    # -- finding

    async def all(self) -> list[Template]:
        """Return all versions of all templates, sorted by slug and then from newest to oldest.

        Unreadable manifests are omitted.
        """
        contributed = await self.contributed()
        rows = await self._work(_stored_rows, read=True)
        known = [row for row in rows if row[0] not in contributed]
        await self._read_stored([row for row in known if tuple(row[:3]) not in self._stored or self._has_changed(row)])
        keys = [(row[0], row[1], row[2]) for row in known]  # a template that is deleted meanwhile is not in _stored
        stored = [self._stored[key] for key in keys if key in self._stored]
        found = [template for each in contributed.values() for template in each] + stored
        return sorted(found, key=lambda each: (each.slug, [-n for n in version_key(each.manifest.version)]))

    async def contributed(self) -> dict[str, Templates]:
        """Return the templates that plugins contribute, including those bundled with Corral, keyed by slug."""
        async with self._loading:
            sources = tuple((plugin, source.name) for plugin, source in self._template_sources())
            if sources != self._sources:
                self._contributed, self._sources = await asyncio.to_thread(self._read_sources), sources
        return self._contributed

    async def find(self, name: str, version: str | None = None) -> Template:
        """Return the template with this slug or id. `version` defaults to the latest version.

        Raise `NotFound` if the template or the version does not exist.
        """
        for template in await self.all():
            if name.lower() in (template.slug, template.id) and version in (None, template.manifest.version):
                return template
        raise NotFound("There is no template with this name or version.")

    # -- views

    async def list(self, query: TemplateQuery, *, by: Principal) -> Page[TemplateView]:
        """Return a page of the templates whose latest version matches every filter."""
        found = sorted(
            (each for each in latest(await self.all()) if _matches(each, query)),
            key=lambda each: (_title(each), each.slug),
        )
        parts = self.active_parts()

        def page() -> Page[TemplateView]:
            return paginate_names(
                found,
                query,
                by,
                scope="marketplace.templates",
                name=lambda each: f"{_title(each)}\n{each.slug}",
                make=lambda templates: [*self._views(templates, parts)],
            )

        return await self._work(page, read=True)

    async def get(self, name: str, version: str | None, *, by: Principal) -> TemplateDetails:
        """Return a template with its manifest."""
        template, parts = await self.find(name, version), self.active_parts()
        (view,) = await self._work(lambda: self._views([template], parts), read=True)
        return TemplateDetails(**msgspec.structs.asdict(view), manifest=template.manifest.data)

    async def versions(self, name: str, query: TemplateVersionsQuery, *, by: Principal) -> Page[TemplateVersionView]:
        """Return a page of the versions of a template, newest first.

        Raise `NotFound` if there is no template with this slug or id.
        """
        found = [each for each in await self.all() if name.lower() in (each.slug, each.id)]
        if not found:
            raise NotFound("There is no template with this name.")
        newest = {each.manifest.version: f"{index:06}" for index, each in enumerate(found)}

        def page() -> Page[TemplateVersionView]:
            return paginate_names(
                found,
                query,
                by,
                scope=f"marketplace.versions:{found[0].slug}",
                name=lambda each: newest[each.manifest.version],
                make=lambda templates: [_version_view(each) for each in templates],
            )

        return await self._work(page, read=True)

    async def categories(self) -> CategoryList:
        """Return all categories, with the number of templates in each."""
        counts = Counter(str(each.manifest.data.get("category", "")) for each in latest(await self.all()))
        return CategoryList(
            items=[CategoryView(category=name, templates=n) for name, n in sorted(counts.items()) if name]
        )

    # -- facts

    def active_parts(self) -> ActiveParts:
        """Return the installers and plugins that are currently active."""
        installers: dict[str, Installer] = {}
        for _, installer in self._contributions.for_hook("corral_template_installers"):
            installers.setdefault(installer.kind, installer)
        plugins = {
            plugin for hook in ("corral_services", "corral_routes") for plugin, _ in self._contributions.for_hook(hook)
        }
        return ActiveParts(installers=installers, plugins=frozenset(plugins))

    def to_template(
        self, manifest: Manifest, source: str, published_at: str | None, sha256: str | None = None
    ) -> Template:
        """Convert a manifest to a template. `sha256` is the hash that the source of the manifest published, if any.

        The conversion searches all strings for credentials, which takes a long time for a large manifest. Therefore,
        call this method in a thread.
        """
        if sha256 is not None and sha256 != manifest.sha256:
            detail = f"The source announces the hash {sha256}, but the content has the hash {manifest.sha256}."
            wrong = FieldError("/sha256", "marketplace.wrong_hash", detail)
            manifest = msgspec.structs.replace(manifest, faults=(*manifest.faults, wrong))
        findings = tuple(text_findings(manifest.data, self._redactor))
        return Template(manifest=manifest, source=source, published_at=published_at, findings=findings)

    def install_problems(self, template: Template, parts: ActiveParts) -> Sequence[TemplateProblem]:
        """Return the reasons why a template cannot currently be installed."""
        manifest = template.manifest
        found = [TemplateProblem(code=each.code, pointer=each.pointer, detail=each.detail) for each in manifest.faults]
        if found:
            return found
        found += [
            TemplateProblem(code=each.code, pointer=each.pointer, detail=each.detail)
            for each in template.findings
            if each.severity == "error"
        ]
        requirement = manifest.data.get("requires", {}).get("corral", ">=0")
        if not release_fits(requirement):
            detail = f"The template needs Corral {requirement}."
            found.append(TemplateProblem(code="marketplace.release", pointer="/requires/corral", detail=detail))
        found += [
            TemplateProblem(
                code="plugin_required", pointer="/requires/plugins", detail=f"The plugin {name} is not active."
            )
            for name in parts.missing_plugins(manifest.data)
        ]
        return found

    def findings(self, template: Template, parameters: Json | None = None) -> Sequence[Finding]:
        """Return the risks of installing a template with the given parameters, or with the default parameters.

        Runs in the caller's unit of work.
        """
        manifest = template.manifest
        if manifest.faults:
            return list(template.findings)
        risks = self.tools.risks() if self.tools is not None else {}
        given = default_parameters(manifest.data.get("parameters", {})) if parameters is None else parameters
        return [*template.findings, *tool_findings(manifest, given, risks)]

    # -- parts

    def _template_sources(self) -> Sequence[tuple[str, Any]]:
        return sorted(
            self._contributions.for_hook("corral_template_sources"), key=lambda each: (each[0] != OWN, each[0])
        )

    def _read_sources(self) -> dict[str, Templates]:
        corral_release()  # read outside of units of work
        found: dict[str, Templates] = {}
        for plugin, source in self._template_sources():
            label = "bundled" if plugin == OWN else f"plugin:{plugin}"
            try:
                read = [self.to_template(read_manifest(data), label, None) for data in source.manifests()]
            except ContributionFailed:
                continue
            for template in read:
                same = found.get(template.slug, [])
                if not _has_slug_and_version(template.manifest) or (same and same[0].source != label):
                    log.warning("template ignored", extra={"source": label, "slug": template.slug})
                else:
                    found.setdefault(template.slug, []).append(template)
        self._metrics.of_plugins = sum(same[0].source.startswith("plugin:") for same in found.values())
        return found

    def _has_changed(self, row: Sequence[str]) -> bool:
        known = self._stored[row[0], row[1], row[2]]
        return known.published_at != row[4] or known.manifest.sha256 != row[3]

    async def _read_stored(self, rows: Sequence[Sequence[str]]) -> None:
        if not rows:
            return
        slugs = sorted({row[0] for row in rows})
        texts = await self._work(lambda: _stored_texts(slugs), read=True)
        for slug, version, source, sha256, created_at in rows:
            text = texts.get((slug, version))
            if text is not None:
                read = functools.partial(self._read_template, text, source, created_at, sha256)
                self._stored[slug, version, source] = await asyncio.to_thread(read)

    def _read_template(self, text: str, source: str, created_at: str, sha256: str) -> Template:
        return self.to_template(read_manifest(text.encode()), source, created_at, sha256)

    def _views(self, templates: Sequence[Template], parts: ActiveParts) -> Sequence[TemplateView]:
        counts = _installation_counts([template.id for template in templates])
        return [self._view(template, parts, counts.get(template.id, 0)) for template in templates]

    def _view(self, template: Template, parts: ActiveParts, installations: int) -> TemplateView:
        data, problems = template.manifest.data, self.install_problems(template, parts)
        permissions = _mapping(data.get("permissions"))
        return TemplateView(
            id=template.id,
            slug=template.slug,
            name=str(data.get("name", template.slug)),
            version=template.manifest.version,
            category=str(data.get("category", "")),
            description=str(data.get("description", "")),
            readme=str(data.get("readme", "")),
            author=_mapping(data.get("author")) or None,
            license=data["license"] if isinstance(data.get("license"), str) else None,
            tags=_texts(data.get("tags")),
            requires=_mapping(data.get("requires")),
            parameters=_mapping(data.get("parameters")),
            secrets=[each for each in _list(data.get("secrets")) if isinstance(each, dict)],
            permissions=TemplatePermissions(
                **{name: _texts(permissions.get(name)) for name in ("tools", "secrets", "egress")}
            ),
            resources=[_resource_view(each) for each in _list(data.get("resources")) if isinstance(each, dict)],
            sha256=template.manifest.sha256,
            source=template.source,
            findings=[*self.findings(template)],
            installable=not problems,
            problems=[*problems],
            installations=installations,
        )


def latest(templates: Iterable[Template]) -> list[Template]:
    """Return the newest version of each template."""
    found: dict[str, Template] = {}
    for template in templates:
        found.setdefault(template.slug, template)
    return list(found.values())


def _stored_rows() -> list[tuple[Any, ...]]:
    columns = [getattr(StoredTemplate, name) for name in _COLUMNS]
    rows: Any = StoredTemplate.select(*columns).order_by(StoredTemplate.slug).tuples()
    return list(rows)


def _stored_texts(slugs: Sequence[str]) -> dict[tuple[str, str], str]:
    rows: Any = StoredTemplate.select(
        StoredTemplate.slug, StoredTemplate.template_version, StoredTemplate.manifest
    ).where(StoredTemplate.slug.in_(list(slugs)))
    return {(slug, version): text for slug, version, text in rows.tuples()}


def _installation_counts(template_ids: Sequence[str]) -> dict[str, int]:
    living = Installation.template_id.in_(list(template_ids)) & (Installation.status != "removed")
    rows: Any = Installation.select(Installation.template_id, peewee.fn.COUNT(Installation.id)).where(living)
    return {str(row[0]): int(row[1]) for row in rows.group_by(Installation.template_id).tuples()}


def _has_slug_and_version(manifest: Manifest) -> bool:
    """Return whether a manifest has a slug and a version. The rest of the manifest may contain errors."""
    return not json_schema_errors(
        {
            "type": "object",
            "required": ["slug", "version"],
            "properties": {
                "slug": {"type": "string", "pattern": "^[a-z][a-z0-9-]{1,62}[a-z0-9]$"},
                "version": {"type": "string", "pattern": "^[0-9]{1,6}\\.[0-9]{1,6}\\.[0-9]{1,6}$"},
            },
        },
        manifest.data,
    )


def _matches(template: Template, query: TemplateQuery) -> bool:
    data = template.manifest.data
    tags = _texts(data.get("tags"))
    if query.category is not UNSET and data.get("category") not in query.category:
        return False
    if query.source is not UNSET and template.source not in query.source:
        return False
    if query.tag is not UNSET and not set(tags) & set(query.tag):
        return False
    words = [template.slug, str(data.get("name")), str(data.get("description")), *tags]
    return query.search is UNSET or query.search.casefold() in "\n".join(words).casefold()


def _title(template: Template) -> str:
    return str(template.manifest.data.get("name", template.slug)).casefold()


def _version_view(template: Template) -> TemplateVersionView:
    return TemplateVersionView(
        version=template.manifest.version,
        sha256=template.manifest.sha256,
        published_at=template.published_at,
        changes=str(template.manifest.data.get("changes", "")),
    )


def _resource_view(resource: Json) -> TemplateResource:
    spec = _mapping(resource.get("spec"))
    title = spec.get("name", spec.get("title", resource.get("key", "")))
    return TemplateResource(kind=str(resource.get("kind", "")), key=str(resource.get("key", "")), title=str(title))


def _mapping(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    return [each for each in _list(value) if isinstance(each, str)]
