"""What every benchmark has: its two options, the machine that it ran on, figures as JSON."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path


def parse_options(description: str | None, **flags: str) -> argparse.Namespace:
    """Read ``--quick``, ``--json`` and a benchmark's own flags, with what each means."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small run, at most a minute")
    parser.add_argument("--json", action="store_true", help="print the figures as a last line")
    for flag, meaning in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    return parser.parse_args()


def print_figures(figures: object) -> None:
    """Print figures as one line of JSON."""
    sys.stdout.write(json.dumps(figures) + "\n")


def describe_machine() -> str:
    """Return one line: processor, cores that this process may use, memory."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
