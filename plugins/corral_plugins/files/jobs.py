"""Background jobs and event handlers of the `files` plugin."""

from __future__ import annotations

from corral.events.log import LoggedEvent
from corral.jobs.job import Job, Schedule, enqueue
from corral_plugins.files.service.sweeps import FileSweeps

FORGET_JOB, LEAVE_JOB = "files.forget_owner", "files.leave_task"
HOUR, WEEK = 3600.0, 7 * 86_400.0


async def sweep_files(sweeps: FileSweeps) -> None:
    """Delete expired files and the remains of interrupted uploads."""
    await sweeps.sweep()


async def verify_files(sweeps: FileSweeps) -> None:
    """Verify the stored files in the sample of the current week."""
    await sweeps.verify()


async def delete_private_files(user_id: str, sweeps: FileSweeps) -> None:
    """Delete the private files of a purged user."""
    await sweeps.delete_private_files(user_id)


async def leave_task(task_id: str, sweeps: FileSweeps) -> None:
    """Detach files from a deleted task. They become private files of their owners."""
    await sweeps.leave_task(task_id)


def on_user_purged(event: LoggedEvent) -> None:
    """Enqueue the job that deletes the private files of a purged user."""
    enqueue(FORGET_JOB, user_id=event.object_id)


def on_task_deleted(event: LoggedEvent) -> None:
    """Enqueue the job that detaches the files of a deleted task."""
    enqueue(LEAVE_JOB, task_id=event.object_id)


JOBS = (Job(FORGET_JOB, delete_private_files), Job(LEAVE_JOB, leave_task))
SCHEDULES = (Schedule("files.sweep", HOUR, sweep_files), Schedule("files.verify", WEEK, verify_files))
