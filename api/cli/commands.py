"""Every command of ``tunery`` and its options; the work is in the modules beside this one."""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
import uvicorn
from rich.table import Table

from api.cli import demo as demo_command
from api.cli import migrate as migrations
from api.cli import tune as tuning
from api.cli import up as embedded
from api.cli.adapter_commands import adapters_app
from api.cli.chat import converse, say
from api.cli.common import HomeOption, console, errors, reported, service
from api.cli.estimate import show, wait_for_estimate
from api.cli.home import Home
from api.cli.job_commands import diff_jobs, jobs_app, watch_to_end
from api.cli.methods import list_methods
from api.cli.operations import drain_worker, list_workers, show_audit_log, show_usage
from api.cli.sweep_commands import compare, sweep
from api.cli.tenancy import key_app, project_app
from models.logs import configure_logging

app = typer.Typer(
    help="Train adapters on your own machines and call them by name.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="List base and fine-tuned models, delete fine-tuned ones.")
data_app = typer.Typer(help="Check data files; no service is needed.", no_args_is_help=True)
app.add_typer(jobs_app, name="jobs")
app.command("diff")(diff_jobs)
app.command("methods")(list_methods)
app.add_typer(models_app, name="models")
app.add_typer(adapters_app, name="adapters")
app.add_typer(data_app, name="data")
app.add_typer(key_app, name="key")
app.add_typer(project_app, name="project")
app.command("workers")(list_workers)
app.command("drain")(drain_worker)
app.command("sweep")(sweep)
app.command("compare")(compare)
app.command("usage")(show_usage)
app.command("audit")(show_audit_log)


TrainingArgument = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="Training data.")
]
ValidationOption = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="Held-out data.")
]
BaseOption = Annotated[str, typer.Option(help="Base model.")]
EpochsOption = Annotated[int | None, typer.Option(min=1, max=50)]
BatchOption = Annotated[int | None, typer.Option(min=1, max=256)]
RankOption = Annotated[int | None, typer.Option(min=1, max=256, help="LoRA rank.")]
PrecisionOption = Annotated[str | None, typer.Option(help="nf4 (QLoRA), int8, bf16 or fp32.")]


@app.command()
def up(
    home: HomeOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8470,
    model: Annotated[
        list[str] | None, typer.Option(help="Base model to answer from; may be repeated.")
    ] = None,
) -> None:
    """Run the whole service on this machine: broker, API, worker, inference server."""
    with reported() as settings:
        plan = embedded.Plan(
            Home(home or settings.client.home), port, model or [settings.inference.model]
        )
        embedded.run(plan, settings, console)


@app.command()
def demo(
    home: Annotated[Path, typer.Option(help="Directory of its service.")] = Path("demo-home"),
) -> None:
    """Train SmolLM2 on the example data, and show base and tuned answers side by side."""
    with reported():
        demo_command.run(Home(home), console)


@app.command()
def tune(  # noqa: PLR0913 (one argument for each option of the command)
    file: TrainingArgument,
    model: BaseOption = "smollm2-135m-instruct",
    validation: ValidationOption = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name.")] = None,
    epochs: EpochsOption = None,
    batch_size: BatchOption = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    rank: RankOption = None,
    precision: PrecisionOption = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    watch: Annotated[bool, typer.Option(help="Show progress until the job ends.")] = True,
    home: HomeOption = None,
) -> None:
    """Upload FILE, train an adapter on it, and show the progress."""
    with service(home) as client:
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
        watch_to_end(client, job["id"])


@app.command("estimate")
def estimate_job(  # noqa: PLR0913 (one argument for each option of the command)
    file: TrainingArgument,
    model: BaseOption = "smollm2-135m-instruct",
    validation: ValidationOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchOption = None,
    rank: RankOption = None,
    precision: PrecisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    home: HomeOption = None,
) -> None:
    """Upload FILE and tell what training on it would take: time, memory, tokens, disk."""
    with service(home) as client:
        request = tuning.Request(
            file,
            model,
            validation,
            epochs=epochs,
            batch_size=batch_size,
            rank=rank,
            precision=precision,
        )
        told = errors if as_json else console
        found = wait_for_estimate(client, tuning.job_body(client, request, told), told)
        if as_json:
            console.print_json(data=found)
        else:
            show(found, console)


@models_app.callback(invoke_without_command=True)
def list_models(context: typer.Context, home: HomeOption = None) -> None:
    """List the models that can be called."""
    if context.invoked_subcommand is not None:
        return
    with service(home) as client:
        table = Table("model", "base", "job")
        for model in client.get("/models")["data"]:
            table.add_row(model["id"], model["parent"] or "", model.get("job_id") or "")
        console.print(table)


@models_app.command("delete")
def delete_model(name: str, home: HomeOption = None) -> None:
    """Delete a fine-tuned model."""
    with service(home) as client:
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
    with service(home) as client:
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


@app.command()
def api() -> None:
    """Run one API process (settings come from the environment)."""
    from api.app import create_app
    from api.cli.server import serve

    with reported() as settings:
        configure_logging(settings.log_level, "api")
        config = uvicorn.Config(
            create_app(settings),
            host=settings.api.host,
            port=settings.api.port,
            root_path=settings.api.root_path,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=10,
        )
        serve(config)


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
    with reported() as settings:
        migrations.upgrade(settings.database.url)
        console.print("The database is at the newest revision.")
