"""The files of an adapter in PEFT's layout, and the digest that is its identity."""

import hashlib
from collections.abc import Iterable

from models.domain.reports import ManifestFile

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG, WEIGHTS)


def digest_of_files(files: Iterable[ManifestFile]) -> str:
    """Return the adapter's identity: sha256 over the lines ``name:sha256`` in order of the names.

    The first 40 hexadecimal digits are kept: 160 bits, the length of a git object name.
    """
    lines = "\n".join(f"{file.name}:{file.sha256}" for file in sorted(files, key=lambda f: f.name))
    return hashlib.sha256(lines.encode()).hexdigest()[:40]
