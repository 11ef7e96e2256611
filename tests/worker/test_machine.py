"""A machine tells its devices and memory without torch."""

import psutil

from worker import machine


def test_this_machine_has_a_device_and_memory() -> None:
    found = machine.look()
    assert found.devices
    assert found.memory_total == psutil.virtual_memory().total
    assert 0 < found.memory_used < found.memory_total


def test_the_drivers_table_is_read() -> None:
    table = "0, NVIDIA H100 80GB HBM3, 81559, 1024\n1, NVIDIA GB10, [N/A], [N/A]\n"
    first, second = machine.read_devices(table)
    assert (first.index, first.name) == (0, "NVIDIA H100 80GB HBM3")
    assert (first.memory_total, first.memory_used) == (81559 * 1024**2, 1024**3)
    assert (second.index, second.memory_total) == (1, 0)
