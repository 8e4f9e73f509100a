# SPDX-License-Identifier: Apache-2.0
"""Waits in the package's sources that nothing bounds.

No wait is without a deadline, or the end of what it belongs to: a loop that sleeps looks at one, a
call that blocks gets one. What is left is listed here with what ends it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

BOUND = re.compile(r"deadline|until|waited|closing|stopping|monotonic")
BLOCKING = {"acquire", "get", "join", "wait"}
BLOCKING_CYTHON = re.compile(
    r"\b(usleep|nanosleep|pthread_cond_wait|doorbell_wait|kv_cpu_pause|sem_wait|\w+_synchronize)\("
)
DEFINITION = re.compile(r"\bcdef\b|^\s*void\b|^\s*int\b")

OWN_THREAD = "a thread of its own; whoever stops it wakes it"
BOUNDED = "bounded inside"
ENDED = {
    ("kvbm/_fast/cuda_backend.pyx", "stream_synchronize"): "at the end, when nothing is under way",
    ("kvbm/_fast/disk_backend.pyx", "pthread_cond_wait"): OWN_THREAD,
    ("kvbm/_fast/disk_batches.pyx", "pthread_cond_wait"): OWN_THREAD,
    ("kvbm/_fast/recovery.pyx", "kv_cpu_pause"): "INSIDE_SPINS",
    ("kvbm/_fast/worker_loop.pyx", "doorbell_wait"): "its argument: IDLE_WAIT_NS at most",
    ("kvbm/_fast/worker_loop.pyx", "usleep"): "timeout_ms of cancel_and_wait",
    ("kvbm/block_manager/manager.py", "leader.wait"): BOUNDED,
    ("kvbm/block_manager/pool.py", "self._lock.acquire"): "held for calls that are bounded",
    ("kvbm/inspect/serve.py", "thread.join"): "the server has been told to end",
    ("kvbm/leader/recorder.py", "self._events.get"): OWN_THREAD,
    ("kvbm/metrics/exporter.py", "self._thread.join"): "the server has been told to end",
    ("kvbm/standalone.py", "self.wait"): BOUNDED,
    ("kvbm/transfer/nixl.py", "time.sleep"): "a thread of its own; the leader gives the tier up",
}


def unbounded_waits(path: str, text: str) -> Iterator[str]:
    """Find the waits of one file that have no bound and are not listed."""
    found = python_waits(text) if path.endswith(".py") else cython_waits(text)
    for line, what in found:
        if (path, what) not in ENDED:
            yield f"{path}:{line}: {what} waits without a deadline"


def cython_waits(text: str) -> Iterator[tuple[int, str]]:
    """Calls that block, whatever their arguments."""
    for number, line in enumerate(text.splitlines(), 1):
        call = BLOCKING_CYTHON.search(line)
        if call is not None and DEFINITION.search(line) is None:
            yield number, call.group(1)


def python_waits(text: str) -> Iterator[tuple[int, str]]:
    """Calls that block without an argument, and loops that sleep and look at no bound."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in BLOCKING and not node.args and not node.keywords:
                yield node.lineno, ast.unparse(node.func)
        elif isinstance(node, ast.While) and BOUND.search(ast.unparse(node)) is None:
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "time.sleep":
                    yield call.lineno, "time.sleep"
