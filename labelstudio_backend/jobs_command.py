"""The command `yolonas-labelstudio jobs`: what was trained, what is being trained, and what to do about it."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click

from labelstudio_backend.cli import settings_from
from labelstudio_backend.job import FINAL, Job, last_ap50
from labelstudio_backend.job_queue import JobQueue
from labelstudio_backend.jobs import open_jobs
from yolonas.errors import YolonasError

FOLLOW_SECONDS = 1.0
SHOWN_EPOCHS = 10


@click.command()
@click.argument("words", nargs=-1, metavar="[ID | cancel ID | retry ID]")
@click.option("--project", help="Only jobs of this project: Label Studio's number, or the backend's key.")
@click.option("--log", "show_log", is_flag=True, help="With ID: print the job's log.")
@click.option("--follow", is_flag=True, help="With ID: go on printing its log until the job ends.")
@click.option("--state-dir", help="Folder of versions, jobs and cached images.")
def jobs(words: tuple[str, ...], project: str | None, show_log: bool, follow: bool, **options: Any) -> None:
    """List trainings; show, cancel or retry one. Works whether the server runs or not.

    \b
      jobs                    all trainings, the newest last
      jobs 12                 one, with its curve
      jobs 12 --log --follow  what it prints, as it prints it
      jobs cancel 12          end it; the version that serves goes on
      jobs retry 12           a failed or cancelled one again, with its data where that is still there
    """
    queue = open_jobs(settings_from(**options))
    action, number = (words[0], words[1]) if len(words) == 2 else ("show", words[0] if words else "")
    if len(words) > 2 or action not in ("show", "cancel", "retry"):
        raise YolonasError(
            f"{' '.join(words)!r} is not known: use `jobs`, `jobs ID`, `jobs cancel ID`, `jobs retry ID`"
        )
    if not number:
        _list(queue, project)
        return
    job = queue.get(int(number)) if number.isdecimal() else None
    if job is None:
        raise YolonasError(f"there is no job {number!r}; `yolonas-labelstudio jobs` lists them")
    if action == "cancel":
        if not queue.cancel(job.id):
            raise YolonasError(f"job {job.id} has ended already: {job.state}, {job.reason}")
        after = queue.get(job.id)
        click.echo(f"Job {job.id}: {after.reason if after is not None else 'cancelled'}.")
    elif action == "retry":
        again = queue.retry(job.id)
        if again is None:
            raise YolonasError(f"job {job.id} is {job.state}; only a failed or cancelled one can be retried")
        click.echo(f"Job {again} waits for its turn; the server runs it.")
    elif show_log or follow:
        _log(queue, job, follow)
    else:
        for line in _details(job, queue.folder(job.id)):
            click.echo(line)


def _list(queue: JobQueue, project: str | None) -> None:
    found = [job for job in queue.find(brief=True) if project in (None, job.project, job.project.partition("-")[0])]
    if not found:
        click.echo("No training yet: submit some annotations, or press Start Training in Label Studio.")
        return
    click.echo(f"{'job':>5}  {'project':12} {'state':10} {'when':16} {'took':>8}  what")
    for job in found:
        when = datetime.fromtimestamp(job.started or job.created).strftime("%Y-%m-%d %H:%M")
        what = f"{job.progress:4.0%} {job.reason}" if job.state == "running" else job.reason or job.trigger
        click.echo(f"{job.id:5}  {job.project:12} {job.state:10} {when:16} {_took(job):>8}  {what}")


def _took(job: Job) -> str:
    if job.started is None:
        return ""
    end = time.time() if job.finished is None else job.finished
    return str(timedelta(seconds=round(max(0.0, end - job.started))))


def _details(job: Job, folder: Path) -> list[str]:
    lines = [
        f"Job {job.id} of project {job.project}: {job.state}",
        f"  why        {job.trigger}",
        f"  stands     {job.reason or 'waits for its turn'}",
        f"  progress   {job.progress:.0%}" + (f", epoch {job.epoch}" if job.epoch is not None else ""),
    ]
    if (ap50 := last_ap50(job.curve)) is not None:
        lines[-1] += f", AP50 {ap50:.3f}"
    if job.seconds_left is not None:
        lines[-1] += f", {timedelta(seconds=round(job.seconds_left))} of training left"
    if took := _took(job):
        lines.append(f"  time       {took}" + (f", gone on {job.restarts} times" if job.restarts else ""))
    if job.version:
        lines.append(f"  version    {job.version}")
    tasks = job.record.get("tasks") or {}
    if tasks:
        lines.append(f"  learnt     {tasks['train']} images to train on, {tasks['held_out']} to judge by")
        if tasks.get("unusable"):
            lines.append(f"  left out   {tasks['unusable']}, like {tasks['unusable_because'][0]}")
    before, after = job.record.get("before"), job.record.get("after")
    if before and after:
        lines.append(f"  AP50       {before['ap50']:.3f} -> {after['ap50']:.3f} on the held-out images")
    for point in job.curve[-SHOWN_EPOCHS:]:
        lines.append(f"  epoch {point['epoch']:4} loss {point['loss']:.3f}")
        if point.get("ap50") is not None:
            lines[-1] += f" AP50 {point['ap50']:.3f}"
    return [*lines, f"  files      {folder}"]


def _log(queue: JobQueue, job: Job, follow: bool) -> None:
    """Print the log; with `follow` until the job has ended."""
    path, position = queue.folder(job.id) / "log.txt", 0
    while True:
        now = queue.get(job.id)
        ended = now is None or now.state in FINAL
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(position)
                text = stream.read()
            position += len(text)
            click.echo(text.decode(errors="replace"), nl=False)
        elif not follow:
            raise YolonasError(f"job {job.id} has no log: it has not started" if not ended else f"{path} is not there")
        if ended or not follow:
            return
        time.sleep(FOLLOW_SECONDS)
