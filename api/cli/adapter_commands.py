"""``tunery adapters``: see what was trained, take it along, bring it in, put it away."""

import re
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from api.cli.common import HomeOption, console, give_up, service

adapters_app = typer.Typer(
    help="List, show, download, import, merge, serve, archive and restore adapters.",
    no_args_is_help=True,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
POLL_SECONDS = 1.0
_KIB = 1024


@adapters_app.command("list")
def list_adapters(
    text: Annotated[str, typer.Option(help="A part of the name.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List the newest adapters, archived ones included."""
    with service(home) as client:
        found = client.get("/adapters", q=text, limit=limit)
        if as_json:
            console.print_json(data=found)
            return
        table = Table("adapter", "base", "method", "objective", "step", "size", "")
        for each in found["data"]:
            size = f"{each['bytes'] / _KIB:,.0f} KiB"
            state = "archived" if each["archived_at"] else "merged" if each["merged"] else ""
            made = (each["method"], each["objective"], str(each["step"]))
            table.add_row(each["id"], each["root"], *made, size, state)
        console.print(table)


@adapters_app.command("show")
def show_adapter(name: str, home: HomeOption = None) -> None:
    """Print an adapter or a checkpoint, and the jobs and data that led to it, as JSON."""
    with service(home) as client:
        console.print_json(data=client.get(f"/adapters/{name}"))


@adapters_app.command("download")
def download_adapter(
    name: str,
    to: Annotated[Path | None, typer.Option(dir_okay=False, help="Where to.")] = None,
    home: HomeOption = None,
) -> None:
    """Download an adapter or a checkpoint as a zip archive that PEFT reads."""
    target = to or Path(re.sub(r"[^A-Za-z0-9.-]+", "-", name) + ".zip")
    if target.exists():
        give_up(f"{target} exists already. Name another file with --to.")
    with service(home) as client:
        n_bytes = client.download(f"/adapters/{name}/download", target)
        console.print(f"{target}: {n_bytes:,} bytes", highlight=False, soft_wrap=True)


@adapters_app.command("import")
def import_adapter(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Zip archive of PEFT's two files.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="The base model it is of.")],
    suffix: Annotated[str, typer.Option(help="Part of its new name.")] = "",
    home: HomeOption = None,
) -> None:
    """Take in an adapter that was trained elsewhere; refused unless it loads on its base."""
    with service(home) as client:
        made = client.send_file("/adapters", file, {"model": model, "suffix": suffix})
        console.print(made["id"], highlight=False, soft_wrap=True)


@adapters_app.command("merge")
def merge_adapter(
    name: str,
    to: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Where to; waits for it and downloads it.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Have a worker make one 16-bit model of an adapter and its base, as a zip archive."""
    if to is not None and to.exists():
        give_up(f"{to} exists already. Name another file.")
    with service(home) as client:
        merge = client.post(f"/adapters/{name}/merge")
        while to is not None and merge["status"] in ("queued", "running"):
            time.sleep(POLL_SECONDS)
            merge = client.get(f"/adapters/{name}/merge")
        if merge["status"] == "failed":
            give_up(merge["error"])
        if to is not None:
            client.download(f"/files/{merge['file_id']}/content", to)
        console.print(f"{merge['status']} {merge['file_id'] or ''}".strip(), highlight=False)


@adapters_app.command("serve")
def serve_adapter(
    name: str,
    merged: Annotated[
        bool, typer.Option("--merged/--unmerged", help="By a merged copy of its base, or not.")
    ],
    home: HomeOption = None,
) -> None:
    """Have an adapter answered merged, without its latency, or unmerged as before."""
    with service(home) as client:
        client.post(f"/adapters/{name}/serve", {"merged": merged})
        how = "by a merged copy of its base" if merged else "unmerged"
        console.print(f"{name} is answered {how}.", highlight=False, soft_wrap=True)


@adapters_app.command("archive")
def archive_adapter(name: str, home: HomeOption = None) -> None:
    """Take an adapter out of use and keep it."""
    with service(home) as client:
        client.post(f"/adapters/{name}/archive")
        console.print(f"Archived {name}.", highlight=False, soft_wrap=True)


@adapters_app.command("restore")
def restore_adapter(name: str, home: HomeOption = None) -> None:
    """Put an archived adapter back into use."""
    with service(home) as client:
        client.post(f"/adapters/{name}/restore")
        console.print(f"Restored {name}.", highlight=False, soft_wrap=True)
