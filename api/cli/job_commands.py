"""``tunery jobs``, and ``tunery diff``: see jobs, and change what becomes of them."""

import time
from typing import Annotated

import typer
from rich.table import Table

from api.cli import tune as tuning
from api.cli.client import Client
from api.cli.common import HomeOption, console, give_up, service
from api.job_differences import differences
from models.domain.base import JsonObject
from models.domain.status import JobStatus

LOG_BYTES = 1024 * 1024
FOLLOW_SECONDS = 1.0

jobs_app = typer.Typer(help="List, show, pause, resume and cancel fine-tuning jobs.")


def watch_to_end(client: Client, job_id: str) -> None:
    """Show the progress of a job, and exit with status 1 unless it succeeds."""
    try:
        job = tuning.watch(client, job_id, console)
    except KeyboardInterrupt:
        console.print(f"\nThe job goes on. See it again with 'tunery jobs watch {job_id}'.")
        return
    if job["status"] != JobStatus.SUCCEEDED:
        give_up((job["error"] or {}).get("message") or f"The job ended as {job['status']}.")
    name = job["fine_tuned_model"]
    console.print(f"\n[bold]{name}[/bold] is ready.", highlight=False, soft_wrap=True)
    console.print(f"Try: tunery chat --model {name}", highlight=False, soft_wrap=True)


@jobs_app.callback(invoke_without_command=True)
def list_jobs(context: typer.Context, home: HomeOption = None, limit: int = 20) -> None:
    """List the newest jobs."""
    if context.invoked_subcommand is not None:
        return
    with service(home) as client:
        table = Table("job", "status", "step", "model", "fine-tuned model")
        for job in client.get("/fine_tuning/jobs", limit=limit)["data"]:
            step = f"{job['step']}/{job['total_steps'] or '?'}"
            result = job["fine_tuned_model"] or (job["error"] or {}).get("code") or ""
            table.add_row(job["id"], job["status"], step, job["model"], result)
        console.print(table)


@jobs_app.command("show")
def show_job(job_id: str, home: HomeOption = None) -> None:
    """Print everything about one job as JSON."""
    with service(home) as client:
        console.print_json(data=client.get(f"/fine_tuning/jobs/{job_id}"))


@jobs_app.command("watch")
def watch_job(job_id: str, home: HomeOption = None) -> None:
    """Show the progress of a job until it ends."""
    with service(home) as client:
        watch_to_end(client, job_id)


@jobs_app.command("log")
def show_log(
    job_id: str,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    home: HomeOption = None,
) -> None:
    """Print what the trainers of a job wrote to their log."""
    with service(home) as client:
        offset = 0
        while True:
            part = client.get(f"/fine_tuning/jobs/{job_id}/log", after=offset, limit=LOG_BYTES)
            offset = part["next_offset"]
            typer.echo(part["text"], nl=False)
            if part["has_more"]:
                continue
            if part["has_ended"] or not follow:
                return
            time.sleep(FOLLOW_SECONDS)


@jobs_app.command("cancel")
def cancel_job(job_id: str, home: HomeOption = None) -> None:
    """Cancel a job; a running one stops at its next step."""
    with service(home) as client:
        job = client.post(f"/fine_tuning/jobs/{job_id}/cancel")
        ending = job["status"] == JobStatus.CANCELLED
        console.print("Cancelled." if ending else "The job stops at its next step.")


@jobs_app.command("pause")
def pause_job(job_id: str, home: HomeOption = None) -> None:
    """Pause a job; a running one saves a checkpoint at its next step and stops."""
    with service(home) as client:
        job = client.post(f"/fine_tuning/jobs/{job_id}/pause")
        paused = job["status"] == JobStatus.PAUSED
        console.print("Paused." if paused else "The job pauses at its next step.")


@jobs_app.command("resume")
def resume_job(job_id: str, home: HomeOption = None) -> None:
    """Have a paused job go on where it stopped."""
    with service(home) as client:
        client.post(f"/fine_tuning/jobs/{job_id}/resume")
        console.print("The job goes on as soon as a worker is free.")


@jobs_app.command("rerun")
def rerun_job(job_id: str, home: HomeOption = None) -> None:
    """Submit a job once more, with the same files, seed and numbers."""
    with service(home) as client:
        again = client.post(f"/fine_tuning/jobs/{job_id}/rerun")
        console.print(f"Job {again['id']}. See it with 'tunery jobs watch {again['id']}'.")


def diff_jobs(first: str, second: str, home: HomeOption = None) -> None:
    """Show what two jobs differ in, and the metrics of their last checkpoints."""
    with service(home) as client:
        rows = differences([_with_metrics(client, job_id) for job_id in (first, second)])
        table = Table("field", first, second)
        for name, values in rows:
            table.add_row(name, *map(str, values))
        console.print(table if rows else "They differ in nothing.")


def _with_metrics(client: Client, job_id: str) -> JsonObject:
    job = client.get(f"/fine_tuning/jobs/{job_id}")
    newest = client.get(f"/fine_tuning/jobs/{job_id}/checkpoints", limit=1)["data"]
    return job | {"metrics": newest[0]["metrics"] if newest else None}
