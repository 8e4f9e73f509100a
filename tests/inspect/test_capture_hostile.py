# SPDX-License-Identifier: Apache-2.0
"""What others may have put where an instance would be: no command waits, or fills the memory."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbm._fast.objects import object_path
from kvbm.errors import InspectError
from kvbm.inspect.capture import capture
from kvbm.inspect.decode import Segment
from kvbm.inspect.frame import frame
from kvbm.inspect.live import LiveSegment, Rates
from kvbm.instance import arena_name, segment_name
from tests.fast.instances import run_in_fork
from tests.fast.raw_segment import AT_SHAPE
from tests.inspect.conftest import Inspect
from tests.inspect.samples import Sample

NAME = f"hostile-{os.getpid()}"
TERABYTE = 1 << 40


@pytest.fixture
def path() -> Iterator[Path]:
    """Where an instance has its segment; what a test puts there is removed."""
    one = object_path(segment_name(NAME))
    yield one
    one.unlink(missing_ok=True)


def with_little_memory(check: Callable[[], object]) -> None:
    """Run a check in a child that may take 256 MiB more than it has."""

    def limited() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), used + (256 << 20)))
        check()

    run_in_fork(limited)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_no_file_is_said_to_be_none_by_every_command(
    kind: str, path: Path, tmp_path: Path, inspect: Inspect
) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "secret")
        (tmp_path / "secret").write_bytes(bytes(100_000))
    reason = "no regular file" if kind == "pipe" else "symbolic link"
    for words in (["show"], ["verify"], ["snapshot", tmp_path / "out"]):
        done = inspect(*words, NAME)
        assert (done.exit_code, reason in done.stderr) == (2, True), done.output
    rows = json.loads(inspect("list", "--json").stdout)["instances"]
    assert [reason in row["problem"] for row in rows if row["instance"] == NAME] == [True]
    assert "in use, or belongs to another user" in inspect("gc", NAME).stderr
    with pytest.raises(InspectError, match=reason):
        LiveSegment(NAME)


def test_an_object_of_holes_fills_no_memory(path: Path) -> None:
    path.touch()
    os.truncate(path, TERABYTE)
    with_little_memory(lambda: Segment(capture(NAME)).damage)
    assert "has 0 bytes" in Segment(capture(NAME)).damage[0]


def test_a_segment_that_was_made_longer_is_read_as_far_as_there_is_something(
    sample: Sample,
) -> None:
    whole = len(capture(sample.name).data)
    os.truncate(object_path(sample.instance.name), TERABYTE)
    with_little_memory(lambda: capture(sample.name))
    taken = capture(sample.name)
    assert whole <= len(taken.data) < whole + (4 << 20)
    assert any("it has holes" in problem for problem in Segment(taken).damage)
    with pytest.raises(InspectError, match="its header is damaged"):
        LiveSegment(sample.name)


def test_a_live_view_follows_no_segment_of_holes(sample: Sample, path: Path) -> None:
    path.write_bytes(object_path(sample.instance.name).read_bytes()[:4096])
    os.truncate(path, len(capture(sample.name).data))
    with pytest.raises(InspectError, match="it has holes"):
        LiveSegment(NAME)


LOOKS: dict[str, Callable[[LiveSegment], object]] = {
    "header": lambda live: live.header["tick"],
    "participants": LiveSegment.lines,
    "counters": LiveSegment.counters,
    "pools": LiveSegment.pools,
    "rings": lambda live: live.queued(0, 0),
    "operations": LiveSegment.in_flight,
    "blocks": LiveSegment.sweep,
    "whole table": LiveSegment.sweep_all,
    "digest": lambda live: live.digest(63),
    "frame": lambda live: frame(live, Rates()),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("left", [0, 4096 + 64])
def test_a_segment_that_is_cut_off_while_it_is_followed_ends_nobody(
    sample: Sample, path: Path, left: int, look: str
) -> None:
    path.write_bytes(object_path(sample.instance.name).read_bytes())

    def follow() -> None:
        with LiveSegment(NAME) as live:
            LOOKS[look](live)
            os.truncate(path, left)
            if (look, left) == ("header", 4096 + 64):
                assert LOOKS[look](live) >= 0
                return
            with pytest.raises(InspectError, match=f"{NAME} was cut off"):
                LOOKS[look](live)

    run_in_fork(follow)


def test_a_header_with_many_slots_reads_no_bytes_of_requests(sample: Sample) -> None:
    arena = object_path(arena_name(sample.name, 0))
    try:
        arena.write_bytes(bytes(64 << 20))
        with open(object_path(sample.instance.name), "r+b") as file:
            file.seek(AT_SHAPE + 4)
            file.write(struct.pack("<I", 2**31 - 1))
        taken = capture(sample.name, slot_headers=True)
        assert len(taken.arenas[0]) <= 4096 + len(taken.data)
    finally:
        arena.unlink()


def test_a_snapshot_that_unpacks_to_more_than_the_memory_is_refused(
    snapshot_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert capture(str(snapshot_file)).kind == "snapshot"
    monkeypatch.setattr(os, "sysconf", lambda _: 1000)  # a million bytes of memory
    assert len(snapshot_file.read_bytes()) < 500_000
    with pytest.raises(InspectError, match="does not fit into memory"):
        capture(str(snapshot_file))


def test_a_file_longer_than_the_memory_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.touch()
    os.truncate(copy, TERABYTE)
    with pytest.raises(InspectError, match="does not fit into memory"):
        capture(str(copy))
