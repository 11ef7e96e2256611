"""``tunery key`` and ``tunery project``: for the operator, who needs no key, on the database."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table
from sqlalchemy.orm import Session

from api.cli.common import HomeOption, console, give_up, reported
from api.cli.home import Home
from models.db import Database
from models.domain.access import Scope
from models.domain.limits import KeyRates, ProjectLimits
from models.explain import explain
from models.registry import audit, tenancy
from models.registry.audit import Change
from models.settings import DatabaseSettings

key_app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
project_app = typer.Typer(help="Make, list and limit projects.", no_args_is_help=True)

_LIMITS = ", ".join(ProjectLimits.model_fields)
RateOption = Annotated[int | None, typer.Option(min=1)]


def _note(session: Session, project_id: str, type_: str, object_id: str, **details: Any) -> None:
    """Write what the operator does to the audit log of the project."""
    audit.record(session, Change(project_id, type_, object_id, details=details or None))


@contextmanager
def _database(home: Path | None) -> Iterator[Database]:
    with reported() as settings:
        here = Home(home or settings.client.home)
        embedded_one = home is not None or "database" not in settings.model_fields_set
        chosen = DatabaseSettings(url=here.database_url) if embedded_one else settings.database
        if embedded_one and not (here.path / "tunery.db").is_file():
            give_up(f"There is no service in {here.path}; start it once with 'tunery up'.")
        database = Database(chosen)
        try:
            yield database
        finally:
            database.close()


@key_app.command("create")
def create_key(  # noqa: PLR0913 (one argument for each option of the command)
    name: str,
    project: Annotated[str, typer.Option(help="Its project.")] = tenancy.DEFAULT_PROJECT,
    scope: Annotated[
        list[Scope] | None, typer.Option(help="What it may do; may be repeated (default: admin).")
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=36500, help="When it ends (default: never).")
    ] = None,
    requests_per_minute: RateOption = None,
    tokens_per_minute: RateOption = None,
    home: HomeOption = None,
) -> None:
    """Make a key named NAME; it is shown this once."""
    expires_at = None if days is None else time.time() + days * 86400
    with _database(home) as database, database.write() as session:
        owner = tenancy.project_named(session, project)
        scopes = scope or [Scope.ADMIN]
        rates = KeyRates(
            requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute
        )
        key, secret = tenancy.create_key(session, owner.id, name, scopes, expires_at, rates)
        _note(session, owner.id, "api_key.created", key.id, name=name, scopes=key.scopes)
    console.print(f"{key.id}  {secret}", highlight=False, soft_wrap=True)


@key_app.command("list")
def list_keys(home: HomeOption = None) -> None:
    """List keys by their prefixes."""
    table = Table("id", "project", "name", "key", "scopes", "ends", "state")
    with _database(home) as database, database.read() as session:
        names = {project.id: project.name for project in tenancy.list_projects(session)}
        for key in tenancy.list_keys(session):
            state = "active" if key.revoked_at is None else "revoked"
            end = "never"
            if key.expires_at is not None:
                end = datetime.fromtimestamp(key.expires_at, UTC).isoformat(" ", "minutes")
            scopes = " ".join(key.scopes)
            owner = names[key.project_id]
            table.add_row(key.id, owner, key.name, f"{key.prefix}…", scopes, end, state)
    console.print(table)


@key_app.command("revoke")
def revoke_key(key_id: str, home: HomeOption = None) -> None:
    """Make a key useless from now on."""
    with _database(home) as database, database.write() as session:
        key = tenancy.revoke_key(session, key_id)
        _note(session, key.project_id, "api_key.deleted", key_id, name=key.name)
    console.print(f"Revoked {key_id}.", highlight=False)


@project_app.command("create")
def create_project(
    name: str,
    organization: Annotated[str | None, typer.Option(help="Whom it belongs to.")] = None,
    home: HomeOption = None,
) -> None:
    """Make a project named NAME; `tunery key create --project NAME` gives it a key."""
    with _database(home) as database, database.write() as session:
        project = tenancy.create_project(session, name, organization)
        _note(session, project.id, "project.created", project.id, name=name)
    console.print(project.id, highlight=False)


@project_app.command("list")
def list_projects(home: HomeOption = None) -> None:
    """List projects and the limits that bind them."""
    table = Table("id", "organization", "name", "limits")
    with _database(home) as database, database.read() as session:
        names = tenancy.organization_names(session)
        for project in tenancy.list_projects(session):
            limits = tenancy.limits_of(project).model_dump(exclude_defaults=True)
            text = ", ".join(f"{name}={value:,}" for name, value in limits.items())
            table.add_row(project.id, names.get(project.organization_id or ""), project.name, text)
    console.print(table)


@project_app.command("limit")
def limit_project(
    name: str,
    limits: Annotated[
        list[str], typer.Argument(help=f"NAME=NUMBER or NAME=none: {_LIMITS}.", metavar="LIMIT…")
    ],
    home: HomeOption = None,
) -> None:
    """Change limits of the project NAME; those that are not named stay."""
    with _database(home) as database:
        try:
            wanted = ProjectLimits.model_validate(dict(map(_limit, limits)))
        except ValidationError as error:
            raise explain(error.errors()) from None
        with database.write() as session:
            project = tenancy.project_named(session, name)
            tenancy.set_limits(session, project, wanted)
            changed = wanted.model_dump(exclude_unset=True)
            _note(session, project.id, "project.updated", project.id, limits=changed)
    console.print(f"Changed the limits of {name}.", highlight=False)


def _limit(text: str) -> tuple[str, float | None]:
    name, _, value = text.partition("=")
    name = name.replace("-", "_")
    if name not in ProjectLimits.model_fields:
        give_up(f"{name!r} is no limit. Limits: {_LIMITS}.")
    try:
        return name, None if value == "none" else int(value) if value.isdigit() else float(value)
    except ValueError:
        give_up(f"{text!r}: give a number after '=', or none.")
