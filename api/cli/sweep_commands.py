"""``tunery sweep`` and ``tunery compare``: jobs over a grid, and their table."""

from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.table import Table

from api.cli.common import HomeOption, console, service
from models.domain.base import JsonObject

GridOption = Annotated[
    list[str], typer.Option("--grid", help="A field and its values: peft.r=4,8 (repeatable).")
]


def parse_grid(fields: list[str]) -> dict[str, list[Any]]:
    """Read ``field=value,value`` texts; a value is JSON where it is that, else text."""
    grid: dict[str, list[Any]] = {}
    for field in fields:
        name, sign, values = field.partition("=")
        if not sign or not name or not values:
            raise typer.BadParameter(f"{field!r} is not like peft.r=4,8.", param_hint="--grid")
        grid[name] = [_value(value) for value in values.split(",")]
    return grid


def _value(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def sweep(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Training data.")],
    grid: GridOption,
    model: str = "smollm2-135m-instruct",
    name: str | None = None,
    home: HomeOption = None,
) -> None:
    """Train one job for each combination of values, as a group."""
    values = parse_grid(grid)
    with service(home) as client:
        job = {"model": model, "training_file": client.upload(file)["id"]}
        made = client.post("/sweeps", {"job": job, "grid": values, "name": name})
        show(made)
        console.print(f"See how they do: tunery compare {made['id']}", highlight=False)


def compare(sweep_id: str, home: HomeOption = None) -> None:
    """Show the jobs of a sweep side by side; the best is marked."""
    with service(home) as client:
        show(client.get(f"/sweeps/{sweep_id}"))


def show(made: JsonObject) -> None:
    table = Table("job", *made["grid"], "status", "loss", "", title=made["name"] or made["id"])
    for row in made["jobs"]:
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        best = "best" if row["job_id"] == made["best_job_id"] else ""
        point = [str(row["point"][field]) for field in made["grid"]]
        table.add_row(row["job_id"], *point, row["status"], loss, best)
    console.print(table)
