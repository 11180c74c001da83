"""Routes for listing and managing providers, and for listing past calls."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.http.answers import Answer, IfMatch, Request
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.llm.service import calls
from corral_plugins.llm.service.provider_admin import ProviderAdmin, ProviderChecks
from corral_plugins.llm.service.provider_keys import ProviderKeys
from corral_plugins.llm.service.responses import adapt_for_openai_clients
from corral_plugins.llm.shapes import (
    CallDetail,
    LlmCallQuery,
    LlmCallView,
    NewProvider,
    ProviderItem,
    ProviderPatch,
    ProviderQuery,
    ProviderTest,
    ProviderView,
    TestProvider,
)

routes = Routes("/llm", tag="LLM", explain=adapt_for_openai_clients)

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
def list_providers(query: ProviderQuery, providers: ProviderAdmin, caller: Principal) -> Page[ProviderItem]:
    """List providers, sorted by name."""
    return providers.list_providers(query, caller)


@routes.post("/providers", needs=MANAGE, status=201, raises=("duplicate", *CHANGES))
async def create_provider(
    body: NewProvider,
    providers: ProviderAdmin,
    keys: ProviderKeys,
    checks: ProviderChecks,
    work: Work,
    caller: Principal,
    request: Request,
) -> Answer[ProviderView]:
    """Create a provider. Its models are fetched soon afterwards, unless the request lists them."""
    keys.validate_key(body)
    warnings = await checks.url_warnings(body.base_url)
    view = await work(lambda: providers.create(body, caller, warnings), entry=request.unit_context(caller))
    return Answer(body=view, headers={"Location": f"/api/v1/llm/providers/{view.name}"})


@routes.get("/providers/{name}", needs=MANAGE, live=True, raises=("not_found",))
def get_provider(name: str, providers: ProviderAdmin) -> ProviderView:
    """Return a provider with its configuration and state."""
    return providers.view(name)


@routes.put("/providers/{name}", needs=MANAGE, raises=("not_found", "reauth_required", "insufficient_scope", *CHANGES))
async def update_provider(
    name: str,
    body: ProviderPatch,
    match: IfMatch,
    providers: ProviderAdmin,
    keys: ProviderKeys,
    checks: ProviderChecks,
    work: Work,
    caller: Principal,
    request: Request,
) -> ProviderView:
    """Change a provider. Absent fields keep their values.

    Providers in `corral.toml` cannot be changed through the API. To change `base_url` without submitting the provider's
    key again, a person must re-authenticate, and a Corral API key needs the scope `secrets.reveal`.
    """
    keys.validate_key(body)
    warnings = await checks.url_warnings(body.base_url)
    return await work(lambda: providers.update(name, body, match, caller, warnings), entry=request.unit_context(caller))


@routes.delete(
    "/providers/{name}", needs=MANAGE, raises=("not_found", "in_use", "setting_locked", "precondition_failed")
)
def delete_provider(name: str, match: IfMatch, providers: ProviderAdmin) -> None:
    """Delete a provider that was created through the API. Fails if an agent uses the provider."""
    providers.delete(name, match)


@routes.post("/providers/{name}/test", needs=MANAGE, seconds=3660.0, abandoned=True, raises=("not_found",))
async def try_provider(
    name: str, body: TestProvider, providers: ProviderAdmin, checks: ProviderChecks, work: Work, caller: Principal
) -> ProviderTest:
    """Test a provider with one short call, which is charged like any other call."""
    provider = await work(lambda: providers.get(name), read=True)
    return await checks.test_provider(provider, body.model, caller)


@routes.post(
    "/providers/{name}/refresh",
    needs=MANAGE,
    seconds=120.0,
    abandoned=True,
    raises=("not_found", "invalid_state", "provider_error", "upstream_timeout", "circuit_open"),
)
async def refresh_provider(name: str, providers: ProviderAdmin, checks: ProviderChecks, work: Work) -> ProviderView:
    """Fetch the model list of a provider now."""
    await checks.refresh_models(await work(lambda: providers.get(name), read=True))
    return await work(lambda: providers.view(name), read=True)


@routes.get("/calls", needs=("llm.read", "llm.use"))
def list_calls(query: LlmCallQuery, caller: Principal) -> Page[LlmCallView]:
    """List model calls, newest first.

    Admins see all calls; other users see their own calls and the calls of all tasks.
    """
    return calls.list_calls(query, caller)


@routes.get("/calls/{id}", needs=("llm.read", "llm.use"), raises=("not_found",))
def get_call(id: str, caller: Principal) -> CallDetail:
    """Return a model call, with its request and response if they were stored (setting `llm.store_payloads`)."""
    return calls.get_call(id, caller)
