# SPDX-License-Identifier: Apache-2.0
"""Remove what dead instances left in shared memory.

Only objects that nobody has open go, and the question is asked of the kernel, under the exclusive
locks (`kvbm.instance.remove_if_unused`). A private instance that nobody uses is left over by
definition; a named one is a warm cache that waits for its next engine, so it goes only when it is
named.
"""

from __future__ import annotations

from typing import NamedTuple

from kvbm._fast.locks import held_by_other
from kvbm._fast.segment import LOCK_USERS_OFFSET
from kvbm.errors import InspectError
from kvbm.inspect.capture import opened
from kvbm.instance import instances, is_private, remove_if_unused, reserved_bytes


class Leftover(NamedTuple):
    """An instance that nobody uses."""

    instance: str
    objects: list[str]
    bytes: int


def in_use(names: list[str]) -> bool:
    """Whether somebody has one of these objects open, or it cannot be asked."""
    for name in names:
        try:
            with opened(name) as fd:
                if held_by_other(fd, LOCK_USERS_OFFSET):
                    return True
        except FileNotFoundError:
            continue
        except (OSError, InspectError):
            return True
    return False


def leftovers(wanted: list[str]) -> list[Leftover]:
    """Private instances that nobody uses, or those of the wanted ones that nobody uses.

    Raises
    ------
    InspectError
        A wanted one is not there, or somebody uses it.
    """
    there = instances()
    for instance in wanted:
        if instance not in there:
            known = ", ".join(sorted(there)) or "none"
            raise InspectError(f"{instance} is no instance; instances on this host: {known}")
        if in_use(there[instance]):
            raise InspectError(f"{instance} is in use, or belongs to another user")
    chosen = wanted or [name for name in there if is_private(name) and not in_use(there[name])]
    return [Leftover(name, there[name], reserved_bytes(there[name])) for name in chosen]


def remove(found: list[Leftover]) -> tuple[list[Leftover], list[Leftover]]:
    """Remove them; what somebody began to use meanwhile stays.

    Returns
    -------
    removed, kept : list of Leftover
        What went and what stayed.
    """
    removed: list[Leftover] = []
    kept: list[Leftover] = []
    for one in found:
        (removed if remove_if_unused(one.instance) else kept).append(one)
    return removed, kept
