# SPDX-License-Identifier: Apache-2.0
"""Who may use a named object: its owner, the group that is named, and nobody who planted it."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm._fast.objects import SHARED_MEMORY, object_path, open_object
from tests.fast.instances import run_in_fork, unique_name

NOBODY = 65534
TEAM = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def name() -> Iterator[str]:
    """Name of an object; what is there is removed at the end."""
    one = unique_name()
    yield one
    path = object_path(one)
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def make(name: str, group: int | None = None) -> Path:
    """Make an object of our own."""
    os.close(open_object(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, group=group))
    return object_path(name)


def plant(name: str, mode: int, owner: int = NOBODY, group: int = NOBODY) -> Path:
    """Make a file as another user would."""
    path = object_path(name)
    path.write_bytes(b"planted")
    os.chown(path, owner, group)
    path.chmod(mode)
    return path


def refusal(
    name: str, flags: int = os.O_RDWR, group: int | None = None, *, trusted: bool = True
) -> str:
    """Why an object is not opened."""
    with pytest.raises(PermissionError) as caught:
        os.close(open_object(name, flags, group=group, trusted=trusted))
    assert caught.value.filename == name
    return str(caught.value.strerror)


def become(groups: list[int]) -> None:
    """Be nobody from here on, in a child of its own."""
    os.setgroups(groups)
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


# ---- mode, owner and group -----------------------------------------------------------------------
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_new_object_is_its_owners_alone_whatever_the_umask_is(name: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        state = make(name).stat()
    finally:
        os.umask(before)
    assert (stat.S_IMODE(state.st_mode), state.st_uid) == (0o600, os.geteuid())


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_with_a_group_it_is_the_groups_too_whatever_the_umask_is(name: str, umask: int) -> None:
    group = TEAM if os.geteuid() == 0 else os.getegid()
    before = os.umask(umask)
    try:
        state = make(name, group).stat()
    finally:
        os.umask(before)
    assert (stat.S_IMODE(state.st_mode), state.st_gid) == (0o660, group)


def test_an_object_of_our_own_is_given_to_a_group_that_is_named_later(name: str) -> None:
    path = make(name)
    os.close(open_object(name, group=os.getegid()))
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_a_reader_changes_no_permission(name: str) -> None:
    path = make(name)
    os.close(open_object(name, os.O_RDONLY, group=os.getegid()))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@as_root
def test_who_is_in_no_such_group_is_told_so(name: str) -> None:
    def check() -> None:
        become([])
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        assert f"user {NOBODY} is not in group {TEAM}" in refusal(name, flags, TEAM)

    run_in_fork(check)


# ---- objects of others ---------------------------------------------------------------------------
@as_root
def test_another_user_may_not_open_it_and_is_told_whose_it_is(name: str) -> None:
    make(name)

    def check() -> None:
        become([])
        for flags in (os.O_RDWR, os.O_RDONLY):
            assert f"belongs to user 0 and group {os.stat(object_path(name)).st_gid}" in refusal(
                name, flags, trusted=flags == os.O_RDWR
            )

    run_in_fork(check)


@as_root
def test_a_member_of_the_named_group_may_open_it_and_others_may_not(name: str) -> None:
    make(name, TEAM)

    def member() -> None:
        become([TEAM])
        os.close(open_object(name, group=TEAM))
        assert f"this process is user {NOBODY}" in refusal(name)

    def stranger() -> None:
        become([])
        assert "its mode is 660" in refusal(name, group=TEAM)

    run_in_fork(member)
    run_in_fork(stranger)


@as_root
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_what_another_user_planted_is_refused_also_by_root(name: str, mode: int) -> None:
    path = plant(name, mode)
    for flags in (os.O_RDWR, os.O_RDWR | os.O_CREAT):
        assert f"belongs to user {NOBODY} and group {NOBODY}" in refusal(name, flags)
        assert f"trusts group {TEAM}" in refusal(name, flags, TEAM)
    assert path.read_bytes() == b"planted"
    assert stat.S_IMODE(path.stat().st_mode) == mode


@as_root
def test_a_reader_may_look_at_what_another_user_has(name: str) -> None:
    plant(name, 0o600)
    descriptor = open_object(name, os.O_RDONLY, trusted=False)
    assert os.read(descriptor, 100) == b"planted"
    os.close(descriptor)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [(0o606, "its mode 606 lets everybody write"), (0o660, "its mode 660 lets group")],
)
def test_our_own_object_that_others_may_write_is_refused(name: str, mode: int, reason: str) -> None:
    make(name).chmod(mode)
    assert reason in refusal(name)


def test_a_name_without_an_object_is_not_found(name: str) -> None:
    for missing in (name, f"{name}/../kvbm", "/../etc/passwd"):
        with pytest.raises(FileNotFoundError, match=re.escape(missing)):
            open_object(missing)


# ---- what is no object ---------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["file", "nothing"])
@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY, os.O_RDWR | os.O_CREAT])
def test_a_symbolic_link_is_not_followed(
    name: str, tmp_path: Path, target: str, flags: int
) -> None:
    secret = tmp_path / "secret"
    if target == "file":
        secret.write_bytes(b"ours")
    object_path(name).symlink_to(secret)
    assert refusal(name, flags) == "it is a symbolic link"
    assert secret.exists() == (target == "file")


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY])
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket"])
def test_what_is_no_file_is_refused_at_once(name: str, kind: str, flags: int) -> None:
    path = object_path(name)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":  # opening it would wait for somebody at its other end
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    assert refusal(name, flags) == "it is no regular file"
    assert path.exists()


def test_an_object_is_where_posix_shared_memory_is() -> None:
    assert object_path("/kvbm-x") == SHARED_MEMORY / "kvbm-x" == Path("/dev/shm/kvbm-x")
