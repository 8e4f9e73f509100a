# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import mmap
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.vllm_lab.processes import (
    KVBM_PREFIX,
    SHARED_MEMORY,
    existing_names,
    group_members,
    mapped_kvbm_names,
    process_title,
)


@pytest.fixture
def name() -> Iterator[str]:
    """A name of kvbm in /dev/shm with a file behind it."""
    path = Path(SHARED_MEMORY / f"{KVBM_PREFIX}test-{uuid.uuid4().hex}")
    path.write_bytes(bytes(mmap.PAGESIZE))
    yield path.name
    path.unlink(missing_ok=True)


def test_a_mapped_name_is_found_also_after_its_removal(name: str) -> None:
    assert name not in mapped_kvbm_names(["self"])
    path = SHARED_MEMORY / name
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert name in mapped_kvbm_names([os.getpid()])
        assert existing_names([name]) == [name]
        path.unlink()
        assert name in mapped_kvbm_names(["self"])
        assert existing_names([name]) == []


def test_a_group_has_its_live_members_only() -> None:
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        assert child.stdout.readline() == b"up\n"
        assert group_members(child.pid) == [child.pid]
        assert sys.executable in process_title(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and still a zombie
        assert group_members(child.pid) == []
        child.wait()
    assert process_title(child.pid) == ""
