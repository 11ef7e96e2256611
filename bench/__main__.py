"""``python -m bench``: list the benchmarks."""

import ast
import sys
from pathlib import Path


def listing(folder: Path) -> str:
    """Return one line for each benchmark in `folder`: how to run it, and what it measures."""
    lines = []
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_"):
            summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
            lines.append(f"python -m bench.{path.stem:<24} {summary}".rstrip())
    return "\n".join(lines or ["There are no benchmarks yet."]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(listing(Path(__file__).parent))
