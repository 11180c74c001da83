"""Providers, for admins; everyone may see which there are. And the record of calls."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.egress.client import Egress
from corral.http.answers import Answer, IfMatch, Request
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.llm.provider_shapes import (
    NewProvider,
    ProviderItem,
    ProviderPatch,
    ProviderQuery,
    ProviderTest,
    ProviderView,
    TestProvider,
)
from corral_plugins.llm.service import calls
from corral_plugins.llm.service.directory import Directory
from corral_plugins.llm.service.failures import openai_error
from corral_plugins.llm.service.keys import ProviderKeys
from corral_plugins.llm.service.upkeep import Upkeep, judged, refresh_soon
from corral_plugins.llm.shapes import CallDetail, CallQuery, CallView

routes = Routes("/llm", tag="LLM", explain=lambda problem: {"error": openai_error(problem)})

MANAGE = "llm.manage"
CHANGES = (
    "setting_locked",
    "url_blocked",
    "precondition_failed",
    "overloaded",
    "plugin_disabled",
    "masked_value_submitted",
    "unknown_reference",
    "vault_sealed",
)


@routes.get("/providers", needs=("llm.read", "llm.use"))
def list_providers(query: ProviderQuery, providers: Directory, caller: Principal) -> Page[ProviderItem]:
    """List the providers, by name."""
    return providers.page(query, caller)


@routes.post("/providers", needs=MANAGE, status=201, raises=("duplicate", *CHANGES))
async def create_provider(
    body: NewProvider,
    providers: Directory,
    keys: ProviderKeys,
    egress: Egress,
    work: Work,
    caller: Principal,
    request: Request,
) -> Answer[ProviderView]:
    """Make a provider. Its models are read in a moment, unless they are given."""
    keys.check(body)
    warnings = await judged(egress, body.base_url)

    def unit() -> ProviderView:
        told = providers.create(body, caller)
        refresh_soon(body.name)
        return providers.view(body.name, warnings + told)

    made = await work(unit, entry=request.entry(caller))
    return Answer(body=made, headers={"Location": f"/api/v1/llm/providers/{made.name}"})


@routes.get("/providers/{name}", needs=MANAGE, live=True, raises=("not_found",))
def get_provider(name: str, providers: Directory) -> ProviderView:
    """Read a provider."""
    return providers.view(name)


@routes.put("/providers/{name}", needs=MANAGE, raises=("not_found", "reauth_required", "insufficient_scope", *CHANGES))
async def update_provider(
    name: str,
    body: ProviderPatch,
    match: IfMatch,
    providers: Directory,
    keys: ProviderKeys,
    egress: Egress,
    work: Work,
    caller: Principal,
    request: Request,
) -> ProviderView:
    """Change a provider; what is absent stays. Providers of `corral.toml` are changed there.

    Another `base_url` while the stored key stays needs a step-up, of an API key the scope `secrets.reveal`.
    """
    keys.check(body)
    warnings = await judged(egress, body.base_url)

    def unit() -> ProviderView:
        told = providers.update(name, body, match, caller)
        refresh_soon(name)
        return providers.view(name, warnings + told)

    return await work(unit, entry=request.entry(caller))


@routes.delete(
    "/providers/{name}", needs=MANAGE, raises=("not_found", "in_use", "setting_locked", "precondition_failed")
)
def delete_provider(name: str, match: IfMatch, providers: Directory) -> None:
    """Delete a provider that was made here and that no agent names."""
    providers.delete(name, match)


@routes.post("/providers/{name}/test", needs=MANAGE, seconds=3660.0, abandoned=True, raises=("not_found",))
async def try_provider(
    name: str, body: TestProvider, providers: Directory, upkeep: Upkeep, work: Work, caller: Principal
) -> ProviderTest:
    """Try a provider with one short call, which costs what it costs."""
    provider = await work(lambda: providers.get(name), read=True)
    return await upkeep.test(provider, body.model, caller)


@routes.post(
    "/providers/{name}/refresh",
    needs=MANAGE,
    seconds=120.0,
    abandoned=True,
    raises=("not_found", "invalid_state", "provider_error", "upstream_timeout"),
)
async def refresh_provider(name: str, providers: Directory, upkeep: Upkeep, work: Work) -> ProviderView:
    """Ask a provider which models it has."""
    await upkeep.refresh(await work(lambda: providers.get(name), read=True))
    return await work(lambda: providers.view(name), read=True)


@routes.get("/calls", needs=("llm.read", "llm.use"))
def list_calls(query: CallQuery, caller: Principal) -> Page[CallView]:
    """List calls, newest first: one's own and those of tasks; admins see all."""
    return calls.page(query, caller)


@routes.get("/calls/{id}", needs=("llm.read", "llm.use"), raises=("not_found",))
def get_call(id: str, caller: Principal) -> CallDetail:
    """Read a call, with what was asked and answered if `llm.store_payloads` had it kept."""
    return calls.get(id, caller)
