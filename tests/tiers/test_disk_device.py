# SPDX-License-Identifier: Apache-2.0
"""The device under a folder, on a made-up sysfs: found, read, or said why not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kvbm.tiers import disk_device
from kvbm.tiers.disk_device import DiskDevice, device_of, parse_smart_log

STAT = "  100 2 800 30 5 6 4096 7 0 8 9 0 0 0 0 0 0"


def smart_log(used: int = 7, spare: int = 98, units: int = 10, errors: int = 3) -> bytes:
    """Log page 02h with numbers of more than eight bytes where there is room for them."""
    page = bytearray(512)
    page[3], page[4], page[5] = spare, 10, used
    page[48:64] = units.to_bytes(16, "little")
    page[160:176] = errors.to_bytes(16, "little")
    return bytes(page)


class Machine:
    """A sysfs with an NVMe drive of two partitions, and what is made of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[Path] = []
        self.pages: dict[str, bytes | OSError] = {}

    def drive(self, name: str, controller: str | None = None, **files: str) -> Path:
        """Add a drive; its controller is in `device`."""
        parent = self.root / "devices" / "pci" / (controller or "ata1")
        disk = parent / name
        (disk / "queue").mkdir(parents=True)
        (disk / "queue" / "rotational").write_text(files.get("rotational", "0"))
        (disk / "stat").write_text(files.get("stat", STAT))
        (parent / "model").write_text(files.get("model", "A Drive  \n"))
        (disk / "device").symlink_to(parent)
        return disk

    def partition(self, disk: Path, number: int) -> Path:
        """Add a partition."""
        made = disk / f"{disk.name}p{number}"
        made.mkdir()
        (made / "partition").write_text(str(number))
        return made

    def stacked(self, name: str, *parts: Path) -> Path:
        """Add a device that is made of others."""
        disk = self.root / "devices" / "virtual" / name
        (disk / "slaves").mkdir(parents=True)
        (disk / "stat").write_text(STAT.replace("4096", "8"))
        for part in parts:
            (disk / "slaves" / part.name).symlink_to(part)
        return disk

    def mount(self, path: Path, device: Path) -> None:
        """Let the file system of a path be on a device."""
        number = os.stat(path).st_dev
        link = self.root / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(device)

    def ask(self, controller: Path) -> bytes:
        """Answer as a controller."""
        self.asked.append(controller)
        page = self.pages[controller.name]
        if isinstance(page, OSError):
            raise page
        return page

    def look(self, path: Path) -> DiskDevice:
        """What is found."""
        return device_of(path, sysfs=self.root, dev=Path("/dev"), ask=self.ask)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """An empty machine."""
    return Machine(tmp_path / "sys")


# ---- the log page --------------------------------------------------------------------------------
def test_the_fields_of_a_log_page_are_those_of_the_specification() -> None:
    found = parse_smart_log(smart_log(7, 98, 2**70, 3))
    assert found == (0.07, 0.98, 2**70 * 512_000, 3)


def test_more_than_the_life_that_was_promised_can_be_used() -> None:
    assert parse_smart_log(smart_log(used=255)).wear == 2.55


@pytest.mark.parametrize("page", [b"", bytes(512), smart_log()[:511]], ids=len)
def test_what_is_no_log_page_is_refused(page: bytes) -> None:
    with pytest.raises(ValueError, match="no SMART log"):
        parse_smart_log(page)


def test_the_command_is_get_log_page_of_all_namespaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def ioctl(fd: int, request: int, command: bytearray) -> int:
        sent.append((request, disk_device._COMMAND.unpack(command)))
        return 0

    monkeypatch.setattr("kvbm.tiers.disk_device.fcntl.ioctl", ioctl)
    (tmp_path / "nvme0").write_bytes(b"")
    assert disk_device.read_smart_log(tmp_path / "nvme0") == bytes(512)
    request, fields = sent[0]
    assert request == (3 << 30) | (72 << 16) | (ord("N") << 8) | 0x41
    assert disk_device._COMMAND.size == 72
    assert fields[0] == 0x02
    assert fields[3] == 0xFFFFFFFF
    assert fields[9] == 512
    assert fields[10] == 0x02 | 127 << 16


def test_a_drive_that_answers_with_an_error_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm.tiers.disk_device.fcntl.ioctl", lambda *_: 0x4002)
    (tmp_path / "nvme0").write_bytes(b"")
    with pytest.raises(OSError, match="the drive answered 0x4002"):
        disk_device.read_smart_log(tmp_path / "nvme0")


# ---- the device ----------------------------------------------------------------------------------
def test_a_partition_is_of_its_drive(machine: Machine, tmp_path: Path) -> None:
    drive = machine.drive("nvme0n1", "nvme0")
    machine.mount(tmp_path, machine.partition(drive, 2))
    machine.pages["nvme0"] = smart_log()
    found = machine.look(tmp_path / "not" / "there" / "yet")
    assert found == DiskDevice(
        name="nvme0n1",
        model="A Drive",
        rotational=False,
        written_bytes=4096 * 512,
        wear=0.07,
        spare=0.98,
        lifetime_written_bytes=10 * 512_000,
        media_errors=3,
    )
    assert machine.asked == [Path("/dev/nvme0")]


def test_the_drives_below_a_stack_are_read_and_the_worst_counts(
    machine: Machine, tmp_path: Path
) -> None:
    one, two = machine.drive("nvme0n1", "nvme0"), machine.drive("nvme1n1", "nvme1")
    raid = machine.stacked("md0", machine.partition(one, 1), machine.partition(two, 1))
    machine.mount(tmp_path, machine.stacked("dm-3", raid))
    machine.pages = {"nvme0": smart_log(7, 98, 10, 1), "nvme1": smart_log(30, 99, 5, 2)}
    found = machine.look(tmp_path)
    assert (found.name, found.written_bytes) == ("dm-3", 8 * 512)
    assert (found.wear, found.spare) == (0.3, 0.98)
    assert found.lifetime_written_bytes == 15 * 512_000
    assert found.media_errors == 3


def test_a_ring_of_devices_is_left(machine: Machine, tmp_path: Path) -> None:
    disk = machine.stacked("dm-0")
    (disk / "slaves" / "dm-0").symlink_to(disk)
    machine.mount(tmp_path, disk)
    assert machine.look(tmp_path).problem == "dm-0 is no NVMe drive; the wear of others is not read"


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (PermissionError(13, "Permission denied"), "needs CAP_SYS_ADMIN and read access"),
        (OSError(5, "Input/output error"), "cannot be read: [Errno 5] Input/output error"),
        (bytes(512), "cannot be read: it is no SMART log"),
    ],
    ids=["no right", "an error", "an empty page"],
)
def test_wear_that_cannot_be_read_is_said_beside_what_can(
    page: bytes | OSError, problem: str, machine: Machine, tmp_path: Path
) -> None:
    machine.mount(tmp_path, machine.drive("nvme0n1", "nvme0"))
    machine.pages["nvme0"] = page
    found = machine.look(tmp_path)
    assert found.problem is not None
    assert problem in found.problem
    assert found.wear is None
    assert found.written_bytes == 4096 * 512


def test_a_drive_of_another_sort_is_not_asked(machine: Machine, tmp_path: Path) -> None:
    machine.mount(tmp_path, machine.drive("sda", rotational="1"))
    found = machine.look(tmp_path)
    assert found.rotational is True
    assert found.problem == "sda is no NVMe drive; the wear of others is not read"
    assert machine.asked == []


def test_a_file_system_without_a_device_is_said(machine: Machine, tmp_path: Path) -> None:
    assert machine.look(tmp_path) == DiskDevice(
        problem=f"the file system of {tmp_path} has no device in sysfs "
        "(tmpfs, btrfs, overlay, network)"
    )


@pytest.mark.parametrize("stat", ["", "1 2 3", "a b c d e f g h"])
def test_a_stat_that_is_not_understood_is_left(stat: str, machine: Machine, tmp_path: Path) -> None:
    machine.mount(tmp_path, machine.drive("sda", stat=stat))
    assert machine.look(tmp_path).written_bytes is None


def test_on_this_machine_nothing_fails(tmp_path: Path) -> None:
    found = device_of(tmp_path)
    assert found.name or found.problem
