"""What vLLM can do of what adapters are: plain LoRA up to a rank, of modules that the base has."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from worker.adapter_format import ADAPTER_FILES
from worker.inference.engine.adapters import read_adapter
from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.methods.lora import LoraConfig
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.weights import AdapterWeights, BaseLinear

_PREFIX = ".vllm-"
_LOCK = ".lock"
_BYTES = 2
"""Of a number in a slot of vLLM's: it holds adapters in half precision."""


@dataclass(frozen=True, slots=True)
class ServedAdapter(AdapterWeights):
    """An adapter that vLLM holds: its weights are there, where each takes a slot of one size."""

    slot_bytes: int = 0

    @property
    def n_bytes(self) -> int:
        return self.slot_bytes


def slot_bytes(shapes: Mapping[str, ModuleShape], max_rank: int) -> int:
    """Return about how large one of vLLM's slots for adapters is."""
    linear = [shape for shape in shapes.values() if shape.kind == "linear" and not shape.is_output]
    return sum(_BYTES * max_rank * (each.in_features + each.out_features) for each in linear)


def check_adapter(
    directory: Path, digest: str, shapes: Mapping[str, ModuleShape], max_rank: int
) -> bool:
    """Read an adapter as strictly as our own engine does; return whether it changes the base.

    Raises:
        AdapterFormatError: its files break a rule, or it is more than vLLM can do.
    """
    stored = read_adapter(directory, digest, shapes)
    if not isinstance(stored.method, LoraConfig):
        raise AdapterFormatError("unsupported_by_vllm", "it is no LoRA; vLLM serves nothing else")
    if stored.method.use_dora:
        raise AdapterFormatError("unsupported_by_vllm", "it is a DoRA, which vLLM cannot serve")
    weights = stored.weights(_no_base)
    if weights.rank > max_rank:
        raise AdapterFormatError(
            "unsupported_by_vllm",
            f"it has rank {weights.rank}, and vLLM was started for ranks up to {max_rank} "
            "(TUNERY_INFERENCE__VLLM_MAX_LORA_RANK)",
        )
    return not all(change.changes_nothing() for change in weights.modules.values())


def _no_base(path: str) -> BaseLinear:
    raise AssertionError(f"A plain LoRA asked for the base's weight of {path!r}.")


class Links:
    """The files of loaded adapters under names that stay while vLLM may read them again.

    The cache of adapters drops its copies when it likes; these are hard links beside them, which
    cost no disk as long as the copy is there.

    Args:
        cache: The directory of the cache; the links must be on the same file system.
    """

    def __init__(self, cache: Path) -> None:
        cache = cache.expanduser().resolve()
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob(f"{_PREFIX}*"):
            _remove_if_abandoned(left)
        self._root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=cache))
        self._lock = _locked(self._root)

    def add(self, digest: str, directory: Path) -> Path:
        """Return the directory of an adapter for vLLM, with the files of `directory`."""
        target = self._root / digest
        self.remove(digest)
        target.mkdir()
        for name in ADAPTER_FILES:
            os.link(directory / name, target / name)
        return target

    def add_zero(self, name: str, shapes: Mapping[str, ModuleShape]) -> Path:
        """Write a LoRA that changes nothing; return its directory."""
        import torch
        from safetensors.torch import save_file

        path, shape = next((p, s) for p, s in shapes.items() if s.kind == "linear")
        target = self._root / name
        target.mkdir()
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [path]}
        (target / "adapter_config.json").write_text(json.dumps(config))
        key = f"base_model.model.{path}"
        tensors = {
            f"{key}.lora_A.weight": torch.zeros(1, shape.in_features),
            f"{key}.lora_B.weight": torch.zeros(shape.out_features, 1),
        }
        save_file(tensors, target / "adapter_model.safetensors")
        return target

    def remove(self, digest: str) -> None:
        shutil.rmtree(self._root / digest, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._lock.close()


def _locked(root: Path) -> IO[str]:
    lock = (root / _LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _remove_if_abandoned(root: Path) -> None:
    """Remove what a server left that was killed: the kernel has given its lock back."""
    try:
        lock = _locked(root)
    except (BlockingIOError, FileNotFoundError):
        return  # it lives, or has just gone
    with lock:
        shutil.rmtree(root, ignore_errors=True)
