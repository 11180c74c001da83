"""Plugins that do next to nothing, as distributions in a folder for `[plugins] dir`; an installation of tasks alone."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

NEEDED = frozenset({"llm", "agents", "workers", "tasks"})  # tasks, and what it requires

CODE = '''"""A plugin that does next to nothing."""

from corral.auth.principal import READERS, Permission
from corral.http.routes import Routes
from corral.plugin import Plugin, Provide, hookimpl

routes = Routes("/{name}", tag="{name}")


class Service:
    """Says hello."""

    def hello(self) -> dict[str, str]:
        """Say it."""
        return {{"hello": "{name}"}}


@routes.get("/", needs="{name}.read")
def get_{name}(service: Service) -> dict[str, str]:
    """Say hello."""
    return service.hello()


class NoopPlugin(Plugin):
    """Does next to nothing."""

    name = "{name}"
    permissions = (Permission("{name}.read", "Hear it", READERS),)

    @hookimpl
    def corral_services(self) -> list[Provide]:
        return [Provide(Service, Service)]

    @hookimpl
    def corral_routes(self) -> list[Routes]:
        return [routes]
'''


def write_many(folder: Path, count: int) -> None:
    """`count` plugins in `folder/plugins`, and the `corral.toml` that loads them."""
    names = [f"noop_{number}" for number in range(count)]
    for name in names:
        package = folder / "plugins" / f"bench_{name}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "plugin.py").write_text(CODE.format(name=name))
        info = folder / "plugins" / f"bench_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bench-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[corral.plugins]\n{name} = bench_{name}.plugin:NoopPlugin\n")
    _toml(folder, f'dir = "{folder / "plugins"}"\nenabled = {names!r}\n')


def write_alone(folder: Path) -> None:
    """The `corral.toml` of an installation that has tasks and what tasks requires."""
    points = metadata.entry_points(group="corral.plugins")
    others = sorted({point.name for point in points if not point.module.startswith("corral_core.")} - NEEDED)
    _toml(folder, f"disabled = {others!r}\n")


def _toml(folder: Path, plugins: str) -> None:
    (folder / "corral.toml").write_text(f"[plugins]\n{plugins}")
