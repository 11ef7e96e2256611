"""What the commands of ``tunery`` share: the console, the service, errors as sentences."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from api.cli.client import Client, connect
from models.errors import TuneryError
from models.settings import Settings, load_settings

console = Console()
errors = Console(stderr=True)

HomeOption = Annotated[
    Path | None, typer.Option(help="Directory of `tunery up` (default: TUNERY_CLIENT__HOME).")
]


@contextmanager
def reported() -> Iterator[Settings]:
    """Give the settings to a command; print its errors as sentences and exit with status 1."""
    try:
        yield load_settings()
    except TuneryError as error:
        give_up(f"{error.message}" + (f" (param: {error.param})" if error.param else ""))
    except ValidationError as error:
        faults = "; ".join(
            f"TUNERY_{'__'.join(str(part) for part in fault['loc']).upper()}: {fault['msg']}"
            for fault in error.errors()
        )
        give_up(f"Bad settings: {faults}")


def give_up(message: str) -> NoReturn:
    errors.print(Text("Error: ", style="red").append(message, style="default"), soft_wrap=True)
    raise typer.Exit(1)


@contextmanager
def service(home: Path | None) -> Iterator[Client]:
    with reported() as settings, closing(connect(settings.client, home)) as client:
        yield client
