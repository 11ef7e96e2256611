"""``tunery methods``: what a job can be trained with; no service is needed."""

from typing import Annotated

import typer
from rich.table import Table

from api.cli.common import console
from api.methods.catalogue import catalogue


def list_methods(
    as_json: Annotated[
        bool, typer.Option("--json", help="All of it as JSON, parameters as JSON schema.")
    ] = False,
) -> None:
    """List the training methods and what goes with what."""
    found = catalogue()
    if as_json:
        console.print_json(data=found)
        return
    table = Table("peft.type", "method", "base held in", "answers", "when")
    for method in found["data"]:
        held = ", ".join(method["precisions"])
        table.add_row(method["id"], method["title"], held, method["served"], method["when"])
    console.print(table)
    objectives = Table("objective.type", "rows", "base model")
    for objective in found["objectives"]:
        objectives.add_row(objective["id"], ", ".join(objective["forms"]), objective["family"])
    console.print(objectives)
