# SPDX-License-Identifier: Apache-2.0
"""The shared object: made whole, attached only if it is what it says, left without a trace."""

import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import posix_ipc
import pytest

from kvbm._fast.participants import claim_leader
from kvbm._fast.segment import (
    COUNTER_NAMES,
    FORMAT_VERSION,
    MAX_RANKS,
    Segment,
    SegmentFault,
    Shape,
    segment_bytes,
    shape_for,
)
from tests.fast import raw_segment as raw
from tests.fast.instances import DESCRIPTION, FINGERPRINT, Instance, run_in_fork, unique_name
from tests.fast.raw_segment import SHM, RawSegment

Make = Callable[..., Instance]
SMALL = shape_for(8, 0, 1, 16, True)
SMALL_BYTES = segment_bytes(SMALL)


def path_of(name: str) -> Path:
    return SHM / name.lstrip("/")


@contextmanager
def created(shape: Shape = SMALL, **options: Any) -> Iterator[Segment]:
    segment = Segment.create(unique_name(), shape, FINGERPRINT, DESCRIPTION, **options)
    try:
        yield segment
    finally:
        segment.close()
        posix_ipc.unlink_shared_memory(segment.name)


@contextmanager
def tampered(offset: int, content: bytes, shape: Shape = SMALL) -> Iterator[str]:
    """Name of a segment in which some bytes are not what its creator wrote."""
    with created(shape) as segment:
        with path_of(segment.name).open("r+b") as file:
            file.seek(offset)
            file.write(content)
        yield segment.name


def fault_of(name: str) -> SegmentFault:
    """What attach says about an object; it keeps neither a descriptor nor a mapping of it."""
    with pytest.raises(SegmentFault) as caught:
        Segment.attach(name)
    assert name in str(caught.value)
    return caught.value


# ---- layout --------------------------------------------------------------------------------------
def test_the_sections_are_where_they_have_always_been() -> None:
    """Offsets of a small segment, as literals: a change of them is a change of the format."""
    with created(shape_for(200, 100, 2, 16, True)) as segment, RawSegment(segment.name) as reader:
        assert reader.at == {
            "participants": 4096,
            "counters": 40960,
            "histograms": 147456,
            "rings": 200704,
            "operations": 237568,
            "pool 0": 9019392,
            "summary 0": 9023488,
            "pool 1": 9027584,
            "summary 1": 9031680,
            "pool 2": 9035776,
            "summary 2": 9039872,
            "buckets": 9043968,
            "blocks": 9052160,
            "cold": 9072640,
        }
        assert reader.total_bytes == segment.total_bytes == 9084928


def test_the_header_is_where_it_has_always_been() -> None:
    shape = shape_for(200, 100, 2, 16, True)
    with created(shape) as segment, RawSegment(segment.name) as reader:
        segment.set_ready_slots(1, 77)
        assert reader.u64(0) == 0x314D42564B304730
        assert reader.u32(8) == FORMAT_VERSION == 5
        assert [reader.u32(16 + 4 * i) for i in range(7)] == [300, 200, 100, 2, 16, 128, 1]
        assert reader.u32(44) == raw.header_check(reader.bytes[:4096])
        assert reader.u64(48) == segment.total_bytes
        assert reader.u64(56) == segment.nonce
        assert reader.u64(64) == segment.created_ns
        assert reader.bytes[72:104] == FINGERPRINT
        assert reader.u64(128) == 1
        assert [reader.u32(192), reader.u32(196)] == [0, segment.key_epoch]
        assert [reader.u32(256), reader.u32(260)] == [0, 77]
        assert reader.bytes[384 : 384 + len(DESCRIPTION) + 1] == DESCRIPTION + b"\0"


def test_the_layout_check_is_made_of_the_sizes_of_all_records() -> None:
    sizes = (4096, 128, 384, 1152, 4288, 64, 64, 32, 16, 16, 200)
    factors = (31, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179)
    assert sizes[1:8] == (
        raw.PARTICIPANT_BYTES,
        raw.COUNTERS_BYTES,
        raw.RING_BYTES,
        raw.OPERATION_BYTES,
        raw.BUCKET_BYTES,
        raw.BLOCK_BYTES,
        raw.COLD_BYTES,
    )
    assert sizes[-1] == raw.HISTOGRAM_BYTES
    with created() as segment, RawSegment(segment.name) as reader:
        assert reader.u32(12) == sum(s * f for s, f in zip(sizes, factors, strict=True))


@pytest.mark.parametrize(
    ("host", "disk", "ranks", "buckets"),
    [(1, 0, 1, 1), (4, 0, 1, 1), (5, 0, 1, 2), (64, 64, 2, 32), (1000, 0, 16, 256)],
)
def test_a_shape_has_a_record_a_slot_and_an_index_at_most_half_full(
    host: int, disk: int, ranks: int, buckets: int
) -> None:
    shape = shape_for(host, disk, ranks, 16, False)
    assert shape == Shape(host + disk, host, disk, ranks, 16, buckets, False)
    assert shape.index_buckets * 8 >= 2 * shape.block_capacity


def test_a_million_blocks_take_about_120_bytes_each() -> None:
    assert 100 < segment_bytes(shape_for(1_000_000, 0, 1, 16, True)) / 1_000_000 < 135


@pytest.mark.parametrize(
    "change",
    [
        {"block_capacity": 0},
        {"block_capacity": 2**31},
        {"host_slots": 2**31},
        {"disk_slots": 2**31},
        {"ranks": 0},
        {"ranks": MAX_RANKS + 1},
        {"index_buckets": 0},
        {"index_buckets": 3},
        {"index_buckets": 2**29},
        {"block_tokens": 0},
    ],
)
def test_sizes_out_of_bounds_are_refused(change: dict[str, int]) -> None:
    name = unique_name()
    with pytest.raises(ValueError, match="out of bounds"):
        segment_bytes(SMALL._replace(**change))
    with pytest.raises(ValueError, match="out of bounds"):
        Segment.create(name, SMALL._replace(**change), FINGERPRINT, b"")
    assert not path_of(name).exists()


# ---- create --------------------------------------------------------------------------------------
def test_what_was_created_is_what_is_attached() -> None:
    with created(shape_for(100, 20, 4, 32, False)) as segment:
        other = Segment.attach(segment.name)
        assert other.shape == segment.shape == shape_for(100, 20, 4, 32, False)
        assert (other.fingerprint, other.description) == (FINGERPRINT, DESCRIPTION)
        assert (other.nonce, other.created_ns) == (segment.nonce, segment.created_ns)
        assert (other.key_epoch, other.leader, other.free_blocks()) == (0, None, 120)
        assert (other.name, other.writable) == (segment.name, True)
        assert other.total_bytes == path_of(segment.name).stat().st_size
        other.close()


def test_two_segments_have_different_nonces() -> None:
    with created() as one, created() as two:
        assert one.nonce != two.nonce


def test_its_memory_is_reserved_when_it_exists() -> None:
    with created() as segment:
        status = path_of(segment.name).stat()
        assert status.st_blocks * 512 >= status.st_size == segment.total_bytes


def test_a_name_that_exists_is_refused_and_left_alone() -> None:
    with created() as segment:
        with pytest.raises(FileExistsError, match=segment.name):
            Segment.create(segment.name, SMALL, bytes(32), b"")
        other = Segment.attach(segment.name)
        assert other.fingerprint == FINGERPRINT
        other.close()


def test_too_little_memory_leaves_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, f"{size} bytes from {offset}, open as {descriptor}")

    name = unique_name()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"{SMALL_BYTES} bytes from 0") as caught:
        Segment.create(name, SMALL, FINGERPRINT, b"")
    assert caught.value.errno == errno.ENOSPC
    assert not path_of(name).exists()


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_fingerprint_has_32_bytes(length: int) -> None:
    name = unique_name()
    with pytest.raises(ValueError, match=f"32 bytes, not {length}"):
        Segment.create(name, SMALL, bytes(length), b"")
    assert not path_of(name).exists()


@pytest.mark.parametrize("length", [0, 2047, 2048, 5000])
def test_a_description_is_kept_up_to_its_room(length: int) -> None:
    text = b"d" * length
    name = unique_name()
    segment = Segment.create(name, SMALL, FINGERPRINT, text)
    try:
        assert segment.description == text[:2047]
    finally:
        segment.close()
        posix_ipc.unlink_shared_memory(name)


@pytest.mark.parametrize(("group", "mode"), [(None, 0o600), (os.getgid(), 0o660)])
def test_a_segment_is_its_owners_or_its_groups(group: int | None, mode: int) -> None:
    with created(group=group) as segment:
        assert stat.S_IMODE(path_of(segment.name).stat().st_mode) == mode
        Segment.attach(segment.name, group=group).close()
        if group is not None:
            with pytest.raises(PermissionError, match=f"lets group {group} write"):
                Segment.attach(segment.name)
        Segment.attach(segment.name, writable=False).close()


# ---- attach --------------------------------------------------------------------------------------
def test_a_name_that_does_not_exist_is_not_found() -> None:
    name = unique_name()
    with pytest.raises(FileNotFoundError, match=name):
        Segment.attach(name)


def test_an_object_of_somebody_else_may_not_be_opened() -> None:
    as_root = os.geteuid() == 0

    def check() -> None:
        if as_root:
            os.seteuid(65534)
        else:
            path_of(segment.name).chmod(0)
        with pytest.raises(PermissionError, match=segment.name):
            Segment.attach(segment.name)

    with created() as segment:
        run_in_fork(check)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (0, "not ready"),
        (1, "not ready"),
        (4095, "not ready"),
        (4096, "corrupt"),
        (8 * 4096, "corrupt"),
        (-4096, "corrupt"),
        (-1, "corrupt"),
        (4096 + SMALL_BYTES, "corrupt"),
    ],
)
def test_an_object_of_another_length_than_its_header_says_is_refused(size: int, kind: str) -> None:
    with created() as segment:
        length = size if size >= 0 else segment.total_bytes + size
        os.truncate(path_of(segment.name), length)
        assert fault_of(segment.name).kind == kind


@pytest.mark.parametrize("magic", [bytes(8), b"\xff" * 8, b"KVBM0000"])
def test_an_object_without_the_magic_is_not_ready(magic: bytes) -> None:
    with tampered(0, magic) as name:
        assert fault_of(name).kind == "not ready"


@pytest.mark.parametrize("offset", [raw.AT_VERSION, raw.AT_CHECK])
@pytest.mark.parametrize("value", [0, 1, 3, 0xFFFFFFFF])
def test_another_format_is_refused_with_both_numbers(offset: int, value: int) -> None:
    with tampered(offset, value.to_bytes(4, "little")) as name:
        fault = fault_of(name)
    assert fault.kind == "version"
    assert f"{value}" in str(fault) or f"{value:#x}" in str(fault)
    assert "this build needs 5/" in str(fault)
    assert fault.found in str(fault)


@pytest.mark.parametrize("field", range(6))
@pytest.mark.parametrize("value", [0, 1, 3, 2**20, 2**31, 2**32 - 1])
def test_sizes_that_contradict_the_object_are_refused(field: int, value: int) -> None:
    shape = shape_for(100_000, 50_000, 2, 16, True)
    with created(shape) as segment, RawSegment(segment.name, writable=True) as writer:
        writer.put_u32(raw.AT_SHAPE + 4 * field, value)
        assert "checksum" in str(fault_of(segment.name))
        writer.seal()
        changed = shape._replace(**{Shape._fields[field]: value})
        if field == 4 and value:  # tokens a block: any number fits any size
            other = Segment.attach(segment.name)
            assert other.shape == changed
            other.close()
        else:
            assert fault_of(segment.name).kind == "corrupt"


@pytest.mark.parametrize("value", [0, 1, 2**64 - 1])
def test_a_total_that_contradicts_the_object_is_refused(value: int) -> None:
    with created() as segment, RawSegment(segment.name, writable=True) as writer:
        writer.put_u64(raw.AT_TOTAL, value)
        writer.seal()
        fault = fault_of(segment.name)
    assert (fault.kind, "another size" in str(fault)) == ("corrupt", True)


@pytest.mark.parametrize("at", [*range(16, 104, 4), 384, 384 + len(DESCRIPTION), 2428])
def test_a_header_that_was_scribbled_on_is_refused(at: int) -> None:
    """Also where the sizes still add up: fewer slots that take as many pages, say."""
    with created() as segment, RawSegment(segment.name, writable=True) as writer:
        writer.put_u32(at, writer.u32(at) ^ 1)
        fault = fault_of(segment.name)
    assert (fault.kind, "checksum" in str(fault)) == ("corrupt", True)


def test_an_object_with_holes_is_refused_before_it_is_mapped() -> None:
    """Else a header for a table of a terabyte in an empty file would fill the memory."""
    shape = shape_for(1_000_000, 0, 1, 16, True)
    with created() as segment:
        with RawSegment(segment.name) as reader:
            page = bytearray(reader.bytes[:4096])
        page[raw.AT_SHAPE : raw.AT_SHAPE + 24] = struct.pack("<6I", *shape[:6])
        page[raw.AT_TOTAL : raw.AT_TOTAL + 8] = segment_bytes(shape).to_bytes(8, "little")
        page[raw.AT_HEADER_CHECK : 48] = raw.header_check(bytes(page)).to_bytes(4, "little")
        path_of(segment.name).write_bytes(page)
        os.truncate(path_of(segment.name), segment_bytes(shape))
        fault = fault_of(segment.name)
        assert (fault.kind, "has holes" in str(fault)) == ("corrupt", True)
        assert path_of(segment.name).stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("magic", [False, True])
def test_random_bytes_are_refused(magic: bool) -> None:
    for seed in range(50):
        name = unique_name()
        content = bytearray(os.urandom(4096 + 13 * seed))
        if magic:
            content[0:8] = raw.MAGIC.to_bytes(8, "little")
        path_of(name).write_bytes(content)
        try:
            assert fault_of(name).kind == ("version" if magic else "not ready")
        finally:
            path_of(name).unlink()


def test_random_sizes_under_a_right_magic_and_version_are_refused() -> None:
    with created() as segment, RawSegment(segment.name, writable=True) as writer:
        for _ in range(500):
            writer.bytes[raw.AT_SHAPE : raw.AT_SHAPE + 40] = os.urandom(40)
            assert fault_of(segment.name).kind == "corrupt"


def test_a_header_that_changes_later_moves_nothing() -> None:
    """A process trusts the sizes that it has checked, and its own copy of them alone."""
    with created() as segment, RawSegment(segment.name, writable=True) as writer:
        writer.bytes[raw.AT_SHAPE : raw.AT_SHAPE + 40] = b"\xff" * 40
        assert segment.shape == SMALL
        assert segment.free_blocks() == SMALL.block_capacity


def test_a_segment_that_its_creator_did_not_finish_is_not_ready() -> None:
    """SIGKILL between the reservation of the memory and the magic."""
    code = (
        "import os, signal, sys\n"
        "from kvbm._fast import segment\n"
        "os.posix_fallocate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "segment.Segment.create(sys.argv[1], segment.shape_for(8, 0, 1, 16, True), bytes(32), b'')"
    )
    name = unique_name()
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True)
    assert done.returncode == -9, done.stderr
    try:
        assert fault_of(name).kind == "not ready"
    finally:
        posix_ipc.unlink_shared_memory(name)


# ---- readers -------------------------------------------------------------------------------------
def test_a_reader_sees_everything_and_changes_nothing(make_instance: Make) -> None:
    made = make_instance(8)
    before = made.raw.bytes[:]
    reader = made.attach(writable=False)
    assert not reader.writable
    assert reader.description == DESCRIPTION
    assert reader.counters()["lookups"] == 0
    assert reader.free_blocks() == 8
    assert reader.ready_slots(0) == 8
    assert made.raw.bytes[:] == before


def test_a_reader_is_refused_what_would_write(make_instance: Make) -> None:
    made = make_instance(8)
    reader = made.attach(writable=False)
    with pytest.raises(PermissionError, match=made.name):
        reader.set_ready_slots(0, 8)
    with pytest.raises(PermissionError, match=made.name):
        claim_leader(reader, 1)


def test_the_other_users_of_an_object_are_seen(make_instance: Make) -> None:
    made = make_instance(8)
    assert not made.creator.has_other_users()
    other = made.attach()
    assert made.creator.has_other_users()
    assert other.has_other_users()
    other.close()
    assert not made.creator.has_other_users()
    reader = made.attach(writable=False)
    assert made.creator.has_other_users()
    reader.close()


# ---- numbers -------------------------------------------------------------------------------------
def test_counters_are_summed_over_all_lines_under_their_names(make_instance: Make) -> None:
    made = make_instance(8)
    with RawSegment(made.name, writable=True) as writer:
        for line in (0, 15, raw.LINES - 1):
            for i in range(len(COUNTER_NAMES)):
                at = writer.at["counters"] + line * raw.COUNTERS_BYTES + 8 * i
                writer.put_u64(at, 1000 * i + line)
    counters = made.creator.counters()
    assert list(counters) == list(COUNTER_NAMES)
    assert list(counters.values()) == [
        3000 * i + 15 + raw.LINES - 1 for i in range(len(COUNTER_NAMES))
    ]


def test_a_rank_publishes_its_usable_slots(make_instance: Make) -> None:
    with created(shape_for(100, 0, 3, 16, True)) as segment:
        assert [segment.ready_slots(rank) for rank in range(3)] == [0, 0, 0]
        segment.set_ready_slots(1, 60)
        segment.set_ready_slots(2, 100)
        assert [segment.ready_slots(rank) for rank in range(3)] == [0, 60, 100]
        segment.set_ready_slots(1, 40)
        assert segment.ready_slots(1) == 60


@pytest.mark.parametrize(("rank", "count"), [(-1, 0), (3, 0), (0, -1), (0, 101), (2**40, 1)])
def test_usable_slots_out_of_bounds_are_refused(rank: int, count: int) -> None:
    with created(shape_for(100, 0, 3, 16, True)) as segment:
        with pytest.raises(IndexError):
            segment.set_ready_slots(rank, count)
        if count == 0:
            with pytest.raises(IndexError):
                segment.ready_slots(rank)
