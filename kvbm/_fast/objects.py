# SPDX-License-Identifier: Apache-2.0
"""Opening shared files: only what belongs to us, whatever stands at the name.

Anybody may make a file in ``/dev/shm``. A name that somebody else has taken first, a symbolic link,
a pipe, or an object that others may write would hand them the KV of this engine's requests, or let
them put their own in its place. So an object is used only if

* it is a regular file, reached without a link;
* its owner is this process's user, or its group is the one that the settings name
  (``DYN_KVBM_SHM_GROUP``; giving a file to a group takes a member of it);
* nobody else may write it.

A slab of the disk tier, a file in a folder that others may be able to write to, is opened under the
same rules.

Who only reads (the viewer, `status` of the controller) may read whatever the system lets it read:
readers are safe against any content.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Literal

SHARED_MEMORY = Path("/dev/shm")
PRIVATE_MODE = 0o600
GROUP_MODE = 0o660


Fault = Literal["corrupt", "version", "not ready", "full", "closed"]


class SegmentFault(Exception):
    """An object in shared memory is not what it should be.

    Parameters
    ----------
    kind : {"corrupt", "version", "not ready", "full", "closed"}
        What is wrong.
    message : str
        The same for people.
    found : str
        For "version": the format of the object.
    """

    def __init__(self, kind: Fault, message: str, found: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.found = found


def object_path(name: str) -> Path:
    """Where the object of that name is; `name` has a leading slash and no other."""
    return SHARED_MEMORY / name.lstrip("/")


def open_object(
    name: str, flags: int = os.O_RDWR, *, group: int | None = None, trusted: bool = True
) -> int:
    """Open or, with `O_CREAT`, make an object.

    A new object is given mode 0600; with a group it gets that group and then mode 0660, also one
    that is there already and is our own.

    Parameters
    ----------
    name : str
        Name with its leading slash.
    flags : int
        As for `os.open`. Links are never followed, and the call never waits.
    group : int, optional
        Group id whose members are trusted.
    trusted : bool
        False: whoever owns it; for readers.

    Returns
    -------
    int
        Descriptor, closed on exec.

    Raises
    ------
    FileNotFoundError, FileExistsError
        There is none, or with `O_EXCL` one.
    PermissionError
        It is not ours; its `strerror` says why.
    OSError
        The system's own reason, e.g. a read-only file system.
    """
    if name.count("/") != 1:
        raise FileNotFoundError(errno.ENOENT, "there is no such shared memory", name)
    try:
        return open_file(object_path(name), name, flags, group=group, trusted=trusted)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "there is no such shared memory", name) from None
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "this shared memory exists", name) from None


def open_file(
    path: Path, name: str, flags: int, *, group: int | None = None, trusted: bool = True
) -> int:
    """Open or make a file under the same rules, wherever it is; errors call it `name`."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, PRIVATE_MODE)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise PermissionError(errno.EACCES, _why_not(path, group), name) from None
    try:
        state = os.fstat(fd)
        problem = _distrust(state, group) if trusted else _no_object(state)
        if problem is not None:
            raise PermissionError(errno.EACCES, problem, name)
        if group is not None and flags & os.O_ACCMODE == os.O_RDWR:
            _give_to(fd, state, group, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _give_to(fd: int, state: os.stat_result, group: int, name: str) -> None:
    """Let the members of a group use our own object: the group first, then its permission."""
    if state.st_uid != os.geteuid():
        return
    try:
        if state.st_gid != group:
            os.fchown(fd, -1, group)
        if stat.S_IMODE(state.st_mode) != GROUP_MODE:
            os.fchmod(fd, GROUP_MODE)
    except PermissionError:
        detail = f"user {os.geteuid()} is not in group {group}, which DYN_KVBM_SHM_GROUP names"
        raise PermissionError(errno.EPERM, detail, name) from None


def _no_object(state: os.stat_result) -> str | None:
    if stat.S_ISLNK(state.st_mode):
        return "it is a symbolic link"
    return None if stat.S_ISREG(state.st_mode) else "it is no regular file"


def _distrust(state: os.stat_result, group: int | None) -> str | None:
    """Why an object must not be used; None if it may."""
    problem = _no_object(state)
    if problem is not None:
        return problem
    mode = stat.S_IMODE(state.st_mode)
    if state.st_uid != os.geteuid() and (group is None or state.st_gid != group):
        trusted = "" if group is None else f" and trusts group {group}"
        return (
            f"it belongs to user {state.st_uid} and group {state.st_gid}, this process is user "
            f"{os.geteuid()}{trusted}"
        )
    if mode & stat.S_IWOTH:
        return f"its mode {mode:o} lets everybody write"
    if mode & stat.S_IWGRP and state.st_gid != group:
        return (
            f"its mode {mode:o} lets group {state.st_gid} write, which DYN_KVBM_SHM_GROUP does not "
            "name; name it, or remove the object"
        )
    return None


def _why_not(path: Path, group: int | None) -> str:
    """Why an object could not even be opened."""
    try:
        state = os.lstat(path)
    except FileNotFoundError:
        folder = os.stat(path.parent)
        return (
            f"user {os.geteuid()} may not make files in {path.parent}, which belongs to user "
            f"{folder.st_uid} and has mode {stat.S_IMODE(folder.st_mode):o}"
        )
    except OSError as error:
        return f"{path.parent}: {error.strerror}"
    return _distrust(state, group) or f"its mode is {stat.S_IMODE(state.st_mode):o}"
