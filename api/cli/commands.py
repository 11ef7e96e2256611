"""Every command of ``tunery`` and its options; the work is in the modules beside this one."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
import uvicorn
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from api.cli import demo as demo_command
from api.cli import migrate as migrations
from api.cli import tune as tuning
from api.cli import up as embedded
from api.cli.chat import converse, say
from api.cli.client import Client, connect
from api.cli.home import Home
from api.cli.job_diff import differences
from models.db import Database
from models.domain.base import JsonObject
from models.domain.status import JobStatus
from models.errors import TuneryError
from models.logs import configure_logging
from models.registry import tenancy
from models.settings import DatabaseSettings, Settings, load_settings

app = typer.Typer(
    help="Train adapters on your own machines and call them by name.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
jobs_app = typer.Typer(help="List, show and cancel fine-tuning jobs.")
models_app = typer.Typer(help="List base and fine-tuned models, delete fine-tuned ones.")
data_app = typer.Typer(help="Check data files; no service is needed.", no_args_is_help=True)
key_app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
app.add_typer(jobs_app, name="jobs")
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")
app.add_typer(key_app, name="key")

console = Console()
errors = Console(stderr=True)

HomeOption = Annotated[
    Path | None, typer.Option(help="Directory of `tunery up` (default: TUNERY_CLIENT__HOME).")
]


@contextmanager
def _reported() -> Iterator[Settings]:
    """Give the settings to a command; print its errors as sentences and exit with status 1."""
    try:
        yield load_settings()
    except TuneryError as error:
        _give_up(f"{error.message}" + (f" (param: {error.param})" if error.param else ""))
    except ValidationError as error:
        faults = "; ".join(
            f"TUNERY_{'__'.join(str(part) for part in fault['loc']).upper()}: {fault['msg']}"
            for fault in error.errors()
        )
        _give_up(f"Bad settings: {faults}")


def _give_up(message: str) -> NoReturn:
    errors.print(Text("Error: ", style="red").append(message, style="default"), soft_wrap=True)
    raise typer.Exit(1)


@contextmanager
def _service(home: Path | None) -> Iterator[Client]:
    with _reported() as settings:
        yield connect(settings.client, home)


@app.command()
def up(
    home: HomeOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8470,
    model: Annotated[
        list[str] | None, typer.Option(help="Base model to answer from; may be repeated.")
    ] = None,
) -> None:
    """Run the whole service on this machine: broker, API, worker, inference server."""
    with _reported() as settings:
        plan = embedded.Plan(
            Home(home or settings.client.home), port, model or [settings.inference.model]
        )
        embedded.run(plan, settings, console)


@app.command()
def demo(
    home: Annotated[Path, typer.Option(help="Directory of its service.")] = Path("demo-home"),
) -> None:
    """Train SmolLM2 on the example data, and show base and tuned answers side by side."""
    with _reported():
        demo_command.run(Home(home), console)


@app.command()
def tune(  # noqa: PLR0913 (one argument for each option of the command)
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Training data.")],
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m-instruct",
    validation: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Held-out data.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=50)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=256)] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    rank: Annotated[int | None, typer.Option(min=1, max=256, help="LoRA rank.")] = None,
    precision: Annotated[str | None, typer.Option(help="nf4 (QLoRA), bf16 or fp32.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    watch: Annotated[bool, typer.Option(help="Show progress until the job ends.")] = True,
    home: HomeOption = None,
) -> None:
    """Upload FILE, train an adapter on it, and show the progress."""
    with _service(home) as client:
        request = tuning.Request(
            file,
            model,
            validation,
            suffix,
            epochs,
            batch_size,
            learning_rate,
            rank,
            precision,
            seed,
        )
        job = tuning.submit(client, request, console)
        if not watch:
            return
        _watch(client, job["id"])


def _watch(client: Client, job_id: str) -> None:
    try:
        job = tuning.watch(client, job_id, console)
    except KeyboardInterrupt:
        console.print(f"\nThe job goes on. See it again with 'tunery jobs watch {job_id}'.")
        return
    if job["status"] != JobStatus.SUCCEEDED:
        _give_up((job["error"] or {}).get("message") or f"The job ended as {job['status']}.")
    name = job["fine_tuned_model"]
    console.print(f"\n[bold]{name}[/bold] is ready.", highlight=False, soft_wrap=True)
    console.print(f"Try: tunery chat --model {name}", highlight=False, soft_wrap=True)


@jobs_app.callback(invoke_without_command=True)
def list_jobs(context: typer.Context, home: HomeOption = None, limit: int = 20) -> None:
    """List the newest jobs."""
    if context.invoked_subcommand is not None:
        return
    with _service(home) as client:
        table = Table("job", "status", "step", "model", "fine-tuned model")
        for job in client.get("/fine_tuning/jobs", limit=limit)["data"]:
            step = f"{job['step']}/{job['total_steps'] or '?'}"
            result = job["fine_tuned_model"] or (job["error"] or {}).get("code") or ""
            table.add_row(job["id"], job["status"], step, job["model"], result)
        console.print(table)


@jobs_app.command("show")
def show_job(job_id: str, home: HomeOption = None) -> None:
    """Print everything about one job as JSON."""
    with _service(home) as client:
        console.print_json(data=client.get(f"/fine_tuning/jobs/{job_id}"))


@jobs_app.command("watch")
def watch_job(job_id: str, home: HomeOption = None) -> None:
    """Show the progress of a job until it ends."""
    with _service(home) as client:
        _watch(client, job_id)


@jobs_app.command("cancel")
def cancel_job(job_id: str, home: HomeOption = None) -> None:
    """Cancel a job; a running one stops at its next step."""
    with _service(home) as client:
        job = client.post(f"/fine_tuning/jobs/{job_id}/cancel")
        ending = job["status"] == JobStatus.CANCELLED
        console.print("Cancelled." if ending else "The job stops at its next step.")


@jobs_app.command("rerun")
def rerun_job(job_id: str, home: HomeOption = None) -> None:
    """Submit a job once more, with the same files, seed and numbers."""
    with _service(home) as client:
        again = client.post(f"/fine_tuning/jobs/{job_id}/rerun")
        console.print(f"Job {again['id']}. See it with 'tunery jobs watch {again['id']}'.")


@app.command("diff")
def diff_jobs(first: str, second: str, home: HomeOption = None) -> None:
    """Show what two jobs differ in, and the metrics of their last checkpoints."""
    with _service(home) as client:
        rows = differences(*(_with_metrics(client, job_id) for job_id in (first, second)))
        table = Table("field", first, second)
        for name, one, other in rows:
            table.add_row(name, str(one), str(other))
        console.print(table if rows else "They differ in nothing.")


def _with_metrics(client: Client, job_id: str) -> JsonObject:
    job = client.get(f"/fine_tuning/jobs/{job_id}")
    newest = client.get(f"/fine_tuning/jobs/{job_id}/checkpoints", limit=1)["data"]
    return job | {"metrics": newest[0]["metrics"] if newest else None}


@models_app.callback(invoke_without_command=True)
def list_models(context: typer.Context, home: HomeOption = None) -> None:
    """List the models that can be called."""
    if context.invoked_subcommand is not None:
        return
    with _service(home) as client:
        table = Table("model", "base", "job")
        for model in client.get("/models")["data"]:
            table.add_row(model["id"], model["parent"] or "", model.get("job_id") or "")
        console.print(table)


@models_app.command("delete")
def delete_model(name: str, home: HomeOption = None) -> None:
    """Delete a fine-tuned model."""
    with _service(home) as client:
        client.delete(f"/models/{name}")
        console.print(f"Deleted {name}.", highlight=False)


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="One question; else a dialogue.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Any model of `tunery models`.")] = (
        "smollm2-135m-instruct"
    ),
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    home: HomeOption = None,
) -> None:
    """Talk to a base or a fine-tuned model."""
    with _service(home) as client:
        body = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        messages = [{"role": "system", "content": system}] if system else []
        if prompt is None:
            converse(client, body, messages, console)
        else:
            say(client, body, [*messages, {"role": "user", "content": prompt}], console)


@data_app.command("check")
def check_data(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Data file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as JSON.")] = False,
    shape: Annotated[str, typer.Option(help="What the rows are; detected if absent.")] = "",
    columns: Annotated[str, typer.Option(help="OURS=THEIRS,… e.g. messages=conversations.")] = "",
) -> None:
    """Find every fault of a data file, as a job would; exit status 1 if there is one."""
    options = [*(["--json"] if as_json else []), "--shape", shape, "--columns", columns]
    _become("worker.data", "check", *options, "--", str(file))


@data_app.command("preview")
def preview_data(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Data file.")],
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m-instruct",
    rows: Annotated[int, typer.Option(min=0, max=1000, help="How many rows to show.")] = 3,
    max_length: Annotated[int, typer.Option(min=1, help="Most tokens of a row.")] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show rows as a base model will see them: text, tokens, what is trained, statistics."""
    options = [*(["--json"] if as_json else []), "--model", model, "--rows", str(rows)]
    _become("worker.data", "preview", *options, "--max-length", str(max_length), "--", str(file))


@contextmanager
def _database(home: Path | None) -> Iterator[Database]:
    with _reported() as settings:
        here = Home(home or settings.client.home)
        embedded_one = home is not None or "database" not in settings.model_fields_set
        chosen = DatabaseSettings(url=here.database_url) if embedded_one else settings.database
        if embedded_one and not (here.path / "tunery.db").is_file():
            _give_up(f"There is no service in {here.path}; start it once with 'tunery up'.")
        database = Database(chosen)
        try:
            yield database
        finally:
            database.close()


@key_app.command("create")
def create_key(name: str, home: HomeOption = None) -> None:
    """Make a key named NAME; it is shown this once."""
    with _database(home) as database, database.write() as session:
        project = tenancy.default_project(session)
        key, secret = tenancy.create_key(session, project.id, name)
    console.print(f"{key.id}  {secret}", highlight=False, soft_wrap=True)


@key_app.command("list")
def list_keys(home: HomeOption = None) -> None:
    """List keys by their prefixes."""
    table = Table("id", "name", "key", "state")
    with _database(home) as database, database.read() as session:
        for key in tenancy.list_keys(session):
            state = "active" if key.revoked_at is None else "revoked"
            table.add_row(key.id, key.name, f"{key.prefix}…", state)
    console.print(table)


@key_app.command("revoke")
def revoke_key(key_id: str, home: HomeOption = None) -> None:
    """Make a key useless from now on."""
    with _database(home) as database, database.write() as session:
        tenancy.revoke_key(session, key_id)
    console.print(f"Revoked {key_id}.", highlight=False)


@app.command()
def api() -> None:
    """Run one API process (settings come from the environment)."""
    from api.app import create_app

    with _reported() as settings:
        configure_logging(settings.log_level, "api")
        uvicorn.run(
            create_app(settings),
            host=settings.api.host,
            port=settings.api.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=10,
        )


@app.command()
def worker() -> None:
    """Run one Celery worker with its training slots."""
    _become("worker")


@app.command()
def inference() -> None:
    """Run one inference server for one base model."""
    _become("worker.inference")


def _become(module: str, *arguments: str) -> NoReturn:
    """Replace this process, so that signals and exit status are the module's own."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


@app.command()
def migrate() -> None:
    """Bring the database to the newest revision."""
    with _reported() as settings:
        migrations.upgrade(settings.database.url)
        console.print("The database is at the newest revision.")
