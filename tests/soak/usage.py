# SPDX-License-Identifier: Apache-2.0
"""Memory, descriptors and threads of the engine's processes, as /proc shows them."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.vllm_lab.processes import group_members


@dataclass(frozen=True)
class Usage:
    """What all processes of an engine hold at one moment."""

    rss_bytes: int
    descriptors: int
    threads: int


def usage_of(pids: Iterable[int]) -> Usage:
    """Sum over processes."""
    rss = descriptors = threads = 0
    for pid in pids:
        process = Path("/proc") / str(pid)
        fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        rss += int(fields["VmRSS"].split()[0]) * 1024
        threads += int(fields["Threads"])
        descriptors += len(os.listdir(process / "fd"))
    return Usage(rss, descriptors, threads)


def engine_usage() -> Usage:
    """Of this process's group, which is the engine's.

    Garbage is collected first, and what malloc keeps for later is given back: tensors of all sizes
    make it grow for minutes, by tens of MiB, with nothing held.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return usage_of(group_members(os.getpgrp()))
