"""The lint in a process of its own, with limits: a hostile file ends that process and nothing else.

``python -m worker.data.isolated`` reads one order as JSON and answers with one report. A Parquet
file of 3 kB can ask for terabytes, and a damaged one can crash the library that reads it; in the
worker's own process either would end every job on the machine.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import structlog
from pydantic import Field

from models.domain.base import Frozen
from models.domain.reports import DatasetReport
from models.processes import die_with_parent
from models.settings import child_environment
from worker.data.records import Fault

log = structlog.get_logger(__name__)

POLL_SECONDS = 10.0
OUT_OF_MEMORY = 77
# Threads reserve address space, which is what the limit counts.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
_WITHHELD = ("TUNERY_DATABASE__URL", "TUNERY_BROKER__URL", "TUNERY_INFERENCE__TOKEN")


class LintOrder(Frozen):
    """What to lint, how to read it, where to write, and with how much memory."""

    path: Path
    name: str = ""
    shape: str = ""
    columns: dict[str, str] = Field(default_factory=dict)
    normalised: Path | None = None
    findings: Path | None = None
    cleaned: Path | None = None
    memory_bytes: int = 2**31
    seconds: float = 3600


def lint_in_child(order: LintOrder, keep_alive: Callable[[], None]) -> DatasetReport:
    """Lint a file in a child process.

    Args:
        order: The file and the limits; a file that exceeds one is a faulty file (code
            ``invalid_file`` or ``lint_timeout``), not an error of the service.
        keep_alive: Called every `POLL_SECONDS`; what it raises ends the child.
    """
    environment = child_environment(_ENVIRONMENT, without=_WITHHELD)
    command = [sys.executable, "-m", "worker.data.isolated", str(os.getpid())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as child:
        try:
            report = _await(child, order, keep_alive)
        finally:
            child.kill()
    return report


def _await(
    child: "subprocess.Popen[bytes]", order: LintOrder, keep_alive: Callable[[], None]
) -> DatasetReport:
    request: bytes | None = order.model_dump_json().encode()
    deadline = time.monotonic() + order.seconds
    while True:
        try:
            answer, _ = child.communicate(request, timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            request = None  # sent already
            keep_alive()
            if time.monotonic() > deadline:
                return refusal(
                    "lint_timeout",
                    f"checking the file took longer than {order.seconds:,.0f} s.",
                    "Split it, or raise TUNERY_WORKER__LINT_SECONDS.",
                )
            continue
        break
    if child.returncode == 0:
        return DatasetReport.model_validate_json(answer)
    if child.returncode < 0 or child.returncode == OUT_OF_MEMORY:
        limit = order.memory_bytes // 2**20
        return refusal(
            "invalid_file",
            f"reading the file took more than {limit:,} MiB of memory or crashed the reader.",
            "It is damaged, or its columns are too large to be training data.",
        )
    log.error("lint_failed", exit_status=child.returncode)
    return refusal(
        "lint_failed",
        "the file could not be checked because of a fault of this service.",
        "The log of the worker has the reason; please report it.",
    )


def refusal(code: str, message: str, hint: str) -> DatasetReport:
    """Return the report on a file of which nothing could be read."""
    finding = Fault(code, message, hint=hint).finding(1)
    return DatasetReport(
        n_rows=0, n_valid_rows=0, n_findings=1, findings=[finding], counts={code: 1}
    )


def main() -> int:
    """Be the child: read an order, limit this process, answer with the report."""
    die_with_parent(int(sys.argv[1]))
    order = LintOrder.model_validate_json(sys.stdin.buffer.read())
    from worker.data.lint import LintOptions, Outputs, lint

    resource.setrlimit(resource.RLIMIT_AS, (order.memory_bytes, order.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    options = LintOptions(name=order.name, shape=order.shape, columns=order.columns)
    outputs = Outputs(order.normalised, order.findings, order.cleaned)
    try:
        report = lint(order.path, options, outputs)
    except MemoryError:
        return OUT_OF_MEMORY
    sys.stdout.write(report.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
