"""The routes for the kill switch."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.http.routes import Routes
from corral_plugins.admin.api import KillSwitchView
from corral_plugins.admin.service.kill_switch import KillSwitchChange, KillSwitchService

routes = Routes("/admin/kill-switch", tag="Admin", no_store=True)


@routes.get("/", needs="admin.read")
def get_kill_switch(switch: KillSwitchService) -> KillSwitchView:
    """Get the state of the kill switch."""
    return switch.state()


@routes.post("/", needs="admin.kill_switch")
def change_kill_switch(body: KillSwitchChange, caller: Principal, switch: KillSwitchService) -> KillSwitchView:
    """Stop all agent activity immediately, or resume it."""
    return switch.change(body, by=caller)
