"""How much memory this process may still take, whoever limits it."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from worker.int8 import int8_bytes

_CGROUP = Path("/sys/fs/cgroup")
CACHE_SHARE = 0.25
"""Dequantised weights may take so much of the free memory."""

PASS_MARGIN = 2.0
"""A pass is known to fit where so many times what it should keep is free."""


@dataclass(frozen=True, slots=True)
class PassMemory:
    """What a training pass over `n_tokens`, the longest row having `longest`, kept, in bytes."""

    n_tokens: int
    longest: int
    n_bytes: int

    def leaves_room_for(self, lengths: Sequence[int], device: str) -> bool:
        """Tell whether a pass over rows of these lengths surely fits on `device` now.

        A pass keeps at most a·T + b·T·L bytes for T tokens, L in the longest row, so that it keeps
        at most (T / T₀)·(L / L₀) times what the measured one did, each factor being 1 or more.
        """
        larger = max(1.0, sum(lengths) / self.n_tokens) * max(1.0, max(lengths) / self.longest)
        return PASS_MARGIN * larger * self.n_bytes <= free_bytes(device)


def free_bytes(device: str = "cpu") -> int:
    """Return what can still be allocated: of the GPU, or of the machine, its cgroup and rlimits."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    own = psutil.Process().memory_info()
    limits = [psutil.virtual_memory().available]
    for kind, used in ((resource.RLIMIT_AS, own.vms), (resource.RLIMIT_DATA, own.rss)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(max(0, soft - used))
    group = _free_in_cgroup()
    return min(limits if group is None else [*limits, group])


def peak_bytes(device: str) -> int:
    """Return the most memory that this process has held: of the GPU, or of the machine."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _free_in_cgroup() -> int | None:
    """Return what the container's limit leaves (cgroup version 2), or None without one."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except OSError:
        return None  # no cgroup file system, or version 1
    return None if limit == "max" else max(0, int(limit) - used)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory could not be allocated."""
    # On a CPU torch raises a plain RuntimeError, recognisable by its text only.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def can_cache_weights(model: nn.Module, device: str) -> bool:
    """Tell whether the weights of `model` in 4 or 8 bits may be kept dequantised."""
    if torch.device(device).type != "cpu":
        return False  # a GPU dequantises faster than it reads memory, which is scarce there
    n_bytes = int8_bytes(model) + sum(
        2 * parameter.numel() * parameter.quant_state.dtype.itemsize
        for parameter in model.parameters()
        if hasattr(parameter, "quant_state")  # two weights a byte
    )
    return n_bytes <= CACHE_SHARE * free_bytes(device)
