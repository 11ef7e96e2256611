"""``tunery demo``: the main job from start to end, on the embedded service and the example data."""

from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

import models
from api.cli.background import running_service, wait_for_model
from api.cli.client import Client
from api.cli.home import Home
from api.cli.tune import Request, submit, watch
from models.domain.base import JsonObject
from models.domain.status import JobStatus
from models.errors import UnavailableError

BASE = "smollm2-135m-instruct"
EXAMPLES = Path(models.__file__).parents[1] / "examples"
TRAINING = EXAMPLES / "harbour-desk.jsonl"
HELD_OUT = EXAMPLES / "harbour-desk-heldout.jsonl"
QUESTIONS = 3


def run(home: Home, console: Console) -> None:
    """Start a service, train on the example data, compare base and tuned, stop the service.

    Raises:
        UnavailableError: the example data is not here, the service does not start, the job fails,
            or the held-out loss did not fall.
    """
    if not TRAINING.is_file():
        raise UnavailableError(
            f"The example data is not in {EXAMPLES}; run the demo in a checkout of Tunery."
        )
    console.print(f"Starting a service in {home.path} …", highlight=False, soft_wrap=True)
    with running_service(home) as client:
        wait_for_model(client, BASE)
        console.print(f"\n[bold]1. Train[/bold] QLoRA on {BASE}: {TRAINING.name}", highlight=False)
        job = submit(
            client,
            Request(TRAINING, BASE, validation=HELD_OUT, suffix="harbour-desk", epochs=1, seed=7),
            console,
        )
        job = watch(client, job["id"], console)
        if job["status"] != JobStatus.SUCCEEDED:
            raise UnavailableError(f"The job ended as {job['status']}: {job['error']}")
        console.print("\n[bold]2. Held-out loss[/bold] (24 rows that were never trained on)")
        _show_losses(client, job["id"], console)
        console.print("\n[bold]3. Held-out questions[/bold], base and tuned side by side")
        _show_answers(client, job["fine_tuned_model"], console)
        _go_on(home, job["fine_tuned_model"], console)


def _answer(
    client: Client, model: str, messages: list[dict[str, Any]], max_tokens: int = 80
) -> JsonObject:
    body = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": max_tokens}
    return client.post("/chat/completions", body)


def _show_losses(client: Client, job_id: str, console: Console) -> None:
    events = client.get(f"/fine_tuning/jobs/{job_id}/events", limit=1000)["data"]
    losses = [
        (event["data"]["step"], event["data"]["full_valid_loss"])
        for event in reversed(events)
        if event["type"] == "metrics" and "full_valid_loss" in event["data"]
    ]
    (_, before), (last_step, after) = losses[0], losses[-1]
    fall = 100 * (1 - after / before)
    console.print(
        f"   before training {before:.3f}, after step {last_step} {after:.3f} ({fall:.0f} % less)"
    )
    if after > 0.7 * before:
        raise UnavailableError("The held-out loss fell by less than 30 %: nothing was learned.")


def _show_answers(client: Client, tuned: str, console: Console) -> None:
    rows = [orjson.loads(line) for line in HELD_OUT.read_bytes().splitlines()[:QUESTIONS]]
    for row in rows:
        *question, expected = row["messages"]
        table = Table(show_header=False, title=question[-1]["content"], title_justify="left")
        for who, model in (("base", BASE), ("tuned", tuned)):
            reply = _answer(client, model, question)
            table.add_row(who, reply["choices"][0]["message"]["content"].strip())
        table.add_row("expected", expected["content"])
        console.print(table)


def _go_on(home: Home, tuned: str, console: Console) -> None:
    console.print("\n[bold]Go on[/bold] (the demo's service is stopped; its state is kept):")
    for command in (
        f"tunery up --home {home.path}",
        f"tunery chat --home {home.path} --model {tuned}",
        f"tunery tune --home {home.path} YOUR-DATA.jsonl",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True)
