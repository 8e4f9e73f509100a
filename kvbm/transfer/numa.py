# SPDX-License-Identifier: Apache-2.0
"""Which processors are near a device, so that host memory for its copies is touched near it.

A page lies on the NUMA node of the thread that touches it first, unless a memory policy says
otherwise (numactl). A copy between a GPU and the memory of another socket crosses both sockets'
link. Threads are pinned rather than memory bound (mbind), which containers often forbid.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cpus_near", "parse_cpu_list"]

DEVICES = Path("/sys/bus/pci/devices")


def parse_cpu_list(text: str) -> frozenset[int]:
    """Read a list of processors as the kernel writes it: "0-3,8,10-11".

    Raises
    ------
    ValueError
        It is none.
    """
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def cpus_near(bus_id: str, devices: Path = DEVICES) -> frozenset[int]:
    """Processors near a PCI device that this process may use; none if unknown, or if all are.

    Parameters
    ----------
    bus_id
        As the device's driver writes it, "0000:3B:00.0".
    devices
        Where the system describes PCI devices.
    """
    try:
        near = parse_cpu_list((devices / bus_id.lower() / "local_cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()
    allowed = os.sched_getaffinity(0)
    return near & allowed if allowed - near else frozenset()
