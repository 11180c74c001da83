"""Settings 5: every setting of the areas that exist, with its type, bounds and default.

Waiting for their areas: `admin` has none; `agent_memory.*`, `approvals.*`, `chat.*`, `circuit_breakers.*`,
`code_reviews.*`, `collaboration.*`, `console.*`, `dead_letter.*`, `exports.*`, `files.*`, `knowledge.*`,
`marketplace.*`, `messages.*`, `notifications.*`, `ssh.*`, `triggers.*`, `webhooks.*`, `workflows.*`; of budgets
`cost.default_attempt_usd`, `cost.unpriced` and `cost.update_prices`; of approvals `tools.approval_ttl_seconds`; of
webhooks `audit.checkpoint_webhook`.
"""

from __future__ import annotations

import json
from typing import Any

from corral.testing.kit import Kit

# name | type (? null is allowed) | bounds or choices | default
TABLE = """
general.site_name | string | 1-100 | "Corral"
general.timezone | string | | "UTC"
mail.host | string? | | null
mail.port | int | 1-65535 | 587
mail.username | string? | | null
mail.password | secret? | | null
mail.from | string? | | null
mail.security | enum | starttls,tls,none | "starttls"
http.cors_origins | list | | []
http.in_flight | int | 1-1000 | 60
http.access_log | enum | off,errors,all | "errors"
http.rate_per_minute | int | 10-100000 | 1200
http.machine_rate_per_minute | int | 100-1000000 | 12000
http.anonymous_rate_per_minute | int | 10-100000 | 120
events.retention_days | int | 1-365 | 30
events.max_rows | int | 10000-50000000 | 1000000
jobs.concurrency | int? | 1-256 | null
jobs.retention_days | int | 1-90 | 7
plugins.call_budget_seconds | int | 1-60 | 5
plugins.quarantine_errors | int | 1-100 | 5
plugins.quarantine_window_seconds | int | 10-3600 | 60
security.registration | enum | open,invite,closed | "invite"
security.default_role | enum | member,viewer | "member"
security.email_verification | bool | | false
security.require_mfa | bool | | false
security.require_mfa_roles | list | | ["admin", "member", "viewer", "auditor"]
security.access_ttl_seconds | int | 60-3600 | 900
security.refresh_idle_seconds | int | 3600-2592000 | 604800
security.refresh_absolute_seconds | int | 3600-7776000 | 2592000
security.refresh_grace_seconds | int | 0-60 | 10
security.lockout_threshold | int | 3-20 | 5
security.lockout_window_seconds | int | 60-86400 | 900
security.lockout_seconds | int | 60-3600 | 900
security.step_up_seconds | int | 60-900 | 300
security.max_sessions_per_user | int | 1-100 | 20
security.api_keys_enabled | bool | | true
security.api_key_default_days | int | 1-365 | 90
security.api_key_max_days | int | 1-365 | 365
security.api_keys_per_user | int | 1-100 | 25
password.min_length | int | 8-64 | 12
password.breached_check | bool | | true
password.context_words | list | | []
password.history | int | 0-24 | 0
password.max_age_days | int? | 1-3650 | null
password.require_upper | bool | | false
password.require_lower | bool | | false
password.require_digit | bool | | false
password.require_symbol | bool | | false
tasks.max_attempts | int | 1-100 | 3
tasks.backoff_initial_seconds | number | 0-3600 | 10
tasks.backoff_factor | number | 1-10 | 2
tasks.backoff_max_seconds | number | 1-86400 | 600
tasks.backoff_jitter | number | 0-1 | 0.1
tasks.lease_seconds | int | 10-3600 | 60
tasks.ack_seconds | int | 5-600 | 30
tasks.cancel_grace_seconds | int | 1-3600 | 60
tasks.timeout_seconds | int | 10-604800 | 3600
tasks.stall_seconds | int | 0-86400 | 900
tasks.loop_repeats | int | 2-50 | 6
tasks.crash_limit | int | 1-10 | 3
tasks.aging_seconds | int | 0-86400 | 600
tasks.fair_share | number | 0.1-1 | 1
tasks.max_open_per_user | int | 1-1000000 | 100000
tasks.retention_days | int? | 1-3650 | null
workers.heartbeat_seconds | int | 1-300 | 15
workers.offline_after_seconds | int | 3-3600 | 45
workers.auto_approve | bool | | false
workers.max_workers | int | 1-10000 | 1000
workers.accept_late_results | bool | | false
workers.prune_days | int? | 1-3650 | 30
agents.max_steps | int | 1-200 | 25
agents.max_agents | int | 1-10000 | 1000
agents.error_after_failures | int | 1-20 | 3
agents.pause_after_stalls | int | 0-20 | 3
agents.token_ttl_days | int | 1-365 | 90
llm.default_model | string? | | null
llm.default_fallback_models | list | 0-5 | []
llm.embedding_model | string? | | null
llm.default_max_tokens | int | 64-200000 | 4096
llm.total_timeout_seconds | int | 5-3600 | 600
llm.queue_timeout_seconds | int | 0-600 | 60
llm.store_payloads | enum | off,errors,all | "off"
llm.payload_days | int | 1-365 | 7
llm.allow_direct_use | bool | | true
cost.reported_prices | bool | | true
cost.event_retention_days | int? | 90-3650 | null
tools.max_calls | int | 1-10000 | 200
tools.timeout_seconds | int | 1-600 | 60
tools.taint_enabled | bool | | true
tools.call_retention_days | int | 1-3650 | 90
realtime.max_sockets_per_user | int | 1-100 | 10
realtime.queue_size | int | 100-10000 | 1000
realtime.replay_limit | int | 100-100000 | 10000
audit.retention_days | int? | 30- | null
audit.verbose | bool | | false
audit.record_ip | bool | | true
secrets.default_max_versions | int | 1-100 | 10
secrets.reminder_days | list | | [30, 7, 1]
secrets.deleted_retention_days | int | 1-365 | 30
"""


def told() -> dict[str, list[str]]:
    """The table by name."""
    rows = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines()]
    return {name: rest for name, *rest in rows}


async def declared(kit: Kit) -> dict[str, dict[str, Any]]:
    """What the installation says of itself, by name."""
    admin = await kit.as_user("admin")
    categories = (await admin.get("/settings/schema")).json()["categories"]
    return {f"{each['category']}.{each['key']}": each for category in categories for each in category["settings"]}


async def test_settings_5_every_setting_is_declared_as_it_is_told(kit: Kit) -> None:
    found = await declared(kit)
    for name, (kind, bounds, default) in told().items():
        each = found.get(name)
        assert each is not None, name
        assert (each["type"] + "?" * each["nullable"], each["default"]) == (kind, json.loads(default)), name
        if kind == "enum":
            assert each["enum"] == bounds.split(","), name
        elif bounds:
            least, _, most = bounds.partition("-")
            assert each.get("min", 0) == float(least), name
            assert most == "" or each["max"] == float(most), name
        assert each["title"], name
        assert "schema" in each, name


async def test_settings_5_no_setting_is_declared_that_nobody_told_of(kit: Kit) -> None:
    assert set(await declared(kit)) - set(told()) == set()


async def test_every_variable_that_pins_names_a_setting(kit: Kit) -> None:
    """Those of areas that do not exist yet are waiting."""
    found = await declared(kit)
    pins = {each["env"]: name for name, each in found.items() if each["env"]}
    assert pins == {
        "CORRAL_REGISTRATION": "security.registration",
        "CORRAL_ACCESS_TTL": "security.access_ttl_seconds",
        "CORRAL_REFRESH_TTL": "security.refresh_absolute_seconds",
        "CORRAL_REFRESH_GRACE": "security.refresh_grace_seconds",
        "CORRAL_LOCKOUT_THRESHOLD": "security.lockout_threshold",
        "CORRAL_LOCKOUT_WINDOW": "security.lockout_window_seconds",
        "CORRAL_LOCKOUT_SECONDS": "security.lockout_seconds",
        "CORRAL_TASK_LEASE_SECONDS": "tasks.lease_seconds",
        "CORRAL_TASK_MAX_ATTEMPTS": "tasks.max_attempts",
    }
