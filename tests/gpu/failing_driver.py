# SPDX-License-Identifier: Apache-2.0
"""Compile and load ``failing_driver.c``: the real driver, whose functions fail on request."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
BUILD = SOURCE.parent.parent.parent / "build" / "failing_driver"
KINDS = ("copy", "wait", "query")


def library() -> Path:
    """Return the library's path; compiled if it is not there yet."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    target = BUILD / f"{digest[:16]}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        draft = target.with_suffix(f".{os.getpid()}")
        command = ["cc", "-std=gnu11", "-O1", "-Wall", "-shared", "-fPIC", "-pthread", "-o"]
        subprocess.run([*command, str(draft), str(SOURCE), "-ldl"], check=True)
        draft.rename(target)
    return target


class FailingDriver:
    """What this process's copy of the library does."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(library()))

    def fail(self, kind: str, times: int) -> None:
        """Let the next `times` calls of one of `KINDS` fail; 0 for none."""
        if self._library.failing_arm(kind.encode(), times) != 0:
            raise ValueError(f"kind {kind!r} is not one of {KINDS}")

    @property
    def left(self) -> int:
        """Failures that have not happened yet."""
        return int(self._library.failing_left())
