"""Every variable that operators are told of is known, has its place in the configuration, and is shown with its source.

What each of them changes is tested where it belongs.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from corral.cli.data_folder import ensure_data_dir
from corral.cli.masked_config import masked_rows
from corral.cli.unknown_settings import unknown_setting_warnings
from corral.config.model import TABLE
from corral.config.reader import load
from corral.errors import StartupError
from corral.kernel import boot
from corral.plugin import Setting
from corral.settings.registry import SettingsRegistry

KEY = "v1:" + "A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8S9t0U1w="
SECRET = "Zk3vQ9sXw2Lr7TnB5pYc8HdJ4mFg6aKe"
# variable | a value | where it is shown
VARIABLES = f"""
CORRAL_DATA_DIR | /srv/corral | data_dir
CORRAL_DATABASE_URL | postgresql://db/corral | database.url
CORRAL_REDIS_URL | redis://cache:6379/0 | redis.url
CORRAL_STORAGE_URL | file:///srv/files | storage.url
CORRAL_BIND | 127.0.0.1:9000 | server.bind
CORRAL_PUBLIC_URL | https://corral.example.org | server.public_url
CORRAL_ALLOWED_HOSTS | a.example,b.example | server.allowed_hosts
CORRAL_TRUSTED_PROXIES | 10.0.0.0/8 | server.trusted_proxies
CORRAL_MASTER_KEY | {KEY} | keys.master_key
CORRAL_JWT_SECRET | {SECRET} | keys.jwt_secret
CORRAL_BOOTSTRAP_ADMIN_EMAIL | me@example.org | bootstrap_admin_email
CORRAL_BOOTSTRAP_ADMIN_PASSWORD | {SECRET} | bootstrap_admin_password
CORRAL_EGRESS_ALLOW | 10.1.2.3/32 | egress.allow
CORRAL_EGRESS_PROXY | http://proxy.example:3128 | egress.proxy
CORRAL_BODY_TIMEOUT | 10 | server.body_timeout_seconds
CORRAL_PLUGIN_DIR | /srv/plugins | plugins.dir
CORRAL_SAFE_MODE | 1 | safe_mode
CORRAL_METRICS_TOKEN | {SECRET} | metrics_token
CORRAL_LOG_LEVEL | debug | log_level
CORRAL_LOG_FORMAT | console | log_format
CORRAL_LOCAL_MODEL | /srv/model.gguf | local_model
CORRAL_IP_RULES_DISABLED | 1 | ip_rules_disabled
CORRAL_RATE_LIMITS | off | rate_limits
CORRAL_SQLITE_SYNCHRONOUS | normal | database.synchronous
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in VARIABLES.strip().splitlines()]


@pytest.mark.parametrize(("variable", "value", "key"), ROWS)
def test_a_variable_has_its_place_and_is_shown_with_its_source(variable: str, value: str, key: str) -> None:
    config = load({variable: value}, path=Path(os.devnull))
    assert not [warning for warning in config.warnings if warning.startswith(f"{variable}: unknown")]
    shown = {row.key: row for row in masked_rows(config)}
    assert shown[key].source == variable
    default = {row.key: row for row in masked_rows(load({}, path=Path(os.devnull)))}
    assert default[key].source != variable
    assert shown[key].value != default[key].value


# variable | a value | the setting that it pins
PINNING = """
CORRAL_REGISTRATION | closed | security.registration
CORRAL_ACCESS_TTL | 600 | security.access_ttl_seconds
CORRAL_REFRESH_TTL | 86400 | security.refresh_absolute_seconds
CORRAL_REFRESH_GRACE | 5 | security.refresh_grace_seconds
CORRAL_LOCKOUT_THRESHOLD | 4 | security.lockout_threshold
CORRAL_LOCKOUT_WINDOW | 600 | security.lockout_window_seconds
CORRAL_LOCKOUT_SECONDS | 600 | security.lockout_seconds
CORRAL_MAX_UPLOAD_BYTES | 1048576 | files.max_upload_bytes
CORRAL_TASK_LEASE_SECONDS | 30 | tasks.lease_seconds
CORRAL_TASK_MAX_ATTEMPTS | 5 | tasks.max_attempts
CORRAL_WEBHOOK_TIMEOUT | 20 | webhooks.timeout_seconds
CORRAL_WEBHOOK_DISABLE_AFTER | 3600 | webhooks.disable_after_seconds
"""
PINNING_ROWS = [[cell.strip() for cell in line.split("|")] for line in PINNING.strip().splitlines()]


def _declared() -> list[Setting[Any]]:
    kinds = [
        point.load() for point in entry_points(group="corral.plugins") if point.dist and point.dist.name == "corral"
    ]
    return [setting for kind in kinds if hasattr(kind, "corral_settings") for setting in kind().corral_settings()]


def test_a_variable_pins_the_setting_that_declares_it() -> None:
    environ = {variable: value for variable, value, _ in PINNING_ROWS}
    environ["CORRAL_WEBHOOK_RETRY_SCHEDULE"] = "0,5,60"
    config = load(environ | {"CORRAL_TASK_MAX_ATTEMPT": "5"}, path=Path(os.devnull))
    registry = SettingsRegistry(config.pinned, variables=config.variables)
    registry.declare(_declared())
    shown = {item.setting.name: item for item in registry.all()}
    for variable, value, name in PINNING_ROWS:
        assert (str(registry.get(shown[name].setting)), shown[name].pinned_by) == (value, variable)
    assert registry.get(shown["webhooks.retry_schedule"].setting) == [0, 5, 60]
    assert {setting.env for setting in _declared() if setting.env} == set(environ)
    assert unknown_setting_warnings(config, registry) == [
        "CORRAL_TASK_MAX_ATTEMPT: unknown variable; did you mean CORRAL_TASK_MAX_ATTEMPTS?"
    ]


def test_bad_variables_of_settings_stop_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environ = {"CORRAL_TASK_LEASE_SECONDS": "abc", "CORRAL_ACCESS_TTL": "abc", "CORRAL_DATA_DIR": str(tmp_path)}
    config = load(environ, path=Path(os.devnull))
    ensure_data_dir(config)
    with pytest.raises(StartupError) as refused:
        boot(config)
    access, lease = sorted(refused.value.faults)
    assert access.startswith("CORRAL_ACCESS_TTL: security.access_ttl_seconds")
    assert lease.startswith("CORRAL_TASK_LEASE_SECONDS: tasks.lease_seconds")
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_variable_of_a_setting_may_be_a_list_and_gives_way_to_the_command_line() -> None:
    delays = Setting[list[int]](name="shelf.delays", kind=list[int], default=[], title="Delays", env="CORRAL_DELAYS")
    for overrides, expected in (({}, [0, 5, 300]), ({"settings.shelf.delays": [1]}, [1])):
        config = load({"CORRAL_DELAYS": "0, 5,300"}, path=Path(os.devnull), overrides=overrides)
        registry = SettingsRegistry(config.pinned, variables=config.variables)
        registry.declare([delays])
        assert registry.get(delays) == expected


def test_no_variable_is_left_out() -> None:
    told = {variable for variable, _, _ in ROWS}
    assert {entry.key.variable for entry in TABLE.values() if entry.key.variable} - told == set()


def test_a_vault_secret_by_variable_is_known_and_not_shown() -> None:
    config = load({"CORRAL_SECRET_API_KEY": SECRET}, path=Path(os.devnull))
    assert config.warnings == ()
    assert SECRET not in repr(masked_rows(config))


@pytest.mark.parametrize(
    "name", ["MASTER_KEY", "JWT_SECRET", "DATABASE_URL", "BOOTSTRAP_ADMIN_PASSWORD", "METRICS_TOKEN"]
)
def test_some_may_be_read_from_a_file(tmp_path: Path, name: str) -> None:
    rows = {variable: (value, key) for variable, value, key in ROWS}
    value, key = rows[f"CORRAL_{name}"]
    file = tmp_path / "value"
    file.write_text(f"{value}\n")
    file.chmod(0o600)
    direct = {row.key: row.value for row in masked_rows(load({f"CORRAL_{name}": value}, path=Path(os.devnull)))}
    by_file = {
        row.key: row.value for row in masked_rows(load({f"CORRAL_{name}_FILE": str(file)}, path=Path(os.devnull)))
    }
    assert by_file[key] == direct[key]
