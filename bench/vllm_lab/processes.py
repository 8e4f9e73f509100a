# SPDX-License-Identifier: Apache-2.0
"""Processes of a group and kvbm's shared-memory names, as /proc and /dev/shm show them."""

from collections.abc import Iterable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
KVBM_PREFIX = "kvbm-"


def group_members(group: int) -> list[int]:
    """Ids of the live processes of a process group (zombies have ended and are left out)."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            status = (entry / "stat").read_text()
        except OSError:  # ended meanwhile
            continue
        # pid (name) state parent group ...; the name may hold spaces and parentheses
        state, _, process_group = status.rpartition(")")[2].split()[:3]
        if int(process_group) == group and state not in "ZX":
            members.append(int(entry.name))
    return members


def process_title(pid: int) -> str:
    """Command line of a process, where vLLM puts names such as VLLM::EngineCore; "" if it ended."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def mapped_kvbm_names(pids: Iterable[int | str]) -> tuple[str, ...]:
    """Names in /dev/shm that belong to kvbm and that any of these processes has mapped.

    A process is given by its id or as "self".
    """
    prefix = f"{SHARED_MEMORY}/{KVBM_PREFIX}"
    names = set()
    for pid in pids:
        try:
            maps = (Path("/proc") / str(pid) / "maps").read_text()
        except OSError:
            continue
        for line in maps.splitlines():
            path = line.partition("/")[1] + line.partition("/")[2]
            if path.startswith(prefix):
                names.add(path.removesuffix(" (deleted)").removeprefix(f"{SHARED_MEMORY}/"))
    return tuple(sorted(names))


def existing_names(names: Iterable[str]) -> list[str]:
    """Those of the names that are still there."""
    return [name for name in names if (SHARED_MEMORY / name).exists()]
