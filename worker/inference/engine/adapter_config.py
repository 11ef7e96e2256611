"""A strict reader of ``adapter_config.json``: what it does not understand, it refuses.

Other servers drop what they do not know, and answer with a model that nobody trained. So every
key must be one that is served, one that cannot change a forward pass, or switched off.
"""

import json
from pathlib import Path
from typing import Any

from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.methods import METHODS
from worker.inference.engine.methods.base import Method

MAX_CONFIG_BYTES = 1024**2


def read_config(path: Path) -> Method:
    """Read and check an ``adapter_config.json``; raises `AdapterFormatError`."""
    config = _parse(path)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in METHODS:
        raise AdapterFormatError(
            "unsupported_method", f"peft_type is {kind!r}, not one of {', '.join(METHODS)}"
        )
    return METHODS[kind](config)


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterFormatError("bad_config", "adapter_config.json is larger than 1 MiB")
        config = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise AdapterFormatError("missing_file", "there is no adapter_config.json") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError("bad_config", f"adapter_config.json: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFormatError("bad_config", "adapter_config.json is not an object")
    return config


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")
