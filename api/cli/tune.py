"""``tunery tune``: upload, submit, and watch a job with a progress bar."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from api.cli.client import Client
from models.domain.base import JsonObject
from models.domain.status import JobStatus

POLL_SECONDS = 0.5
PAGE = 100


@dataclass(frozen=True, slots=True)
class Request:
    """What the person asked for on the command line; None leaves the service's default."""

    file: Path
    model: str
    validation: Path | None = None
    suffix: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    rank: int | None = None
    precision: str | None = None
    seed: int | None = None


def submit(client: Client, request: Request, console: Console) -> JsonObject:
    """Upload the files and create the job."""
    job = client.post("/fine_tuning/jobs", job_body(client, request, console))
    console.print(f"Created job {job['id']}", highlight=False)
    return job


def job_body(client: Client, request: Request, console: Console) -> JsonObject:
    """Upload the files and return the body of the job."""
    body: dict[str, Any] = {"model": request.model}
    for field, path in (
        ("training_file", request.file),
        ("validation_file", request.validation),
    ):
        if path is not None:
            file = client.upload(path)
            console.print(f"Uploaded {path} as {file['id']}", highlight=False, soft_wrap=True)
            body[field] = file["id"]
    numbers = {"n_epochs": request.epochs, "batch_size": request.batch_size}
    hyperparameters = {name: value for name, value in numbers.items() if value is not None}
    if hyperparameters:
        body["method"] = {
            "type": "supervised",
            "supervised": {"hyperparameters": hyperparameters},
        }
    if request.suffix:
        body["suffix"] = request.suffix
    if request.seed is not None:
        body["seed"] = request.seed
    if request.learning_rate is not None:
        body["optimizer"] = {"type": "adamw", "learning_rate": request.learning_rate}
    if request.rank is not None:
        body["peft"] = {"type": "lora", "r": request.rank, "alpha": 2.0 * request.rank}
    if request.precision is not None:
        body["precision"] = {"type": request.precision}
    return body


def watch(client: Client, job_id: str, console: Console) -> JsonObject:
    """Show the progress of a job until it ends; return its last state.

    The job does not depend on this: Ctrl-C only stops watching.
    """
    seen = 0
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        bar = progress.add_task("waiting", total=1, loss="")
        while True:
            job = client.get(f"/fine_tuning/jobs/{job_id}")
            for event in _new_events(client, job_id, seen):
                seen = event["sequence"]
                if event["type"] == "message":
                    progress.console.print(_line(event), highlight=False, soft_wrap=True)
                elif "train_loss" in event["data"]:
                    progress.update(bar, loss=_loss(event["data"]))
            progress.update(
                bar,
                description=job["status"],
                completed=job["step"],
                total=job["total_steps"] or 1,
            )
            if JobStatus(job["status"]).is_terminal:
                return job
            time.sleep(POLL_SECONDS)


def _new_events(client: Client, job_id: str, seen: int) -> list[JsonObject]:
    """Return the events after number `seen`, oldest first."""
    new: list[JsonObject] = []
    query: dict[str, Any] = {"limit": PAGE}
    while True:
        page = client.get(f"/fine_tuning/jobs/{job_id}/events", **query)
        for event in page["data"]:
            if event["sequence"] <= seen:
                return new[::-1]
            new.append(event)
        if not page["has_more"]:
            return new[::-1]
        query["after"] = page["last_id"]


def _line(event: JsonObject) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event["created_at"]))
    mark = {"warn": "[yellow]warning:[/yellow] ", "error": "[red]error:[/red] "}
    text = str(event["message"]).replace("[", "\\[")
    return f"{clock}  {mark.get(event['level'], '')}{text}"


def _loss(data: JsonObject) -> str:
    shown = f"loss {data['train_loss']:.3f}"
    if "full_valid_loss" in data:
        shown += f" · held-out {data['full_valid_loss']:.3f}"
    return f"{shown} · {data['tokens_per_second']:.0f} tokens/s"
