"""corral.toml and CORRAL_*: precedence, faults, warnings, masks."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from corral.cli.config import sample
from corral.cli.data_folder import ensure_data_dir
from corral.cli.masked_config import masked_rows
from corral.config.model import MASK, SECTIONS, TABLE, Config, PinnedSetting
from corral.config.reader import load
from corral.errors import StartupError

NO_FILE = Path(os.devnull)
STRONG = "kV9#qX2$wL7!zR4%tN6^bM1&yH8*dF3("


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def from_file(text: str, environ: dict[str, str] | None = None, **overrides: Any) -> Config:
    path = Path("corral.toml")
    path.write_text(text, "utf-8")
    return load(environ or {}, overrides=overrides)


def faults(text: str = "", environ: dict[str, str] | None = None, **overrides: Any) -> list[str]:
    with pytest.raises(StartupError) as caught:
        from_file(text, environ, **overrides)
    return list(caught.value.faults)


def test_without_anything_the_defaults_hold(tmp_path: Path) -> None:
    config = load({})
    assert config.server.bind == "127.0.0.1:8000"
    assert config.data_dir == tmp_path / "corral-data"
    assert config.database.url == f"sqlite:///{tmp_path}/corral-data/corral.db"
    assert config.files_dir == tmp_path / "corral-data" / "files"
    assert (config.database.migrate_on_start, config.database.pool_size, config.database.synchronous) == (
        None,
        16,
        "full",
    )
    assert (config.server.fast_dispatch, config.server.body_timeout_seconds) == (True, 30)
    assert (config.path, config.warnings, config.pinned) == (None, (), {})
    assert config.sources == {}


def test_command_line_over_environment_over_file_over_default() -> None:
    text = '[server]\nbind = "0.0.0.0:1"\nprocesses = 2\npublic_url = "https://a.example/"\n'
    config = load_with(
        text, {"CORRAL_BIND": "0.0.0.0:2", "CORRAL_PUBLIC_URL": "https://b.example"}, {"server.bind": "h:3"}
    )
    assert (config.server.bind, config.sources["server.bind"]) == ("h:3", "command line")
    assert (config.server.public_url, config.sources["server.public_url"]) == ("https://b.example", "CORRAL_PUBLIC_URL")
    assert (config.server.processes, config.sources["server.processes"]) == (2, str(config.path))
    assert config.database.pool_size == 16


def load_with(text: str, environ: dict[str, str], overrides: dict[str, Any]) -> Config:
    Path("corral.toml").write_text(text, "utf-8")
    return load(environ, overrides=overrides)


def test_an_override_of_none_and_an_empty_variable_are_not_given() -> None:
    config = load_with("", {"CORRAL_REDIS_URL": "", "CORRAL_CONFIG": ""}, {"server.bind": None})
    assert config.redis.url is None
    assert config.sources.get("server.bind", "default") == "default"


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("CORRAL_BIND", "[::1]:8000", "server.bind", "[::1]:8000"),
        ("CORRAL_ALLOWED_HOSTS", "a.example, b.example,", "server.allowed_hosts", ("a.example", "b.example")),
        ("CORRAL_TRUSTED_PROXIES", "10.1.2.3,fd00::1/8", "server.trusted_proxies", ("10.1.2.3/32", "fd00::/8")),
        ("CORRAL_BODY_TIMEOUT", "5", "server.body_timeout_seconds", 5),
        ("CORRAL_DATABASE_URL", "postgresql://u:p@h/d", "database.url", "postgresql://u:p@h/d"),
        ("CORRAL_SQLITE_SYNCHRONOUS", "NORMAL", "database.synchronous", "normal"),
        ("CORRAL_REDIS_URL", "unix:///run/valkey.sock", "redis.url", "unix:///run/valkey.sock"),
        (
            "CORRAL_STORAGE_URL",
            "s3://bucket?endpoint=http://m:9000",
            "storage.url",
            "s3://bucket?endpoint=http://m:9000",
        ),
        (
            "CORRAL_EGRESS_ALLOW",
            "127.0.0.1:11434,10.0.0.0/8,10.0.0.0/8:443,[::1]:80,h.example",
            "egress.allow",
            ("127.0.0.1:11434", "10.0.0.0/8", "10.0.0.0/8:443", "[::1]:80", "h.example"),
        ),
        ("CORRAL_EGRESS_PROXY", "http://u:p@proxy:3128", "egress.proxy", "http://u:p@proxy:3128"),
        ("CORRAL_PLUGIN_DIR", "/srv/p", "plugins.dir", Path("/srv/p")),
        ("CORRAL_SAFE_MODE", "1", "safe_mode", True),
        ("CORRAL_RATE_LIMITS", "off", "rate_limits", False),
        ("CORRAL_IP_RULES_DISABLED", "yes", "ip_rules_disabled", True),
        ("CORRAL_LOG_LEVEL", "INFO", "log_level", "info"),
        ("CORRAL_LOG_FORMAT", "console", "log_format", "console"),
        ("CORRAL_LOCAL_MODEL", "m.gguf", "local_model", Path("m.gguf")),
        ("CORRAL_METRICS_TOKEN", STRONG, "metrics_token", STRONG),
        ("CORRAL_JWT_SECRET", STRONG, "keys.jwt_secret", STRONG),
    ],
)
def test_each_variable_sets_its_field(variable: str, text: str, field: str, value: Any) -> None:
    config: Any = load({variable: text})
    for name in field.split("."):
        config = getattr(config, name)
    assert config == (value.absolute() if isinstance(value, Path) else value)


@pytest.mark.parametrize(
    ("variable", "text", "hint"),
    [
        ("CORRAL_BIND", "8000", "host:port"),
        ("CORRAL_BIND", "h:70000", "host:port"),
        ("CORRAL_BIND", ":80", "host:port"),
        ("CORRAL_DATABASE_URL", "mysql://u:hunter2@h/d", "sqlite:///"),
        ("CORRAL_DATABASE_URL", "sqlite:///", "sqlite:///"),
        ("CORRAL_REDIS_URL", "http://h", "rediss://"),
        ("CORRAL_STORAGE_URL", "/srv/files", "s3://"),
        ("CORRAL_PUBLIC_URL", "https://u:hunter2@h", "http(s)://"),
        ("CORRAL_TRUSTED_PROXIES", "10.0.0.0/33", "addresses and networks"),
        ("CORRAL_EGRESS_ALLOW", "http://127.0.0.1:80", "host[:port]"),
        ("CORRAL_LOG_LEVEL", "loud", "debug or info or warning or error"),
        ("CORRAL_SAFE_MODE", "maybe", "bool"),
        ("CORRAL_BODY_TIMEOUT", "0", ">= 1"),
        ("CORRAL_BODY_TIMEOUT", "1.5", "int"),
    ],
)
def test_a_bad_variable_is_one_line_without_the_value(variable: str, text: str, hint: str) -> None:
    (fault,) = faults(environ={variable: text})
    assert fault.startswith(f"{variable}: ")
    assert "must be" in fault
    assert hint in fault
    assert "hunter2" not in fault
    assert "\n" not in fault


def test_all_faults_come_together_with_file_and_line() -> None:
    text = '[server]\nbnd = "x:1"\n\n[database]\n# comment\npool_size = 0\n[databse]\nurl = 1\n'
    found = faults(text, {"CORRAL_LOG_LEVEL": "loud"})
    assert len(found) == 4
    assert any("corral.toml:2: unknown key server.bnd; did you mean server.bind" in fault for fault in found)
    assert any("corral.toml:6: database.pool_size must be" in fault for fault in found)
    assert any("corral.toml:7: unknown key databse; did you mean database?" in fault for fault in found)
    assert any(fault.startswith("CORRAL_LOG_LEVEL: ") for fault in found)


@pytest.mark.parametrize(
    ("text", "line", "name"),
    [
        ("\nlog_lvl = 1", 2, "log_lvl"),
        ("\n\nserver.bnd = 1", 3, "server.bnd"),
        ('\nserver = { bnd = "x" }', 2, "server.bnd"),
        ("[plugins]\nenabld = []", 2, "plugins.enabld"),
        ('[settings]\n"nodot" = 1', 2, "settings.nodot"),
    ],
)
def test_unknown_keys_are_found_on_their_line(text: str, line: int, name: str) -> None:
    (fault,) = faults(text)
    assert f"corral.toml:{line}: unknown key {name}" in fault


def test_only_a_similar_key_is_suggested() -> None:
    assert faults("[zzz]\na = 1")[0].endswith("corral.toml:1: unknown key zzz")
    assert faults("log_lvl = 1")[0].endswith("unknown key log_lvl; did you mean log_level?")


def test_a_section_that_is_no_table_and_broken_toml() -> None:
    assert "server must be a table" in faults("server = 3")[0]
    assert "line 2" in faults("[server]\nbind = \n")[0]
    Path("corral.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match=r"corral\.toml"):
        load({})


@pytest.mark.parametrize(
    ("url", "valid"),
    [
        ("postgresql://corral:p%40ss%2Fw@[::1]:5432,two/corral?sslmode=verify-full&target_session_attrs=any", True),
        ("postgresql://corral:p#s?s:w@db/corral", True),
        ("postgresql:///corral?host=/var/run/postgresql&password=p@ss/word", True),
        ("sqlite:////srv/a folder/corral@home.db", True),
        ("postgresql://corral:p@ss/w@db/corral", False),  # libpq would look for a host named ss, and say so
        ("postgresql://corral:p@ss@db/corral", False),
        ("postgresql://", False),
    ],
)
def test_urls_of_databases(url: str, valid: bool) -> None:
    if valid:
        assert load({"CORRAL_DATABASE_URL": url}).database.url == url
        return
    with pytest.raises(StartupError, match="@ is written %40") as refused:
        load({"CORRAL_DATABASE_URL": url})
    assert "ss" not in str(refused.value).replace("password", "")


def test_types_in_the_file_are_strict() -> None:
    assert "must be int" in faults("[server]\nprocesses = true")[0].replace("`", "")
    assert "must be" in faults("[server]\nprocesses = 1.5")[0]
    assert "must be" in faults("[plugins]\nstrict = 1")[0]
    for wrong in ("1", '"*"', '"*.example.org"', '"https://example.org"'):  # of which none would let anybody in
        assert "must be a list of host names" in faults(f"[server]\nallowed_hosts = [{wrong}]")[0]
    assert "must be" in faults("[server]\ncertfile = 3")[0]
    assert from_file('[server]\nprocesses = "3"').server.processes == 3
    assert from_file('[server]\nallowed_hosts = ["a", "b"]').server.allowed_hosts == ("a", "b")


def test_which_file_is_read(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("safe_mode = true")
    Path("corral.toml").write_text('log_format = "console"')
    assert load({}).log_format == "console"
    config = load({"CORRAL_CONFIG": str(other)})
    assert (config.safe_mode, config.log_format, config.path) == (True, "auto", other)
    assert load({"CORRAL_CONFIG": str(other)}, path=Path("corral.toml")).log_format == "console"
    assert load({}, path=NO_FILE).log_format == "auto"
    assert "does not exist" in load({"CORRAL_CONFIG": "absent.toml"}).warnings[0]
    with pytest.raises(StartupError, match="does not exist"):
        load({}, path=Path("absent.toml"))


def test_references_in_values(tmp_path: Path) -> None:
    secret = tmp_path / "pw"
    secret.write_text("s3cr${X}t\n")
    text = f"""
    metrics_token = "file:{secret}"
    [database]
    url = "postgresql://u:${{PW}}@h/d"
    [storage]
    url = "file:///srv/files"
    [plugins.mail]
    deep = [{{ password = "${{PW}}", literal = "$${{PW}}" }}]
    [settings]
    "mail.password" = "${{PW}}"
    """
    config = from_file(text, {"PW": "hunter2"})
    assert config.metrics_token == "s3cr${X}t"
    assert config.database.url == "postgresql://u:hunter2@h/d"
    assert config.files_dir == Path("/srv/files")
    assert config.plugins.tables == {"mail": {"deep": [{"password": "hunter2", "literal": "${PW}"}]}}
    assert config.pinned["mail.password"].value == "hunter2"
    assert (
        load({"CORRAL_METRICS_TOKEN": "not${EXPANDED}here9", "CORRAL_CONFIG": os.devnull}).metrics_token
        == "not${EXPANDED}here9"
    )
    assert "the environment variable PW is not set" in faults(text)[0]
    assert "absent" in faults('metrics_token = "file:/absent"')[0]


def test_variables_from_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(STRONG + "\n")
    secret.chmod(0o600)
    config = load({"CORRAL_JWT_SECRET_FILE": str(secret), "CORRAL_METRICS_TOKEN_FILE": str(secret)})
    assert config.keys.jwt_secret == config.metrics_token == STRONG
    assert config.sources["keys.jwt_secret"] == "CORRAL_JWT_SECRET_FILE"
    for name in ("MASTER_KEY", "DATABASE_URL", "BOOTSTRAP_ADMIN_PASSWORD"):
        with pytest.raises(StartupError, match=f"CORRAL_{name}_FILE: .*absent"):
            load({f"CORRAL_{name}_FILE": "absent"})
    with pytest.raises(StartupError, match="unset one of them"):
        load({"CORRAL_JWT_SECRET_FILE": str(secret), "CORRAL_JWT_SECRET": STRONG})
    secret.chmod(0o644)
    with pytest.raises(StartupError, match="other users can read this key"):
        load({"CORRAL_JWT_SECRET_FILE": str(secret)})
    with pytest.raises(StartupError, match="other users can read this key"):
        from_file(f'[keys]\nmaster_key = "file:{secret}"')
    assert load({"CORRAL_METRICS_TOKEN_FILE": str(secret), "CORRAL_CONFIG": os.devnull}).metrics_token == STRONG
    secret.write_text("\n")
    with pytest.raises(StartupError, match="is empty"):
        load({"CORRAL_METRICS_TOKEN_FILE": str(secret), "CORRAL_CONFIG": os.devnull})


@pytest.mark.parametrize(
    "secret",
    ["short", "change-me-please-change-me-please", "secret" * 8, "x" * 40, "your-super-secret-jwt-key-0123456789"],
)
def test_short_and_known_secrets_stop_the_start(secret: str) -> None:
    found = faults(environ={"CORRAL_JWT_SECRET": secret})
    assert found
    assert all("CORRAL_JWT_SECRET: keys.jwt_secret" in fault and secret not in fault for fault in found)


def test_the_bound_of_the_jwt_secret_is_in_bytes() -> None:
    assert faults(environ={"CORRAL_JWT_SECRET": STRONG[:31]})
    assert load({"CORRAL_JWT_SECRET": "é" + STRONG[:30]}).keys.jwt_secret
    for _ in range(200):
        load({"CORRAL_JWT_SECRET": os.urandom(32).hex()}, path=NO_FILE)


def test_things_that_belong_together() -> None:
    assert "certfile" in faults('[server]\ncertfile = "a"')[0]
    assert "both list ssh" in faults('[plugins]\nenabled = ["ssh"]\ndisabled = ["ssh", "llm"]')[0]
    environ = {
        "CORRAL_BOOTSTRAP_ADMIN_EMAIL": "a@b.example",
        "CORRAL_RATE_LIMITS": "0",
        "CORRAL_SQLITE_SYNCHRONOUS": "normal",
    }
    warned = " ".join(load(environ, path=NO_FILE).warnings)
    assert "bootstrap_admin_password" in warned
    assert "rate_limits is off" in warned
    assert "power loss" in warned


def test_other_variables_are_kept_for_the_settings_that_declare_them() -> None:
    environ = {"CORRAL_BINDD": "x", "CORRAL_SECRET_DB": "v", "CORRAL_SECRET_": "v", "OTHER": "y"}
    config = load(environ, path=NO_FILE)
    assert config.variables == {"CORRAL_BINDD": "x", "CORRAL_SECRET_": "v"}
    assert config.warnings == ()


def test_pinned_settings() -> None:
    text = '[settings]\n"tasks.lease_seconds" = 30\ntasks.ack_seconds = 7\n"files.blocked_types" = ["a/b"]\n'
    config = from_file(text)
    assert config.pinned["tasks.lease_seconds"] == PinnedSetting(30, str(config.path))
    assert config.pinned["tasks.ack_seconds"] == PinnedSetting(7, str(config.path))
    assert config.pinned["files.blocked_types"].value == ["a/b"]


def test_plugin_tables_and_settings_among_the_overrides() -> None:
    overrides = {
        "plugins.echo": {"a": 1},
        "settings.tasks.lease_seconds": 10,
        "data_dir": Path("d"),
        "rate_limits": False,
    }
    config = load({}, path=NO_FILE, overrides=overrides)
    assert config.plugins.tables == {"echo": {"a": 1}}
    assert config.pinned == {"tasks.lease_seconds": PinnedSetting(10, "command line")}
    assert config.data_dir == Path("d").absolute()
    with pytest.raises(StartupError, match=r"command line: unknown key server\.bnd"):
        load({}, path=NO_FILE, overrides={"server.bnd": 1})


def test_describe_has_every_key_and_no_secret() -> None:
    text = '[plugins.mail]\npassword = "hunter2"\nport = 25\n'
    text += '[settings]\n"mail.password" = "hunter2"\n"llm.max_tokens" = 5\n'
    environ = {
        "CORRAL_DATABASE_URL": "postgresql://u:hunter2%2F%40x@h/d",
        "CORRAL_STORAGE_URL": "s3://b?endpoint=http://m&secret_key=hunter2",
        "CORRAL_EGRESS_PROXY": "http://u:hunter2@p:1",
        "CORRAL_REDIS_URL": "redis://:hunter2@h",
        "CORRAL_JWT_SECRET": STRONG,
        "CORRAL_ACCESS_TTL": "60",
        "CORRAL_PROXY_PASSWORD": "hunter2",
    }
    config = from_file(text, environ)
    rows = {row.key: row for row in masked_rows(config)}
    assert set(TABLE) <= set(rows)
    assert rows["variables.CORRAL_PROXY_PASSWORD"].value == MASK
    shown = repr(rows) + repr(config) + repr(config.keys) + str(config.database)
    assert "hunter2" not in shown
    assert STRONG not in shown
    assert rows["metrics_token"].value is None
    assert rows["database.url"].value == f"postgresql://u:{MASK}@h/d"
    assert rows["plugins.mail"].value == {"password": MASK, "port": 25}
    assert rows["settings.llm.max_tokens"].value == 5
    assert (
        rows["variables.CORRAL_ACCESS_TTL"].value,
        rows["variables.CORRAL_ACCESS_TTL"].source,
    ) == (
        "60",
        "CORRAL_ACCESS_TTL",
    )
    assert all(row.doc for key, row in rows.items() if key in TABLE)


def test_the_sample_is_valid_when_uncommented() -> None:
    text = sample()
    assert from_file(text).sources == {}
    bare = re.sub(r'^# ("?[\w.]+"? = )', r"\1", text, flags=re.M)
    assert sum(line.startswith("# ") and " = " in line for line in bare.splitlines()) == 0
    bare = re.sub(r'"file:/run/secrets/\w+"', f"'{STRONG}'", bare)
    config = from_file(bare)
    assert {name for name, source in config.sources.items() if source != "default"} >= set(TABLE)
    assert config.server.bind == "127.0.0.1:8000"
    for entry in TABLE.values():
        assert entry.key.doc in text
        assert entry.key.variable in text


def test_the_table_is_whole_and_frozen() -> None:
    assert set(SECTIONS) == {"server", "database", "redis", "storage", "keys", "egress", "plugins"}
    variables = [entry.key.variable for entry in TABLE.values() if entry.key.variable]
    assert len(variables) == len(set(variables))
    parts: dict[str, type[msgspec.Struct]] = {"": Config, **SECTIONS}
    fields = {f"{section}.{name}".lstrip(".") for section, part in parts.items() for name in part.__struct_fields__}
    read = {"pinned", "variables", "secrets", "sources", "warnings", "path", "plugins.tables"}  # not keys themselves
    assert fields - read - SECTIONS.keys() == TABLE.keys()
    config: Any = load({}, path=NO_FILE)
    for part in (config, config.server, config.plugins):
        with pytest.raises(AttributeError):
            part.path = None


def test_ensure_data_dir(tmp_path: Path) -> None:
    config = load({}, path=NO_FILE, overrides={"data_dir": tmp_path / "a" / "b"})
    ensure_data_dir(config)
    ensure_data_dir(config)
    assert stat.S_IMODE(config.data_dir.stat().st_mode) == 0o700
    key = config.data_dir / "master.key"
    key.write_text("k")
    key.chmod(0o644)
    with pytest.raises(StartupError, match="other users can read this key"):
        ensure_data_dir(config)
    key.chmod(0o640)
    ensure_data_dir(config)
    file = tmp_path / "file"
    file.touch()
    for bad in (file, file / "below"):
        with pytest.raises(StartupError, match="cannot be created"):
            ensure_data_dir(load({}, path=NO_FILE, overrides={"data_dir": bad}))
