"""The tutorial on securing an installation, typed by an admin who comes by IPv6."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.guide_shell import ADMIN, SERVER, guide_shell

from corral.testing.server import free_port

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial" / "administer.md"


def test_an_installation_is_secured(tmp_path: Path) -> None:
    """The allow list of the tutorial contains its author and the embedded worker, whose address is ::1."""
    with guide_shell(tmp_path) as shell:
        shell.address = f"[::1]:{free_port()}"
        shell.commands.environ["CORRAL_BIND"] = shell.address
        shell.corral("user", "create", "--admin", ADMIN)
        shell.serve(log=tmp_path / "corral.log")
        shell.sign_in()
        shell.run(TUTORIAL, {SERVER: shell.address})
        assert '"::1"' in (tmp_path / "rules.json").read_text()
