"""Where compiled loops are kept for later processes, and whether all are there; knows no torch."""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile

import xxhash

_COMPLETE = "complete"


@lru_cache(maxsize=1)
def folder() -> Path | None:
    """Return where loops of just these files are kept; None if they cannot be.

    Numba itself would look at the one file that a loop is in.
    """
    files = sorted(Path(__file__).parent.glob("*.py"))
    digest = xxhash.xxh64_hexdigest(b"".join(file.read_bytes() for file in files))
    for parent in (Path(__file__).parent / "__pycache__", Path("~/.cache/tunery/loops")):
        try:
            found = parent.expanduser() / digest
            found.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=found).close()
        except (OSError, RuntimeError):  # not to be written to; nobody's home
            continue
        return found
    return None


def is_complete() -> bool:
    """Tell whether compiling all loops would bring nothing: they are there, or cannot be kept."""
    found = folder()
    return found is None or (found / _COMPLETE).exists()


def mark_complete() -> None:
    """Say that all loops are there."""
    found = folder()
    if found is not None:
        (found / _COMPLETE).touch()
