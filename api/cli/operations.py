"""``tunery workers``, ``tunery drain``, ``tunery usage`` and ``tunery audit``."""

import time
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import quote

import typer
from rich.table import Table

from api.cli.common import HomeOption, console, service
from models.domain.base import JsonObject

DAY_SECONDS = 86_400
_GIB = 1024**3

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_workers(as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List workers and inference servers: devices, memory, what each is doing."""
    with service(home) as client:
        found = client.get("/workers")
        if as_json:
            console.print_json(data=found)
            return
        table = Table("worker", "kind", "host", "devices", "memory used", "doing")
        for worker in found["data"]:
            if worker["kind"] == "training":
                devices = ", ".join(device["name"] for device in worker["devices"])
                memory = f"{worker['memory']['used'] / _GIB:.1f} GiB"
                doing = "\n".join(_slot_text(slot) for slot in worker["slots"])
                if worker["status"] == "offline":
                    doing = "offline: it fell silent"
                elif worker["status"] == "draining":
                    doing += "\ntakes no new job"
            else:
                devices, memory = worker["precision"], ""
                doing = f"serves {worker['base_model']}"
            table.add_row(worker["id"], worker["kind"], worker["host"], devices, memory, doing)
        console.print(table)


def _slot_text(slot: JsonObject) -> str:
    if slot["status"] == "idle":
        return "idle"
    if slot["job_id"] is None:
        return "a job of another project"
    return f"{slot['job_id']}, step {slot['step']}/{slot['total_steps'] or '?'}"


def drain_worker(
    worker: Annotated[str, typer.Argument(help="Its id, as `tunery workers` shows it.")],
    undo: Annotated[bool, typer.Option("--undo", help="Have it take jobs again.")] = False,
    home: HomeOption = None,
) -> None:
    """Have a worker take no new job; what it trains goes on to its end."""
    action = "resume" if undo else "drain"
    with service(home) as client:
        found = client.post(f"/workers/{quote(worker, safe='')}/{action}")
        console.print(f"{found['id']} is {found['status']}.", soft_wrap=True)


def show_usage(
    days: Annotated[int, typer.Option(min=1, max=366, help="How far to look back.")] = 30,
    by: Annotated[str, typer.Option(help="model or key.")] = "model",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show what the project used on each day (UTC): tokens served and trained, hours of devices."""
    if by not in ("model", "key"):
        raise typer.BadParameter(f"{by!r} is neither 'model' nor 'key'.", param_hint="--by")
    group = {"model": "model", "key": "api_key_id"}[by]
    start = int(time.time()) - (days - 1) * DAY_SECONDS
    with service(home) as client:
        found = client.get("/usage", start_time=start, group_by=group)
        if as_json:
            console.print_json(data=found)
            return
        table = Table("day", by, "requests", "tokens in", "tokens out", "trained", "device hours")
        for bucket in found["data"]:
            day = datetime.fromtimestamp(bucket["start_time"], UTC).date().isoformat()
            for result in bucket["results"]:
                names = ("num_model_requests", "input_tokens", "output_tokens", "trained_tokens")
                counts = [f"{result[name]:,}" for name in names]
                hours = f"{result['device_seconds'] / 3600:.2f}"
                table.add_row(day, result[group] or "", *counts, hours)
        console.print(table)


def show_audit_log(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show who changed what in the project, newest first."""
    with service(home) as client:
        found = client.get("/audit_logs", limit=limit)
        if as_json:
            console.print_json(data=found)
            return
        table = Table("when (UTC)", "what", "object", "key")
        for entry in found["data"]:
            when = datetime.fromtimestamp(entry["effective_at"], UTC).isoformat(" ", "seconds")
            key = entry["actor"].get("api_key", {}).get("id", "operator")
            table.add_row(when[:19], entry["type"], entry[entry["type"]]["id"], key)
        console.print(table)
