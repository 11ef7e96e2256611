"""What this machine has: its devices and memory, without loading torch."""

import subprocess
from collections.abc import Iterator
from platform import processor

import psutil
import structlog

from models.domain.machine import Device, Machine

log = structlog.get_logger(__name__)

SECONDS = 10.0
_MIB = 1024**2
_QUERY = "--query-gpu=index,name,memory.total,memory.used"


def look() -> Machine:
    """Return the machine as it is now."""
    memory = psutil.virtual_memory()
    devices = tuple(read_devices(_ask_driver()))
    if not devices:
        cpu = Device(
            type="cpu",
            index=0,
            name=f"{psutil.cpu_count()} x {processor() or 'CPU'}",
            memory_total=memory.total,
            memory_used=memory.total - memory.available,
        )
        devices = (cpu,)
    return Machine(
        devices=devices,
        memory_total=memory.total,
        memory_available=memory.available,
        memory_used=_own_memory(),
    )


def _ask_driver() -> str:
    """Return what NVIDIA's driver says of its devices; nothing where there is no driver."""
    command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=True
        ).stdout
    except FileNotFoundError:
        return ""
    except subprocess.SubprocessError as error:
        log.warning("devices_unknown", error=str(error))
        return ""


def read_devices(table: str) -> Iterator[Device]:
    """Read the lines ``index, name, total MiB, used MiB``; a device that tells no memory has 0."""
    for line in filter(None, table.splitlines()):
        index, name, total, used = (part.strip() for part in line.split(","))
        yield Device(
            type="cuda",
            index=int(index),
            name=name,
            memory_total=_bytes(total),
            memory_used=_bytes(used),
        )


def _bytes(mebibytes: str) -> int:
    return int(mebibytes) * _MIB if mebibytes.isdigit() else 0


def _own_memory() -> int:
    """Return the resident bytes of this process and everything that it has started."""
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # ended since it was listed
    return total
