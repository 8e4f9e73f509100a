# SPDX-License-Identifier: Apache-2.0
"""A segment of another format, with other content or of somebody else: refused or replaced."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import kvbm.shared
from kvbm._fast.objects import object_path
from kvbm._fast.segment import FORMAT, FORMAT_VERSION, Segment
from kvbm.controller import BlockManagerClient, main
from kvbm.errors import (
    FingerprintMismatch,
    SegmentAccessDenied,
    SegmentCorrupt,
    SegmentError,
    VersionMismatch,
)
from kvbm.fingerprint import Fingerprint
from kvbm.instance import arena_name, remove, segment_name
from kvbm.shared import SegmentSpec, open_as_leader
from kvbm.tiers.host import ArenaHeader, HostArena
from tests.engines import MakeEngine
from tests.fast import raw_segment as raw
from tests.fast.raw_segment import RawSegment
from tests.leaks import wait_until

HEADER = ArenaHeader(0, 1, 4096, 8, 0, b"geometry".ljust(32, b"\0"))
VERSIONS = [FORMAT_VERSION - 1, FORMAT_VERSION + 1, 2**32 - 1]
VALUES: dict[str, Any] = {
    "block_tokens": 16,
    "cache_dtype": "auto",
    "dtype": "torch.bfloat16",
    "geometry": ["00" * 32],
    "hash_algorithm": "sha256",
    "model": "some/model",
    "tensor_parallel": 1,
    "weights": "main",
}


@pytest.fixture
def spec() -> Iterator[SegmentSpec]:
    """A small segment that outlives its users; removed at the end."""
    name = f"upgrade-{os.getpid()}"
    yield SegmentSpec(name, 16, 1, 16, Fingerprint(VALUES), (0,))
    remove(name)


def made(spec: SegmentSpec, format_version: int = FORMAT_VERSION) -> Segment:
    """Make a segment as a library of that format does; it is still in use."""
    segment = open_as_leader(spec, 1)
    with RawSegment(segment.name, writable=True) as writer:
        writer.put_u32(raw.AT_VERSION, format_version)
    return segment


def format_of(version: int) -> str:
    """Both numbers of a format as messages show them."""
    return f"{version}/{FORMAT.partition('/')[2]}"


def replacing_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as a warning."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---- formats -------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", VERSIONS)
def test_a_leader_replaces_an_unused_segment_of_another_format_with_one_line(
    spec: SegmentSpec, version: int, caplog: pytest.LogCaptureFixture
) -> None:
    old = made(spec, version)
    nonce = old.nonce
    old.close()
    with caplog.at_level(logging.INFO, "kvbm"):
        new = open_as_leader(spec, 2)
    assert new.nonce != nonce
    new.close()
    (line,) = replacing_lines(caplog)
    assert "starting clean" in line
    assert f"format version {format_of(version)}" in line
    assert f"needs {FORMAT}" in line


@pytest.mark.parametrize("version", VERSIONS)
def test_a_leader_is_refused_while_an_engine_of_another_format_lives(
    spec: SegmentSpec, version: int
) -> None:
    old = made(spec, version)
    with pytest.raises(VersionMismatch) as caught:
        open_as_leader(spec, 2)
    assert (caught.value.found, caught.value.expected) == (format_of(version), FORMAT)
    assert "DYN_KVBM_INSTANCE" in str(caught.value.__cause__)
    assert object_path(old.name).exists()
    old.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_controller_is_refused_by_another_format(
    spec: SegmentSpec, version: int, capsys: pytest.CaptureFixture[str]
) -> None:
    old = made(spec, version)
    client = BlockManagerClient(spec.instance)
    calls: list[Callable[[], object]] = [
        lambda: client.status("G2"),
        lambda: client.reset_pool("G2", force=True),
    ]
    for call in calls:
        with pytest.raises(VersionMismatch) as caught:
            call()
        assert (caught.value.found, caught.value.expected) == (format_of(version), FORMAT)
    assert main(["--instance", spec.instance, "status", "G2"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"format version {format_of(version)}, this process needs {FORMAT}" in message
    old.close()


@pytest.mark.parametrize("version", VERSIONS[:2])
def test_a_worker_that_finds_nothing_else_says_both_formats(
    spec: SegmentSpec,
    version: int,
    make_engine: MakeEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    old = made(spec, version)
    timeout = {"leader_worker_init_timeout_secs": 1}
    engine = make_engine(start=False, instance=spec.instance, **timeout)
    with caplog.at_level(logging.ERROR, "kvbm"):
        worker = engine.start_worker()
        assert wait_until(lambda: not worker.copying)
    assert re.search(
        f"{old.name} has format {format_of(version)}, this build needs {FORMAT}", caplog.text
    )
    old.close()


# ---- content -------------------------------------------------------------------------------------
CHANGES: list[dict[str, Any]] = [
    {"model": "some/other"},
    {"weights": "refs/pr/1"},
    {"dtype": "torch.float16"},
    {"cache_dtype": "fp8"},
    {"geometry": ["11" * 32]},
    {"block_tokens": 32},
    {"tensor_parallel": 2},
    {"hash_algorithm": "sha256_cbor"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_any_difference_starts_clean_with_one_line_that_names_it(
    spec: SegmentSpec, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    old = made(spec)
    nonce = old.nonce
    old.close()
    other = replace(spec, fingerprint=Fingerprint({**VALUES, **change}), nonces=(nonce,))
    with caplog.at_level(logging.INFO, "kvbm"):
        new = open_as_leader(other, 2)
    assert new.nonce != nonce
    new.close()
    (line,) = replacing_lines(caplog)
    ((name, value),) = change.items()
    assert "starting clean" in line
    assert len(line) < 300
    for shown, unchanged in VALUES.items():
        assert (f" {shown}=" in line) == (shown == name), (shown, unchanged)
    if isinstance(value, (str, int)):
        assert f"{name}={VALUES[name]}, this process needs {name}={value}" in line


def test_arenas_of_ranks_that_are_no_more_go_with_the_content(spec: SegmentSpec) -> None:
    arenas = [
        HostArena(spec.instance, replace(HEADER, rank=rank, ranks=3), exclusive=False)
        for rank in range(3)
    ]
    old = made(replace(spec, ranks=3, nonces=(0, 0, 0)))
    for arena in arenas[:2]:
        arena.close()
    old.close()
    new = open_as_leader(spec, 2)
    left = [object_path(arena_name(spec.instance, rank)).exists() for rank in range(3)]
    assert left == [True, False, True]  # our worker's; nobody's; still in use by somebody
    arenas[2].close()
    new.close()


def test_two_engines_that_start_at_once_over_old_content_share_the_new(
    spec: SegmentSpec, caplog: pytest.LogCaptureFixture
) -> None:
    old = made(spec)
    nonce = old.nonce
    old.close()
    other = replace(spec, fingerprint=Fingerprint({**VALUES, "dtype": "torch.float16"}))
    opened: list[Segment] = []
    together = threading.Barrier(4)

    def start(engine: int) -> None:
        together.wait()
        opened.append(open_as_leader(other, engine))

    threads = [threading.Thread(target=start, args=(engine,)) for engine in range(4)]
    with caplog.at_level(logging.WARNING, "kvbm"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(opened) == 4
    assert {segment.nonce for segment in opened} == {opened[0].nonce} != {nonce}
    assert {segment.leader for segment in opened} == {0, 1, 2, 3}
    assert len(replacing_lines(caplog)) == 1
    for segment in opened:
        segment.close()


# ---- damage and strangers ------------------------------------------------------------------------
@pytest.mark.parametrize("used", [False, True])
def test_a_damaged_segment_is_replaced_unless_somebody_uses_it(
    spec: SegmentSpec, used: bool, caplog: pytest.LogCaptureFixture
) -> None:
    old = made(spec)
    with RawSegment(old.name, writable=True) as writer:
        writer.put_u32(raw.AT_SHAPE, writer.u32(raw.AT_SHAPE) ^ 1)
    if used:
        with pytest.raises(SegmentCorrupt, match="checksum"):
            open_as_leader(spec, 2)
        old.close()
        return
    nonce = old.nonce
    old.close()
    with caplog.at_level(logging.WARNING, "kvbm"):
        new = open_as_leader(spec, 2)
    assert new.nonce != nonce
    assert "checksum" in caplog.text
    new.close()


def test_a_creator_that_stands_still_is_not_robbed(
    spec: SegmentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvbm.shared, "CREATOR_SECS", 0.05)
    old = made(spec)
    with RawSegment(old.name, writable=True) as writer:
        writer.put_u64(raw.AT_MAGIC, 0)
    with pytest.raises(SegmentError, match="no magic"):
        open_as_leader(spec, 2)
    assert object_path(old.name).exists()
    old.close()


@pytest.mark.parametrize("what", ["link", "folder"])
def test_what_somebody_planted_at_the_name_is_refused_and_left(
    spec: SegmentSpec, what: str
) -> None:
    path = object_path(segment_name(spec.instance))
    if what == "link":
        path.symlink_to("/nowhere")
    else:
        path.mkdir()
    try:
        with pytest.raises(SegmentAccessDenied, match=f"{segment_name(spec.instance)} may not"):
            open_as_leader(spec, 1)
        with pytest.raises(SegmentAccessDenied, match=f"{segment_name(spec.instance)} may not"):
            BlockManagerClient(spec.instance).status("G2")
    finally:
        if what == "link":
            path.unlink()
        else:
            path.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("group", [None, 54321])
def test_an_object_of_another_user_is_refused_and_left(
    spec: SegmentSpec, group: int | None
) -> None:
    path = object_path(segment_name(spec.instance))
    path.write_bytes(b"planted")
    path.chmod(0o666)
    os.chown(path, 65534, 65534)
    with pytest.raises(SegmentAccessDenied, match="belongs to user 65534"):
        open_as_leader(replace(spec, group=group), 1)
    assert path.read_bytes() == b"planted"


def test_a_mismatch_of_descriptions_that_cannot_be_read_is_still_one_line(
    spec: SegmentSpec,
) -> None:
    first = made(spec)
    with RawSegment(first.name, writable=True) as writer:
        for at in (raw.AT_DESCRIPTION, raw.AT_FINGERPRINT):
            writer.bytes[at : at + 8] = b"\xff\n\r\x1b[31m"
        writer.seal()
    with pytest.raises(FingerprintMismatch) as caught:
        open_as_leader(spec, 2)
    assert str(caught.value).isprintable()
    first.close()
