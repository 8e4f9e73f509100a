# SPDX-License-Identifier: Apache-2.0
"""What a test may leave behind: nothing. Snapshots of what a process holds, and their difference.

A snapshot has the names of kvbm in /dev/shm, the threads of this process that are kvbm's or would
keep it alive, and its descriptors and mappings of kvbm's objects. Other processes on the machine
may use kvbm at the same time: a name that a process outside this one's tree has open is theirs.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SHM = Path("/dev/shm")
PREFIX = "kvbm-"
SETTLE_S = 10.0  # paid only where something is left; a loaded machine ends threads late
POLL_S = 0.01


@dataclass
class Snapshot:
    """What this process and /dev/shm hold at one moment; counts, since an object may be held twice.

    Attributes
    ----------
    names
        Names in /dev/shm that begin with ``kvbm-``.
    threads
        Threads that are not daemons or whose name begins with ``kvbm``, by name and identity.
    descriptors
        Targets of the open descriptors that are such names (also after their removal).
    mappings
        The same for mapped files.
    """

    names: Counter[str] = field(default_factory=Counter)
    threads: Counter[str] = field(default_factory=Counter)
    descriptors: Counter[str] = field(default_factory=Counter)
    mappings: Counter[str] = field(default_factory=Counter)


@dataclass
class Held:
    """What fixtures of a wider scope than one test hold on purpose, by prefix of the name.

    A session-scoped engine registers here what a test may see appear; the check at the end of the
    session does not look at it, so that it must be gone by then.
    """

    names: set[str] = field(default_factory=set)
    threads: set[str] = field(default_factory=set)


def snapshot() -> Snapshot:
    """Return what is held now."""
    return Snapshot(
        Counter(path.name for path in SHM.glob(f"{PREFIX}*")),
        Counter(_threads()),
        Counter(_descriptors("self")),
        Counter(_mappings("self")),
    )


def _threads() -> Iterator[str]:
    known = set()
    for thread in threading.enumerate():
        known.add(thread.native_id)
        if thread is not threading.main_thread() and (
            not thread.daemon or thread.name.startswith("kvbm")
        ):
            yield f"{thread.name} ({thread.ident})"
    # Threads that were started without the interpreter have only the name that the kernel knows.
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except OSError:
            continue  # it ended meanwhile
        if int(task.name) not in known and name.startswith("kvbm"):
            yield f"{name} (native {task.name})"


def _object_name(target: str) -> str | None:
    """Return the name in /dev/shm that a link or a line of maps ends with, if it is of kvbm."""
    _, found, name = target.partition(f"{SHM}/{PREFIX}")
    return PREFIX + name.removesuffix(" (deleted)") if found else None


def _descriptors(process: str) -> Iterator[str]:
    try:
        entries = list(os.scandir(f"/proc/{process}/fd"))
    except OSError:
        return  # not ours to read, or gone
    for entry in entries:
        try:
            name = _object_name(os.readlink(entry.path))
        except OSError:
            continue
        if name is not None:
            yield name


def _mappings(process: str) -> Iterator[str]:
    try:
        text = Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return
    if PREFIX in text:
        yield from filter(None, map(_object_name, text.splitlines()))


def _descendants() -> set[int]:
    """Return the ids of this process and of all processes below it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.name)] = int(fields[1])
    found = {os.getpid()}
    while True:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return found
        found |= more


def _used_by_others() -> set[str]:
    """Return the names that processes outside this one's tree have open or mapped."""
    own = _descendants()
    used: set[str] = set()
    for path in Path("/proc").glob("[0-9]*"):
        if int(path.name) not in own:
            used.update(_descriptors(path.name), _mappings(path.name))
    return used


def _not_held(names: Iterable[str], prefixes: set[str]) -> list[str]:
    return [name for name in names if not name.startswith(tuple(prefixes))]


def _new(before: Snapshot, held: Held) -> list[str]:
    now = snapshot()
    names = _not_held(now.names - before.names, held.names)
    if names:
        others = _used_by_others()
        names = [name for name in names if name not in others and (SHM / name).exists()]
    kinds = {
        "name in /dev/shm": names,
        "thread": _not_held(now.threads - before.threads, held.threads),
        "descriptor": _not_held(now.descriptors - before.descriptors, held.names),
        "mapping": _not_held(now.mappings - before.mappings, held.names),
    }
    return [f"{kind}: {name}" for kind, found in kinds.items() for name in sorted(found)]


def leaked(before: Snapshot, held: Held, settle_s: float = SETTLE_S) -> list[str]:
    """Return a line for each thing that is there now and was not in ``before``.

    What is only late (a thread that is ending, an object in a reference cycle) gets ``settle_s``
    seconds and a last look.
    """
    found = _new(before, held)
    if not found:
        return []
    gc.collect()

    def gone() -> bool:
        """What is left is seen at each look; other suites on the machine come and go."""
        now = _new(before, held)
        found[:] = [line for line in found if line in now]
        return not found

    if not wait_until(gone, settle_s):
        gone()
    return found


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> bool:
    """Poll ``condition`` until it holds; return whether it did within ``timeout_s`` seconds."""
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause.wait(POLL_S)
    return True
