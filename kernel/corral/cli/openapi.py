"""The `corral openapi` command, which prints the OpenAPI document of the configured plugins."""

from __future__ import annotations

import json
from pathlib import Path

import click

from corral.cli.command_kernels import temporary_kernel
from corral.cli.output import config_option
from corral.config.reader import load as load_config


@click.command("openapi")
@click.option("--yaml", "as_yaml", is_flag=True, help="print the document as YAML (requires PyYAML)")
@click.option("--json", "as_json", is_flag=True, help="print the document as JSON (default)")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="write to this file instead of standard output"
)
@config_option
def openapi_command(as_yaml: bool, as_json: bool, out: Path | None, config_path: Path | None) -> None:
    """Print the OpenAPI 3.1 document of the API.

    The same plugins always produce the same text. No server is started and nothing is changed.
    """
    from corral.asgi.application import Application
    from corral.plugin import ApiDocument

    if as_yaml and as_json:
        raise click.UsageError("--yaml and --json cannot be used together")
    config = load_config(path=config_path)
    with temporary_kernel(config) as kernel:
        Application(kernel)
        document = json.loads(kernel.container.get(ApiDocument).render())
        missing = [
            f"{item.name} is {item.state}: {item.reason}" for item in kernel.plugins if _is_out_of_service(item.state)
        ]
    for line in missing:
        click.echo(f"corral: {line}", err=True)
    text = _yaml(document) if as_yaml else json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if out is None:
        click.echo(text, nl=False)
    else:
        try:
            out.write_text(text, "utf-8")
        except OSError as error:
            raise click.ClickException(f"cannot write {out}: {error.strerror}") from None


def _is_out_of_service(state: str) -> bool:
    return state in ("failed", "blocked")


def _yaml(document: object) -> str:
    try:
        import yaml  # type: ignore[import-untyped,unused-ignore]  # an optional package, not a dependency
    except ImportError:
        raise click.UsageError("--yaml needs PyYAML; run pip install pyyaml, or omit --yaml to print JSON") from None
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    return text
