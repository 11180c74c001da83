"""`corral jobs`: background jobs, schedules and durable consumers, without serving."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import click

from corral.cli import logs
from corral.config import Config
from corral.config_reader import ensure_data_dir
from corral.config_reader import load as load_config


@click.command("jobs")
@click.option("--concurrency", type=click.IntRange(1, 256), help="jobs at a time")
@click.option("--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="corral.toml to read")
def command(concurrency: int | None, config_path: Path | None) -> None:
    """Run background jobs, schedules and consumers until SIGTERM; any number of processes share them."""
    config = load_config(path=config_path, overrides={"settings.jobs.concurrency": concurrency})
    logs.configure(config.log_level, config.log_format)
    ensure_data_dir(config)
    asyncio.run(_run(config))


async def _run(config: Config) -> None:
    from corral.kernel import boot

    kernel = await asyncio.to_thread(boot, config)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await kernel.start(jobs=True)
    click.echo(f"Jobs are running ({len(kernel.active)} plugins).")
    await stopping.wait()
    await kernel.stop()
