"""A folder in which a test installs plugins. It has the layout that `pip install --target` creates.

Tests that use such a folder need neither pip nor a network.
"""

from __future__ import annotations

import base64
import hashlib
import textwrap
from collections.abc import Mapping
from pathlib import Path


class PluginFolder:
    """A folder of installed plugins. Pass `path` as `CORRAL_PLUGIN_DIR` or `[plugins] dir`.

    For example, an `echo` plugin is installed as the distribution corral-echo with the package corral_echo.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        name: str,
        plugin: str,
        files: Mapping[str, str] | None = None,
        *,
        distribution: str = "",
        package: str = "",
    ) -> Path:
        """Install a plugin with the given text of `plugin.py` and additional files. Return the folder of its package.

        The text must define the class `<Name>Plugin`. `distribution` and `package` override the default names.
        """
        texts = {"__init__.py": '"""A plugin."""\n', "plugin.py": plugin, **(files or {})}
        folder = self.path / (package or f"corral_{name}")
        for relative, text in texts.items():
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(textwrap.dedent(text), "utf-8")
        return self._register(name, folder, distribution)

    def add_distribution(self, name: str, source: Path, *, package: str = "") -> Path:
        """Install the package from the source tree of a distribution, such as one written by `corral new-plugin`."""
        package = package or f"corral_{name}"
        folder = self.path / package
        for path in sorted((source / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                target = folder / path.relative_to(source / package)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return self._register(name, folder, "")

    def _register(self, name: str, folder: Path, distribution: str) -> Path:
        distribution = distribution or f"corral-{name.replace('_', '-')}"
        metadata = self.path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir()
        camel = "".join(part.capitalize() for part in name.split("_"))
        entry = f"[corral.plugins]\n{name} = {folder.name}.plugin:{camel}Plugin\n"
        facts = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\nLicense: MIT\nAuthor: A. U. Thor\n"
        (metadata / "entry_points.txt").write_text(entry, "utf-8")
        (metadata / "METADATA").write_text(facts, "utf-8")
        lines = [self._record_line(path) for path in sorted(folder.rglob("*")) if path.is_file()]
        lines.append(f"{(metadata / 'RECORD').relative_to(self.path)},,")
        (metadata / "RECORD").write_text("\n".join(lines) + "\n", "utf-8")
        return folder

    def _record_line(self, path: Path) -> str:
        content = path.read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        return f"{path.relative_to(self.path)},sha256={digest},{len(content)}"
