# SPDX-License-Identifier: Apache-2.0
"""The bytes of a segment at one moment, and what the kernel knows about it: live or from a file.

A live segment is read with `read`, not through a mapping: nothing that its owner does to the object
meanwhile, not even truncating it, can end the reader. The copy is not taken in one instant: words
are whole, but two of them may be of different moments.

A snapshot file is a zip archive: `capture.json` (format, times, locks), `segment` (the bytes) and
`arena.<rank>` (the head of each arena: its announcement and its slot headers, but never KV bytes);
where there is a disk tier also `disk` (the bytes of its segment) and `slab.<rank>` (superblock and
slot headers of each slab).
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvbm._fast.contract import LINES, PAGE_BYTES, RECOVERY_LOCK_OFFSET, line_lock_offset
from kvbm._fast.locks import held_by_other
from kvbm._fast.objects import SHARED_MEMORY, object_path, open_object
from kvbm._fast.segment import LOCK_USERS_OFFSET
from kvbm.errors import InspectError
from kvbm.inspect.files import bytes_there, check_room, read_all, read_head
from kvbm.inspect.records import shape_of
from kvbm.inspect.slab import (
    SlabFacts,
    SlabHead,
    find_slabs,
    looks_like_slab,
    read_slab_head,
    slab_folder,
)
from kvbm.instance import disk_instance, instances, segment_name
from kvbm.tiers.disk_device import device_of

SNAPSHOT_FORMAT = 1
SLOT_HEADER_BYTES = 64


@dataclass(frozen=True)
class Capture:
    """Bytes of a segment and what was known about it at the same moment.

    Attributes
    ----------
    source : str
        Name of the instance, or path of the file.
    kind : {"live", "snapshot", "file", "slab"}
        Where it is from; "file" is a plain copy of the bytes, "slab" are slabs without a segment.
    data : bytes
        The segment.
    realtime_ns, monotonic_ns : int or None
        Both clocks at that moment; None for a plain copy.
    locked : frozenset of int or None
        Participant lines whose lock somebody holds; None: unknown.
    in_use, recovery_locked : bool or None
        Whether somebody has the segment open; whether somebody recovers now.
    objects : mapping of str to int
        Sizes of the objects of the instance, in bytes, by name.
    arenas : mapping of int to bytes
        Heads of the arenas, by rank.
    owner : str
        User that owns the segment.
    tier : {"host", "disk"}
        Whose segment it is.
    disk : Capture or None
        The segment of the instance's disk tier.
    slabs : mapping of int to SlabHead
        Heads of the disk tier's files, by rank.
    device : mapping of str, or None
        The device that they are on (`kvbm.tiers.disk_device.DiskDevice`).
    """

    source: str
    kind: str
    data: bytes
    realtime_ns: int | None = None
    monotonic_ns: int | None = None
    locked: frozenset[int] | None = None
    in_use: bool | None = None
    recovery_locked: bool | None = None
    objects: Mapping[str, int] = field(default_factory=dict)
    arenas: Mapping[int, bytes] = field(default_factory=dict)
    owner: str = ""
    tier: str = "host"
    disk: Capture | None = None
    slabs: Mapping[int, SlabHead] = field(default_factory=dict)
    device: Mapping[str, Any] | None = None


def resolve(source: str | None) -> str:
    """Name of an instance or path of a file; the only instance on this host if None.

    A name may also be that of an instance of which only the slabs are there.

    Raises
    ------
    InspectError
        There is no such thing, or None was given and there is not exactly one instance.
    """
    found = instances()
    there = ", ".join(sorted(found)) or "none"
    if source is None:
        if len(found) != 1:
            raise InspectError(f"name an instance or a file; instances on this host: {there}")
        return next(iter(found))
    name = source.removeprefix("/").removeprefix("dev/shm/").removeprefix("kvbm-")
    if source in found:
        return source
    if name in found and (source.startswith(("/", "kvbm-"))):
        return name
    if Path(source).exists() or source in find_slabs():
        return source
    raise InspectError(f"{source} is no instance and no file; instances on this host: {there}")


def capture(source: str, slot_headers: bool = False, slabs: bool | None = None) -> Capture:
    """Read an instance, a snapshot file, a plain copy of a segment, or slabs.

    Parameters
    ----------
    source : str
        As `resolve` returned it.
    slot_headers : bool
        Also read the slot headers in the arenas and slabs of a live instance.
    slabs : bool, optional
        Another answer for the slabs.

    Raises
    ------
    InspectError
        It cannot be read.
    """
    try:
        if source in instances():
            return _live(source, slot_headers, slot_headers if slabs is None else slabs)
        path = Path(source)
        if not path.exists():
            return _of_slabs(source, find_slabs()[source])
        if not path.is_file():
            raise InspectError(f"{source} is not a file")
        if looks_like_slab(path):
            return _of_slabs(source, {SlabFacts(read_slab_head(path)).identity[0]: path})
        if zipfile.is_zipfile(source):
            return _from_snapshot(path)
        return Capture(source, "file", read_all(Path(source)))
    except (FileNotFoundError, KeyError):
        raise InspectError(f"{source} has gone meanwhile, or has no segment") from None
    except PermissionError:
        raise InspectError(f"{source} belongs to another user") from None
    except MemoryError:
        raise InspectError(f"{source} does not fit into memory") from None
    except OSError as error:
        raise InspectError(f"{source}: {error.strerror or error}") from None


@contextlib.contextmanager
def opened(name: str) -> Iterator[int]:
    """Descriptor of an object in shared memory for reading, whoever owns it.

    Raises
    ------
    InspectError
        It is no regular file, or another user's.
    FileNotFoundError
        There is none.
    """
    try:
        fd = open_object(name, os.O_RDONLY, trusted=False)
    except PermissionError as error:
        raise InspectError(f"{object_path(name)}: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Locks:
    """Who holds which lock on a segment; None where the system cannot tell."""

    locked: frozenset[int] | None
    in_use: bool | None
    recovery: bool | None

    @classmethod
    def of(cls, fd: int) -> Locks:
        """Ask the kernel, for an open segment."""
        try:
            lines = frozenset(n for n in range(LINES) if held_by_other(fd, line_lock_offset(n)))
            in_use = held_by_other(fd, LOCK_USERS_OFFSET)
            return cls(lines, in_use, held_by_other(fd, RECOVERY_LOCK_OFFSET))
        except OSError:
            return cls(None, None, None)


def _live(instance: str, slot_headers: bool, slabs: bool) -> Capture:
    objects = {}
    for name in instances().get(instance, []):
        try:
            objects[name] = (SHARED_MEMORY / name.lstrip("/")).stat().st_size
        except FileNotFoundError:
            continue
    taken = _segment(instance, objects)
    return replace(
        taken,
        arenas=_arena_heads(instance, objects, _slots(taken.data) if slot_headers else 0),
        disk=_disk_segment(instance, objects, slabs),
    )


def _segment(name: str, objects: Mapping[str, int]) -> Capture:
    """Read one segment and ask for its locks."""
    with opened(segment_name(name)) as fd:
        state = os.fstat(fd)
        locks = Locks.of(fd)
        realtime_ns, monotonic_ns = time.time_ns(), time.monotonic_ns()
        data = read_head(fd, bytes_there(state))
    return Capture(
        name,
        "live",
        data,
        realtime_ns,
        monotonic_ns,
        locks.locked,
        locks.in_use,
        locks.recovery,
        objects,
        owner=owner_name(state.st_uid),
    )


def _disk_segment(instance: str, objects: Mapping[str, int], slabs: bool) -> Capture | None:
    """The disk tier's segment; it comes and goes after the host tier's."""
    if segment_name(disk_instance(instance)) not in objects:
        return None
    try:
        taken = _segment(disk_instance(instance), objects)
    except FileNotFoundError:
        return None
    if not slabs:
        return replace(taken, tier="disk")
    heads = _slab_heads(find_slabs().get(instance, {}))
    device = device_of(slab_folder()).row()
    return replace(taken, tier="disk", slabs=heads, device=device)


def _slab_heads(paths: Mapping[int, Path]) -> dict[int, SlabHead]:
    """Heads of the slabs that are there and can be read."""
    heads = {}
    for rank, path in paths.items():
        with contextlib.suppress(OSError):
            heads[rank] = read_slab_head(path)
    return heads


def _of_slabs(source: str, paths: Mapping[int, Path]) -> Capture:
    """Slabs without shared memory; all their times are those of the wall clock."""
    heads = {rank: read_slab_head(path) for rank, path in paths.items()}
    first = next(iter(paths.values()))
    now = time.time_ns()
    return Capture(
        source,
        "slab",
        b"",
        now,
        now,
        owner=owner_name(first.stat().st_uid),
        tier="disk",
        slabs=heads,
        device=device_of(first).row(),
    )


def owner_name(uid: int) -> str:
    """Name of a user, or its number if it has none here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _slots(data: bytes) -> int:
    shape = shape_of(data)  # a slot has a block, whose record is as long as a slot's header
    return 0 if shape is None else min(shape.host_slots, len(data) // SLOT_HEADER_BYTES)


def _arena_heads(instance: str, objects: Mapping[str, int], slots: int) -> dict[int, bytes]:
    """First page of each arena, and the headers of so many slots."""
    heads = {}
    for name in objects:
        middle, _, rank = name.rpartition(".")
        if not middle.endswith(f"{instance}.host") or not rank.isdigit():
            continue
        try:
            with opened(name) as fd:
                size = min(PAGE_BYTES + slots * SLOT_HEADER_BYTES, bytes_there(os.fstat(fd)))
                heads[int(rank)] = read_head(fd, size)
        except OSError:
            continue
    return heads


# ---- snapshot files ------------------------------------------------------------------------------
def write_snapshot(taken: Capture, path: Path) -> None:
    """Write a capture to a file, which appears when it is complete; it is readable by its owner.

    Raises
    ------
    InspectError
        It cannot be written.
    """
    about = {"format": SNAPSHOT_FORMAT, **_facts(taken)}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with (
            os.fdopen(fd, "wb") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        ):
            archive.writestr("capture.json", json.dumps(about, indent=1))
            archive.writestr("segment", taken.data)
            for rank, arena in sorted(taken.arenas.items()):
                archive.writestr(f"arena.{rank}", arena)
            if taken.disk is not None:
                archive.writestr("disk", taken.disk.data)
            slabs = taken.slabs if taken.disk is None else taken.disk.slabs
            for rank, slab in sorted(slabs.items()):
                archive.writestr(f"slab.{rank}", slab.data)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise InspectError(f"{path} cannot be written: {error.strerror}") from None


def _facts(taken: Capture) -> dict[str, Any]:
    """All that a capture knows beside the bytes."""
    return {
        "kind": taken.kind,
        "source": taken.source,
        "realtime_ns": taken.realtime_ns,
        "monotonic_ns": taken.monotonic_ns,
        "locked": None if taken.locked is None else sorted(taken.locked),
        "in_use": taken.in_use,
        "recovery_locked": taken.recovery_locked,
        "objects": dict(taken.objects),
        "owner": taken.owner,
        "device": None if taken.device is None else dict(taken.device),
        "disk": None if taken.disk is None else _facts(taken.disk),
        "slabs": {
            rank: {"path": slab.path, "size": slab.size, "in_use": slab.in_use}
            for rank, slab in taken.slabs.items()
        },
    }


def _from_snapshot(path: Path) -> Capture:
    try:
        with zipfile.ZipFile(path) as archive:
            check_room(sum(member.file_size for member in archive.infolist()), path)
            about = json.loads(archive.read("capture.json"))
            if about.get("format") != SNAPSHOT_FORMAT:
                raise InspectError(
                    f"{path} is a snapshot of format {about.get('format')}, "
                    f"this version reads {SNAPSHOT_FORMAT}"
                )
            names = [n for n in archive.namelist() if n.startswith("arena.") and n[6:].isdigit()]
            arenas = {int(name[6:]): archive.read(name) for name in names}
            found = _from_facts(str(path), about, archive, "segment")
            if about.get("disk") is None:
                return replace(found, arenas=arenas)
            disk = replace(_from_facts(str(path), about["disk"], archive, "disk"), tier="disk")
            return replace(found, arenas=arenas, disk=disk)
    except (
        zipfile.BadZipFile,
        zlib.error,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise InspectError(f"{path} is a damaged snapshot: {error}") from None


def _from_facts(
    source: str, about: Mapping[str, Any], archive: zipfile.ZipFile, member: str
) -> Capture:
    of_slabs = about.get("kind") == "slab"
    return Capture(
        source,
        "slab" if of_slabs else "snapshot",
        archive.read(member),
        _number(about["realtime_ns"]),
        _number(about["monotonic_ns"]),
        None if about["locked"] is None else frozenset(map(int, about["locked"])),
        about["in_use"],
        about["recovery_locked"],
        {str(k): int(v) for k, v in about["objects"].items()},
        owner=str(about["owner"]),
        tier="disk" if of_slabs else "host",
        slabs={
            int(rank): SlabHead(
                str(slab["path"]), int(slab["size"]), archive.read(f"slab.{rank}"), slab["in_use"]
            )
            for rank, slab in about.get("slabs", {}).items()
        },
        device=about.get("device"),
    )


def _number(value: Any) -> int | None:
    return None if value is None else int(value)
