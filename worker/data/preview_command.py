"""``tunery data preview``: rows as a base model will see them, on this machine."""

import itertools
import sys
import tempfile
from pathlib import Path

import orjson
from rich.console import Console
from rich.text import Text

from models.errors import TuneryError
from models.settings import load_settings
from worker.data.lint import LintOptions, Outputs, lint
from worker.data.normalised import read_rows
from worker.data.preview import RowPreview, TokenStatistics, count_tokens, preview_row


def preview(
    path: Path, options: LintOptions, model: str, n_rows: int, max_length: int, *, as_json: bool
) -> int:
    """Print the first usable rows of a file and statistics of all; return the exit status."""
    from worker.base_models import load_tokenizer, materialise
    from worker.chat import ChatRenderer
    from worker.encode.by_form import FormRenderer

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.arrow"
        report = lint(path, options, Outputs(normalised=rows))
        if not report.n_valid_rows:
            sys.stderr.write("The file has no usable row; see 'tunery data check'.\n")
            return 1
        try:
            directory, _ = materialise(model, load_settings().models)
        except TuneryError as error:
            sys.stderr.write(f"{error.message}\n")
            return 1
        tokenizer = load_tokenizer(directory)
        renderer = FormRenderer(ChatRenderer(tokenizer))
        shown = [
            preview_row(line, row, renderer, tokenizer, max_length)
            for line, row in itertools.islice(read_rows(rows), n_rows)
        ]
        statistics = count_tokens(read_rows(rows), renderer, max_length)
    if as_json:
        whole = {
            "rows": [each.model_dump() for each in shown],
            "statistics": statistics.model_dump(mode="json"),
        }
        sys.stdout.buffer.write(orjson.dumps(whole) + b"\n")
    else:
        _show(shown, statistics, max_length, Console())
    return 0


def _show(
    shown: list[RowPreview], statistics: TokenStatistics, max_length: int, console: Console
) -> None:
    for row in shown:
        cut = f", cut to {max_length:,}" if row.truncated else ""
        counts = f"{row.n_tokens:,} tokens{cut}, {row.n_trained:,} trained"
        console.print(f"[bold]Line {row.line}[/bold]: {counts}", highlight=False)
        if row.fault:
            console.print(Text(row.fault, style="red"))
        text = Text()
        for span in row.spans:
            text.append(span.text, style="bold green" if span.trained else "dim")
        console.print(text)
        console.print()
    console.print(
        f"{statistics.n_rows:,} rows, {statistics.n_tokens:,} tokens, "
        f"{statistics.n_trained:,} of them trained; the longest row has {statistics.longest:,}; "
        f"{statistics.n_overlong:,} rows are over {max_length:,}, "
        f"{statistics.n_faulty:,} cannot be rendered.",
        highlight=False,
    )
    most = max(statistics.histogram.values(), default=1)
    for end, count in statistics.histogram.items():
        console.print(
            f"  ≤ {end:>7,} {'█' * max(1, 40 * count // most)} {count:,}", highlight=False
        )
