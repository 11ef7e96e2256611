"""``tunery estimate``: what a job would take, as a table."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from api.cli.client import Client
from models.domain.base import JsonObject
from models.errors import TuneryError

WAIT_SECONDS = 300.0
POLL_SECONDS = 2.0
_PASSING = ("file_not_linted", "not_measured_yet")


def wait_for_estimate(client: Client, body: JsonObject, console: Console) -> JsonObject:
    """Ask for an estimate until the file is checked and the base model measured.

    Raises:
        TuneryError: what the service answered, also when that takes longer than `WAIT_SECONDS`.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    told = ""
    while True:
        try:
            return client.post("/fine_tuning/estimate", body)
        except TuneryError as error:
            if error.code not in _PASSING or time.monotonic() > deadline:
                raise
            if error.code != told:
                told = error.code
                console.print(error.message, soft_wrap=True)
            time.sleep(POLL_SECONDS)


def show(estimate: JsonObject, console: Console) -> None:
    """Print an estimate as a table."""
    table = Table("", "expected", "between", title=f"{estimate['model']} on {estimate['device']}")
    seconds, peak = estimate["seconds_band"], estimate["peak_bytes_band"]
    table.add_row("time", _time(estimate["seconds"]), _range(seconds, _time))
    table.add_row("peak memory", _size(estimate["peak_bytes"]), _range(peak, _size))
    for part, size in estimate["memory"].items():
        table.add_row(f"  {part}", _size(size), "")
    table.add_row("steps", f"{estimate['total_steps']:,}", "")
    table.add_row("tokens", f"{estimate['total_tokens']:,}", "")
    table.add_row("trained parameters", f"{estimate['trainable_parameters']:,}", "")
    table.add_row("disk", _size(estimate["disk_bytes"]), "")
    console.print(table)
    n_jobs = estimate["n_jobs_learned_from"]
    console.print(
        "From a measurement of this base model"
        + (f", corrected by {n_jobs} jobs that ended on it." if n_jobs else "; no job ended yet."),
        highlight=False,
    )


def _range(band: JsonObject, shown: Callable[[float], str]) -> str:
    return f"{shown(band['low'])} – {shown(band['high'])}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if abs(n_bytes) >= 2**29 else f"{n_bytes / 2**20:.0f} MiB"
