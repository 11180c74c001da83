"""Finds the risks of installing a template: credentials, manipulative phrases, dangerous tools and blocked URLs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from corral.egress.client import Egress
from corral.errors import Invalid
from corral.redact.redactor import Redactor
from corral_plugins.marketplace.service.manifest_traversal import texts
from corral_plugins.marketplace.service.manifests import Manifest
from corral_plugins.marketplace.service.rendering import with_parameters
from corral_plugins.marketplace.shapes import Finding
from corral_plugins.tools.api import includes_tools

Json = dict[str, Any]
MAX_CHECKED_URLS = 20
_INJECTIONS = (
    r"(ignore|disregard|forget) (all |any |the |your )*(previous|prior|above|earlier) (instructions|rules|prompts?)",
    r"(reveal|print|repeat|output) (your|the) (system prompt|hidden instructions)",
    r"you are now (in )?(developer|dan|jailbreak|god|unrestricted) ?(mode)?",
    r"do not (tell|inform|mention (this|it) to) (the )?(user|person|admin|human)",
    r"without (asking|telling|informing) (the )?(user|person|admin|human)",
)
_INJECTION = re.compile("|".join(f"(?:{each})" for each in _INJECTIONS), re.IGNORECASE)
_URL = re.compile(r"https?://[^\s\"'<>)\]]+", re.IGNORECASE)


def text_findings(data: Json, redactor: Redactor) -> Iterator[Finding]:
    """Yield findings about strings: credentials, and phrases that try to manipulate a model."""
    for place in texts(data):
        if place.pointer != "/sha256" and redactor.redact(place.value) != place.value:
            detail = "The text contains something that looks like a credential; use a secret instead."
            yield Finding(severity="error", code="marketplace.credential", pointer=place.pointer, detail=detail)
        if (match := _INJECTION.search(place.value)) is not None:
            detail = f"The text contains a phrase that tries to redirect a model: {match[0]!r}."
            yield Finding(severity="warning", code="marketplace.injection", pointer=place.pointer, detail=detail)


def tool_findings(manifest: Manifest, parameters: Mapping[str, Any], risks: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a finding for each dangerous tool that agents could use without a person's approval.

    `parameters` contains the template parameters, on which the tool policy may depend. A tool that does not exist
    counts as dangerous, because it may be added later.
    """
    for index, resource in enumerate(manifest.resources):
        policy = with_parameters(resource["spec"].get("tool_policy"), parameters)
        for name, rule in policy.items() if isinstance(policy, dict) else ():
            chosen = rule if isinstance(rule, str) else rule.get("policy") if isinstance(rule, dict) else None
            untrusted = isinstance(rule, dict) and rule.get("when_tainted") == "allow"
            if untrusted or (chosen == "allow" and _is_dangerous(name, risks)):
                what = "after it has read untrusted content " if untrusted else ""
                detail = f"The agent may use {name} {what}without asking a person."
                pointer = f"/resources/{index}/spec/tool_policy/{name.replace('/', '~1')}"
                yield Finding(severity="critical", code="marketplace.unasked_tool", pointer=pointer, detail=detail)


async def url_findings(manifest: Manifest, egress: Egress) -> list[Finding]:
    """Return a finding for each literal URL that the egress guard would refuse.

    Host names are resolved, but no connection is opened.
    """
    found: dict[str, Finding] = {}
    places = {
        match: place.pointer
        for resource in (manifest.resources,)
        for place in texts(resource, "/resources")
        for match in _URL.findall(place.value)
        if "{{" not in match
    }
    for url, pointer in list(places.items())[:MAX_CHECKED_URLS]:
        try:
            await egress.check_saved_url(url, pointer=pointer)
        except Invalid as refused:
            code = "marketplace.blocked_url"
            found[url] = Finding(severity="error", code=code, pointer=pointer, detail=f"{url}: {refused.detail}")
    return list(found.values())


def _is_dangerous(name: str, risks: Mapping[str, str]) -> bool:
    included = [risk for tool, risk in risks.items() if includes_tools([name], [tool])]
    return not included or "dangerous" in included
