"""What a worker tells of its machine."""

from typing import Literal

from models.domain.base import Frozen


class Device(Frozen):
    """A GPU, or the machine's processors where it has none; memory in bytes."""

    type: Literal["cuda", "cpu"]
    index: int
    name: str
    memory_total: int
    memory_used: int


class Machine(Frozen):
    """A machine at one moment; `memory_used` is that of the worker and its trainers, in bytes."""

    devices: tuple[Device, ...]
    memory_total: int
    memory_available: int
    memory_used: int
