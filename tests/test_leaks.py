# SPDX-License-Identifier: Apache-2.0
"""The checks that guard every other test can fail."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.leaks
from tests.leaks import SHM, Held, Snapshot, leaked, snapshot, wait_until


@pytest.fixture
def path() -> Iterator[Path]:
    """A name of kvbm in /dev/shm that does not exist yet and is removed afterwards."""
    path = SHM / f"kvbm-leaks-{os.getpid()}"
    yield path
    path.unlink(missing_ok=True)


def test_a_new_name_is_reported_until_it_is_removed(path: Path) -> None:
    before = snapshot()
    path.touch()
    assert leaked(before, Held(), settle_s=0) == [f"name in /dev/shm: {path.name}"]
    path.unlink()
    assert leaked(before, Held(), settle_s=0) == []


def test_a_held_name_is_not_reported(path: Path) -> None:
    before = snapshot()
    path.touch()
    assert leaked(before, Held(names={"kvbm-leaks-"}), settle_s=0) == []


def test_a_name_that_was_there_before_is_not_reported(path: Path) -> None:
    path.touch()
    assert leaked(snapshot(), Held(), settle_s=0) == []


def test_an_open_descriptor_is_reported_although_the_name_is_gone(path: Path) -> None:
    before = snapshot()
    with path.open("w"):
        path.unlink()
        assert leaked(before, Held(), settle_s=0) == [f"descriptor: {path.name}"]
    assert leaked(before, Held(), settle_s=0) == []


def test_a_mapping_is_reported_although_the_descriptor_is_closed(path: Path) -> None:
    before = snapshot()
    with path.open("w+b") as file:
        file.truncate(mmap.PAGESIZE)
        # Python's mmap keeps a descriptor of its own.
        mapping = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    path.unlink()
    expected = [f"descriptor: {path.name}", f"mapping: {path.name}"]
    assert leaked(before, Held(), settle_s=0) == expected
    mapping.close()
    assert leaked(before, Held(), settle_s=0) == []


@pytest.mark.parametrize(("name", "daemon"), [("other", False), ("kvbm-worker", True)])
def test_a_thread_is_reported_if_it_is_ours_or_no_daemon(name: str, daemon: bool) -> None:
    before = snapshot()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name=name, daemon=daemon)
    thread.start()
    try:
        assert leaked(before, Held(), settle_s=0) == [f"thread: {name} ({thread.ident})"]
        assert leaked(before, Held(threads={name}), settle_s=0) == []
    finally:
        stop.set()
        thread.join()
    assert leaked(before, Held(), settle_s=0) == []


def test_a_foreign_daemon_thread_is_not_reported() -> None:
    before = snapshot()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="other", daemon=True)
    thread.start()
    try:
        assert leaked(before, Held(), settle_s=0) == []
    finally:
        stop.set()
        thread.join()


def test_a_name_that_a_process_below_this_one_has_open_is_reported(path: Path) -> None:
    before = snapshot()
    code = f"f = open({str(path)!r}, 'w'); print(flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as child:
        child.stdout.readline()
        assert leaked(before, Held(), settle_s=0) == [f"name in /dev/shm: {path.name}"]
        child.communicate(b"\n")


def test_a_name_that_a_process_outside_the_tree_has_open_is_not_reported(path: Path) -> None:
    before = snapshot()
    go_read, go_write = os.pipe()
    ready_read, ready_write = os.pipe()
    code = (
        f"import os; f = open({str(path)!r}, 'w'); os.write({ready_write}, b'r'); "
        f"os.close({ready_write}); os.read({go_read}, 1)"
    )
    # The shell ends at once, so that its child gets another parent than this process.
    command = ["sh", "-c", '"$0" -c "$1" &', sys.executable, code]
    subprocess.run(command, pass_fds=[go_read, ready_write], check=True)
    os.close(ready_write)
    try:
        assert os.read(ready_read, 1) == b"r"
        assert leaked(before, Held(), settle_s=0) == []
    finally:
        for descriptor in (go_write, go_read, ready_read):
            os.close(descriptor)


def test_what_comes_and_goes_while_it_is_looked_for_is_no_leak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = iter([["a", "b"], ["b", "c"], ["c", "d"]])
    monkeypatch.setattr(tests.leaks, "_new", lambda *_: next(looks))
    assert leaked(Snapshot(), Held()) == []
    monkeypatch.setattr(tests.leaks, "_new", lambda *_: ["a", "b"])
    assert leaked(Snapshot(), Held(), settle_s=0) == ["a", "b"]


def test_wait_until_tells_whether_the_condition_came_true() -> None:
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers))
    assert not wait_until(lambda: False, timeout_s=0.05)
