# SPDX-License-Identifier: Apache-2.0
"""Slabs: their size and life, what is adopted, what is refused and with which words."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import kvbm.tiers.disk
from kvbm.errors import SlabError
from kvbm.tiers.disk import (
    PAGE_BYTES,
    Slab,
    SlabFiles,
    SlabLayout,
    Superblock,
    raise_slab_epoch,
    read_slab,
    slab_path,
)
from tests.leaks import wait_until

WANTED = Superblock(0, 1, 40, 5000, b"f" * 32)


@pytest.fixture
def files(tmp_path: Path) -> SlabFiles:
    """Slabs in a folder that does not exist yet."""
    return SlabFiles(tmp_path / "cache" / "deep")


@pytest.fixture
def slab(files: SlabFiles) -> Iterator[Slab]:
    """A named slab."""
    made = Slab(files, WANTED, "disk")
    yield made
    made.close()


# ---- layout and superblock -----------------------------------------------------------------------
def test_parts_follow_each_other_on_whole_pages() -> None:
    layout = SlabLayout(40, 5000)
    assert (layout.stride, layout.table_offset, layout.data_offset) == (8192, 4096, 4096 + 8192)
    assert layout.total_bytes == layout.data_offset + 40 * layout.stride


def test_a_superblock_is_read_back() -> None:
    block = Superblock(3, 4, 2**31, 2**40, bytes(range(32)), 2**64 - 1, 2**32 - 1)
    page = block.pack()
    assert len(page) == PAGE_BYTES
    assert Superblock.unpack(page) == block


@pytest.mark.parametrize("at", [0, 8, 12, 20, 24, 32, 40, 48, 52, 83, 84, 91])
def test_a_damaged_superblock_is_none(at: int) -> None:
    page = bytearray(WANTED.pack())
    page[at] ^= 1
    assert Superblock.unpack(bytes(page)) is None


@pytest.mark.parametrize("page", [b"", b"\0" * PAGE_BYTES, WANTED.pack()[:60]])
def test_what_is_no_superblock_is_none(page: bytes) -> None:
    assert Superblock.unpack(page) is None


# ---- life ----------------------------------------------------------------------------------------
def test_a_slab_has_its_size_and_its_blocks_at_once(slab: Slab) -> None:
    assert slab.path is not None
    state = slab.path.stat()
    assert state.st_size == WANTED.layout.total_bytes
    assert state.st_blocks * 512 >= WANTED.layout.total_bytes
    assert state.st_mode & 0o777 == 0o600
    assert not slab.adopted
    assert slab.durable


def test_a_slab_that_fits_is_adopted_with_its_content(files: SlabFiles, slab: Slab) -> None:
    os.pwrite(slab.table_fd, b"here", slab.layout.data_offset)
    slab.close()
    again = Slab(files, replace(WANTED, nonce=5, epoch=9), "disk")
    assert again.adopted
    assert again.superblock == slab.superblock
    assert os.pread(again.table_fd, 4, again.layout.data_offset) == b"here"
    again.close()


@pytest.mark.parametrize(
    "wanted",
    [
        replace(WANTED, fingerprint=b"g" * 32),
        replace(WANTED, slots=41),
        replace(WANTED, payload_bytes=5001),
        replace(WANTED, ranks=2),
    ],
)
def test_other_content_is_replaced_by_zeros(
    files: SlabFiles, slab: Slab, wanted: Superblock
) -> None:
    os.pwrite(slab.table_fd, b"here", slab.layout.data_offset)
    slab.close()
    again = Slab(files, wanted, "disk")
    assert not again.adopted
    assert again.superblock.nonce != slab.superblock.nonce
    assert os.pread(again.table_fd, 4, again.layout.data_offset) == bytes(4)
    again.close()


def test_other_content_that_somebody_uses_is_left_alone(files: SlabFiles, slab: Slab) -> None:
    with pytest.raises(SlabError, match="another engine uses it"):
        Slab(files, replace(WANTED, slots=41), "disk")
    again = Slab(files, WANTED, "disk")
    assert again.superblock == slab.superblock
    again.close()


def test_a_truncated_slab_starts_clean(files: SlabFiles, slab: Slab) -> None:
    os.ftruncate(slab.table_fd, WANTED.layout.total_bytes - 1)
    slab.close()
    again = Slab(files, WANTED, "disk")
    assert not again.adopted
    again.close()


def test_a_crash_before_the_superblock_leaves_nothing_to_adopt(
    files: SlabFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Slab) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Slab, "_write_superblock", killed)
        with pytest.raises(KeyboardInterrupt):
            Slab(files, WANTED, "disk")
    assert read_slab(slab_path(files.folder, "disk", 0)) is None
    again = Slab(files, WANTED, "disk")
    assert not again.adopted
    again.close()


def test_a_private_slab_has_no_name(files: SlabFiles) -> None:
    slab = Slab(files, WANTED)
    assert list(files.folder.iterdir()) == []
    assert not slab.durable
    assert os.fstat(slab.table_fd).st_size == WANTED.layout.total_bytes
    # NVIDIA's cuFile refuses a descriptor that was opened so.
    assert fcntl.fcntl(slab.data_fd, fcntl.F_GETFL) & os.O_TMPFILE != os.O_TMPFILE
    slab.close()
    slab.close()


def test_without_nameless_files_the_name_goes_at_once(
    files: SlabFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: object, flags: int, *more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing)
    slab = Slab(files, WANTED)
    assert list(files.folder.iterdir()) == []
    slab.close()


def test_a_killed_process_leaves_no_private_slab(files: SlabFiles) -> None:
    code = f"""
        import sys, time
        from pathlib import Path
        from kvbm.tiers.disk import Slab, SlabFiles, Superblock
        slab = Slab(SlabFiles(Path({str(files.folder)!r})), Superblock(0, 1, 4000, 5000, b"f" * 32))
        print("open", flush=True)
        sys.stdin.read()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "open\n"
    before = os.statvfs(files.folder).f_bavail
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert list(files.folder.iterdir()) == []
    blocks = 30_000_000 // os.statvfs(files.folder).f_frsize
    assert wait_until(lambda: os.statvfs(files.folder).f_bavail >= before + blocks)


# ---- room ----------------------------------------------------------------------------------------
def refuse_allocation(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make every reservation of space fail."""
    monkeypatch.setattr(kvbm.tiers.disk, "allocate_file", lambda _fd, _count: number)


@pytest.mark.parametrize("instance", [None, "disk"])
def test_a_full_disk_is_refused_with_the_numbers(
    files: SlabFiles, monkeypatch: pytest.MonkeyPatch, instance: str | None
) -> None:
    refuse_allocation(monkeypatch, errno.ENOSPC)
    with pytest.raises(SlabError, match=rf"{WANTED.layout.total_bytes} bytes .*do not fit"):
        Slab(files, WANTED, instance)
    assert list(files.folder.iterdir()) == []


def test_zeros_are_written_only_where_that_is_asked_for(
    files: SlabFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_allocation(monkeypatch, errno.EOPNOTSUPP)
    with pytest.raises(SlabError, match="DYN_KVBM_DISK_ZEROFILL_FALLBACK"):
        Slab(files, WANTED, "disk")
    monkeypatch.setattr(kvbm.tiers.disk, "ZERO_BYTES", 10_000)
    slab = Slab(replace(files, zerofill=True), WANTED, "disk")
    state = os.fstat(slab.table_fd)
    assert state.st_size == WANTED.layout.total_bytes
    assert state.st_blocks * 512 >= state.st_size
    slab.close()


def test_writing_zeros_can_be_stopped(files: SlabFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_allocation(monkeypatch, errno.EOPNOTSUPP)
    with pytest.raises(SlabError, match="stopped"):
        Slab(replace(files, zerofill=True), WANTED, "disk", lambda: True)
    assert list(files.folder.iterdir()) == []


def test_a_limit_on_file_sizes_is_an_error_with_its_reason(files: SlabFiles) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SlabError, match="File too large"):
            Slab(files, WANTED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SlabError, match="cannot be used"):
        Slab(SlabFiles(tmp_path / "file"), WANTED)


# ---- O_DIRECT ------------------------------------------------------------------------------------
@pytest.mark.parametrize("open_direct", [False, True])
def test_data_go_past_the_page_cache_and_headers_through_it(
    files: SlabFiles, open_direct: bool, flags_of: Callable[[int], int]
) -> None:
    slab = Slab(replace(files, open_direct=open_direct), WANTED)
    assert flags_of(slab.data_fd) & os.O_DIRECT
    assert not flags_of(slab.table_fd) & os.O_DIRECT
    assert slab.alignment in (512, 4096)
    slab.close()


def test_direct_io_can_be_turned_off(files: SlabFiles, flags_of: Callable[[int], int]) -> None:
    slab = Slab(replace(files, direct=False, open_direct=True), WANTED)
    assert not flags_of(slab.data_fd) & os.O_DIRECT
    assert slab.alignment == 1
    slab.close()


@pytest.fixture
def flags_of() -> Callable[[int], int]:
    """Flags of an open file."""
    import fcntl

    return lambda fd: fcntl.fcntl(fd, fcntl.F_GETFL)


def test_a_file_system_without_direct_io_is_refused_with_both_ways_out(
    files: SlabFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kvbm.tiers.disk.fcntl.fcntl

    def refusing(fd: int, command: int, *more: int) -> int:
        if more and more[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, *more)

    monkeypatch.setattr(kvbm.tiers.disk.fcntl, "fcntl", refusing)
    with pytest.raises(SlabError, match=r"(?s)open-direct.*DISABLE_O_DIRECT"):
        Slab(files, WANTED)


def test_a_device_that_needs_more_than_pages_is_refused(
    files: SlabFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "preadv", refusing)
    with pytest.raises(SlabError, match="whole pages"):
        Slab(files, WANTED)


# ---- reading from outside ------------------------------------------------------------------------
def test_a_new_slab_has_no_blocks(slab: Slab) -> None:
    assert slab.path is not None
    found = read_slab(slab.path)
    assert found is not None
    assert found[0] == slab.superblock
    assert len(found[1]) == 0


def test_what_is_no_slab_is_none(tmp_path: Path) -> None:
    assert read_slab(tmp_path / "missing") is None
    (tmp_path / "short").write_bytes(b"short")
    assert read_slab(tmp_path / "short") is None
    (tmp_path / "cut").write_bytes(WANTED.pack())
    assert read_slab(tmp_path / "cut") is None


# ---- whose it is ---------------------------------------------------------------------------------
def plant(path: Path, kind: str) -> None:
    """Put something that is not ours, or no file, where a slab is to be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":  # opening it would wait for somebody at its other end
        os.mkfifo(path)
    elif kind == "link":
        (path.parent / "target").write_bytes(WANTED.pack())
        path.symlink_to(path.parent / "target")
    else:
        path.write_bytes(WANTED.pack())
        if kind == "stranger":
            os.chown(path, 65534, 65534)
        path.chmod(0o666 if kind == "everybody" else 0o600)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("folder", "it is no regular file"),
        ("pipe", "it is no regular file"),
        ("link", "it is a symbolic link"),
        ("everybody", "its mode 666 lets everybody write"),
        pytest.param(
            "stranger",
            "it belongs to user 65534",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away"),
        ),
    ],
)
def test_what_is_not_ours_is_neither_used_nor_changed(
    files: SlabFiles, kind: str, reason: str
) -> None:
    path = slab_path(files.folder, "disk", 0)
    plant(path, kind)
    before = path.lstat()
    for use in (
        lambda: Slab(files, WANTED, "disk"),
        lambda: read_slab(path),
        lambda: raise_slab_epoch(path, 5),
    ):
        with pytest.raises((SlabError, PermissionError), match=reason):
            use()
    after = path.lstat()
    assert (after.st_mode, after.st_size, after.st_mtime_ns) == (
        before.st_mode,
        before.st_size,
        before.st_mtime_ns,
    )
    if kind == "link":
        assert (path.parent / "target").read_bytes() == WANTED.pack()


def test_with_a_group_a_slab_is_the_groups_too(files: SlabFiles) -> None:
    shared = replace(files, group=os.getegid())
    one = Slab(shared, WANTED, "disk")
    assert one.path is not None
    state = one.path.stat()
    assert (stat.S_IMODE(state.st_mode), state.st_gid) == (0o660, os.getegid())
    one.close()
    assert read_slab(one.path, os.getegid()) is not None
    with pytest.raises(SlabError, match="which DYN_KVBM_SHM_GROUP does not name"):
        read_slab(one.path)


def test_an_epoch_only_grows(slab: Slab) -> None:
    assert slab.path is not None
    for epoch, expected in ((3, 3), (2, 3), (4, 4)):
        raise_slab_epoch(slab.path, epoch)
        found = read_slab(slab.path)
        assert found is not None
        assert found[0].epoch == expected
        assert found[0].nonce == slab.superblock.nonce
