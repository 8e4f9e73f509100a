# SPDX-License-Identifier: Apache-2.0
"""Counting and emptying a live segment from outside, as Python calls and as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import participants
from kvbm.controller import BlockManagerClient, BlockPoolStatus, main
from kvbm.errors import (
    ResetError,
    SegmentCorrupt,
    SegmentNotFound,
    TooManyLeaders,
    UnsupportedCacheLevel,
)
from tests.fast.conftest import make_instance  # noqa: F401
from tests.fast.instances import Instance, digests

ROOT = Path(__file__).resolve().parents[1]
HASHES = digests(6)
EVENTS = [int.from_bytes(value[-8:], "big") for value in HASHES]


@pytest.fixture
def one(make_instance: Callable[..., Instance]) -> Instance:  # noqa: F811
    """A segment of ten slots."""
    return make_instance(host_slots=10)


@pytest.fixture
def engine(one: Instance) -> Iterator[OperationTable]:
    """The leader of a live engine that has stored six blocks and holds the first three."""
    table = one.leader()
    refs = [ref for ref, _ in table.reserve(Keys(HASHES), 0, 6)]
    assert table.publish(refs) == 6
    for ref in reversed(refs):
        table.unpin(ref)
    held = table.match(Keys(HASHES), 0, 3)[1]
    assert held is not None
    yield table
    if table.is_current(held):
        table.unpin(held)


@pytest.fixture
def client(one: Instance, engine: OperationTable) -> BlockManagerClient:
    """A client of that engine's cache."""
    assert engine.segment.name == one.name
    return BlockManagerClient(name_of(one))


def name_of(one: Instance) -> str:
    """Return the instance name of a segment."""
    return one.name.removeprefix("/kvbm-")


def let_go(engine: OperationTable) -> None:
    """Let the engine return what it holds."""
    for block, times in engine.held().items():
        for _ in range(times):
            engine.unpin(block)  # generation 0: nothing was evicted yet


@pytest.mark.parametrize("level", ["G2", "g2"])
def test_the_status_counts_by_use(client: BlockManagerClient, level: str) -> None:
    status = client.status(level)
    assert (status.active_blocks(), status.inactive_blocks(), status.empty_blocks()) == (3, 3, 4)


def test_a_pool_in_use_is_reset_only_by_force(
    client: BlockManagerClient, engine: OperationTable
) -> None:
    with pytest.raises(ResetError, match="total blocks: 10, available blocks: 7"):
        client.reset_pool("G2")
    assert engine.match(Keys(HASHES[:1]), 0, 1)[0] == 1
    engine.unpin(0)
    assert client.reset_pool("G2", force=True) == 3
    assert engine.match(Keys(HASHES), 0, 6) == (0, None)
    assert client.status("G2") == BlockPoolStatus(3, 0, 7)


def test_a_pool_that_nobody_uses_is_reset(
    client: BlockManagerClient, engine: OperationTable
) -> None:
    let_go(engine)
    assert client.reset_all_pools() == 6
    assert client.status("G2") == BlockPoolStatus(0, 0, 10)


def test_blocks_are_reset_by_hash_unless_used(
    client: BlockManagerClient, engine: OperationTable
) -> None:
    answer = client.reset_blocks("g2", [EVENTS[1], EVENTS[4], 99])
    assert answer.reset_blocks() == [EVENTS[4]]
    assert answer.not_found_blocks() == [99]
    assert answer.not_reset_blocks() == [EVENTS[1]]
    assert client.status("G2") == BlockPoolStatus(3, 1, 6)
    count, ref = engine.match(Keys(HASHES), 0, 6)
    assert count == 4
    assert ref is not None
    engine.unpin(ref)


@pytest.mark.parametrize("level", ["G4", "", "host", "G22"])
def test_an_unknown_level_is_refused(client: BlockManagerClient, level: str) -> None:
    for call in (client.status, client.reset_pool, lambda given: client.reset_blocks(given, [1])):
        with pytest.raises(UnsupportedCacheLevel, match="allowed are G1"):
            call(level)


def test_levels_without_a_pool_say_why(client: BlockManagerClient) -> None:
    with pytest.raises(UnsupportedCacheLevel, match="belongs to the engine"):
        client.status("G1")
    with pytest.raises(UnsupportedCacheLevel, match="no such tier"):
        client.status("G3")
    with pytest.raises(UnsupportedCacheLevel, match="together with the host tier"):
        client.reset_pool("G3")


def test_a_missing_instance_is_named_with_those_that_are_there(client: BlockManagerClient) -> None:
    with pytest.raises(SegmentNotFound, match=f"instances on this host: .*{client.instance}"):
        BlockManagerClient("not-there").status("G2")


def test_what_is_no_segment_is_refused() -> None:
    name = f"test-no-segment-{os.getpid()}"
    path = Path("/dev/shm") / f"kvbm-{name}"
    path.write_bytes(bytes(8192))
    try:
        with pytest.raises(SegmentCorrupt):
            BlockManagerClient(name).status("G2")
    finally:
        path.unlink()


def test_a_client_uses_a_line_only_for_the_moment(
    client: BlockManagerClient, engine: OperationTable
) -> None:
    before = participants(engine.segment)
    client.reset_blocks("G2", [99])
    client.status("G2")
    assert participants(engine.segment) == before


def test_a_full_segment_can_be_counted_but_not_changed(
    client: BlockManagerClient, one: Instance
) -> None:
    leaders = [one.leader(key) for key in range(2, 17)]
    assert client.status("G2").empty_blocks() == 4
    with pytest.raises(TooManyLeaders):
        client.reset_pool("G2")
    assert len(leaders) == 15


# ---- commands ------------------------------------------------------------------------------------
def test_commands_print_what_the_calls_return(
    client: BlockManagerClient, engine: OperationTable, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> dict[str, object]:
        assert main(["--instance", client.instance, *arguments]) == 0
        answer: dict[str, object] = json.loads(capsys.readouterr().out)
        return answer

    assert run("status", "g2") == {"active_blocks": 3, "inactive_blocks": 3, "empty_blocks": 4}
    assert run("reset-blocks", "G2", str(EVENTS[5]), hex(EVENTS[0]), "7") == {
        "reset_blocks": [EVENTS[5]],
        "not_found_blocks": [7],
        "not_reset_blocks": [EVENTS[0]],
    }
    assert run("reset", "G2", "--force") == {"given_back": 2}
    let_go(engine)
    assert run("reset-all") == {"given_back": 3}
    listed = run("list")["instances"]
    assert isinstance(listed, list)
    assert client.instance in listed


def test_an_error_is_one_line_and_a_status(
    client: BlockManagerClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--instance", client.instance, "reset", "G2"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "python -m kvbm.controller: blocks are in use: total blocks: 10, available blocks: 7"
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["status"],
        ["status", "G2"],
        ["--instance", "x", "reset-blocks", "G2", "-1"],
        ["--instance", "x", "reset-blocks", "G2", "0x1ffffffffffffffff"],
    ],
)
def test_a_command_that_is_incomplete_or_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.delenv("DYN_KVBM_INSTANCE", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_module_runs_as_a_command_on_the_instance_of_the_environment(
    client: BlockManagerClient,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvbm.controller", "status", "G2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "DYN_KVBM_INSTANCE": client.instance},
    )
    assert json.loads(done.stdout)["active_blocks"] == 3, done.stderr
