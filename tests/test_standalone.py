# SPDX-License-Identifier: Apache-2.0
"""`KvbmLeader`, `KvbmWorker` and a manager over them: how they meet, sizes, errors, the end."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm.block_manager import BlockManager
from kvbm.errors import BlockError, ConfigError, GeometryError, LeaderTimeout, NotEnoughBlocks
from kvbm.hashing import token_chain
from kvbm.standalone import KvbmLeader, KvbmWorker, default_engine_id
from tests.leaks import wait_until

torch = pytest.importorskip("torch")

PAGE = 4
BLOCKS = 6
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier of ten blocks."""
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", "10")
    monkeypatch.delenv("DYN_KVBM_INSTANCE", raising=False)


@pytest.fixture
def engine_id(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return f"test-{os.getpid()}-{request.node.name}"


def kv_cache(layers: int = 2) -> list[Any]:
    """Return tensors of a KV cache: keys and values of a layer each."""
    return [torch.zeros((BLOCKS, 2, PAGE, 8), dtype=torch.float16) for _ in range(layers)]


@pytest.fixture
def workers(engine_id: str) -> Iterator[list[KvbmWorker]]:
    """Two ranks' workers."""
    made = [
        KvbmWorker(BLOCKS, PAGE, kv_cache(), rank, world_size=2, engine_id=engine_id)
        for rank in range(2)
    ]
    yield made
    for worker in made:
        worker.close()


def signature(cls: type) -> list[tuple[str, object]]:
    """Return names and defaults of the arguments that upstream has."""
    return [
        (p.name, "needed" if p.default is p.empty else p.default)
        for p in inspect.signature(cls).parameters.values()
        if p.kind is not p.KEYWORD_ONLY
    ]


def test_the_arguments_are_upstreams() -> None:
    assert signature(KvbmLeader) == [("world_size", "needed"), ("drt", None)]
    assert signature(KvbmWorker) == [
        ("num_device_blocks", "needed"),
        ("page_size", "needed"),
        ("tensors", "needed"),
        ("device_id", 0),
        ("dtype_width_bytes", 2),
        ("drt", None),
        ("layout_blocking", False),
        ("device_layout_type", None),
        ("host_layout_type", None),
        ("disk_layout_type", None),
        ("rank", None),
        ("world_size", None),
        ("nccl_comm_ref", None),
    ]


def test_a_manager_over_two_workers_has_their_pools(
    workers: list[KvbmWorker], engine_id: str
) -> None:
    leader = KvbmLeader(2, engine_id=engine_id)
    manager = BlockManager(0, leader, PAGE)
    assert manager.block_size() == PAGE
    assert manager.device_pool.total_blocks == BLOCKS
    assert manager.host_pool.total_blocks == 10
    segment = leader.segment
    assert segment is not None
    assert wait_until(lambda: min(segment.ready_slots(rank) for rank in range(2)) == 10)
    blocks = manager.allocate_host_blocks_blocking(10)
    with pytest.raises(NotEnoughBlocks):
        manager.allocate_host_blocks_blocking(1)
    chain = token_chain(PAGE)
    chain.update(range(10 * PAGE))
    for block, content in zip(blocks, chain.blocks(), strict=True):
        block.apply_token_block(content)
    manager.host_pool.register_blocks(blocks.to_list())
    assert manager.host_pool.status().active_blocks() == 10
    del blocks, block
    manager.close()
    assert len(workers) == 2


def test_a_manager_may_have_no_device_pool_or_a_smaller_one(
    workers: list[KvbmWorker], engine_id: str
) -> None:
    manager = BlockManager(0, KvbmLeader(2, engine_id=engine_id), PAGE, disable_device_pool=True)
    with pytest.raises(Exception, match="disabled"):
        manager.allocate_device_blocks_blocking(1)
    manager.close()
    manager = BlockManager(0, KvbmLeader(2, engine_id=engine_id), PAGE, 4)
    assert len(manager.allocate_device_blocks_blocking(4)) == 4
    assert manager.device_pool.total_blocks == 4
    manager.close()
    assert len(workers) == 2


def test_processes_of_one_job_meet_without_a_name() -> None:
    worker = (
        "import sys, torch\n"
        "from kvbm import KvbmWorker\n"
        "w = KvbmWorker(6, 4, [torch.zeros((6, 2, 4, 8), dtype=torch.float16)])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
        "w.close()\n"
    )
    leader = (
        "from kvbm import BlockManager, KvbmLeader\n"
        "m = BlockManager(0, KvbmLeader(1), 4)\n"
        "print(m.host_pool.total_blocks, m.device_pool.total_blocks)\n"
    )
    script = (
        "import subprocess, sys\n"
        "w = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE)\n"
        "l = subprocess.run([sys.executable, '-c', sys.argv[2]], timeout=60)\n"
        "w.communicate()\n"
        "sys.exit(l.returncode or w.returncode)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, worker, leader],
        cwd=ROOT,
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=110,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split("\n")) == {"ready", "10 6", ""}


def test_the_default_name_is_that_of_the_process_group() -> None:
    code = "from kvbm.standalone import default_engine_id; print(default_engine_id())"
    run = [sys.executable, "-c", code]
    same = subprocess.run(run, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    other = subprocess.run(
        run, cwd=ROOT, capture_output=True, text=True, start_new_session=True
    ).stdout.strip()
    assert same == default_engine_id()
    assert other.startswith("kvbm-")
    assert other != same


def test_a_leader_returns_at_once_and_names_the_ranks_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, engine_id: str
) -> None:
    monkeypatch.setenv("DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS", "1")
    leader = KvbmLeader(2, engine_id=engine_id)
    with pytest.raises(LeaderTimeout, match="ranks 0, 1"):
        BlockManager(0, leader, PAGE)
    leader.close()


def test_a_leader_and_workers_that_count_differently_are_refused(
    workers: list[KvbmWorker], engine_id: str
) -> None:
    with pytest.raises(ConfigError, match="world_size=1, the worker of rank 0 world_size=2"):
        KvbmLeader(1, engine_id=engine_id).wait()
    assert len(workers) == 2


def test_a_leader_has_one_manager_at_a_time(workers: list[KvbmWorker], engine_id: str) -> None:
    leader = KvbmLeader(2, engine_id=engine_id)
    manager = BlockManager(0, leader, PAGE)
    with pytest.raises(BlockError, match="one BlockManager a leader"):
        BlockManager(1, leader, PAGE)
    assert manager.host_pool.total_blocks == 10
    manager.close()
    assert leader.segment is None
    BlockManager(2, leader, PAGE).close()
    leader.close()
    assert len(workers) == 2


def test_without_a_tier_neither_side_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS")
    for make in (lambda: KvbmLeader(1), lambda: KvbmWorker(BLOCKS, PAGE, kv_cache())):
        with pytest.raises(ConfigError, match="DYN_KVBM_CPU_CACHE_GB"):
            make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drt": 1}, "drt=1 is not valid"),
        ({"layout_blocking": True}, "layout_blocking=True is not valid"),
        ({"device_layout_type": 1}, "device_layout_type=1 is not valid"),
        ({"nccl_comm_ref": 1}, "nccl_comm_ref=1 is not valid"),
        ({"dtype_width_bytes": 4}, "dtype_width_bytes=4 is not valid: .* 2 bytes"),
        ({"rank": 1}, r"rank=1 is not valid \(allowed with world_size=1: 0 to 0\)"),
        ({"rank": -1, "world_size": 2}, "rank=-1 is not valid"),
        ({"world_size": 0}, r"world_size=0 is not valid \(allowed: 1 to 16\)"),
    ],
)
def test_a_wrong_argument_of_a_worker_is_named(
    arguments: dict[str, Any], message: str, engine_id: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        KvbmWorker(BLOCKS, PAGE, kv_cache(), engine_id=engine_id, **arguments)


@pytest.mark.parametrize("world_size", [0, 17])
def test_a_wrong_number_of_workers_is_refused(world_size: int) -> None:
    with pytest.raises(ConfigError, match=f"world_size={world_size} is not valid"):
        KvbmLeader(world_size)
    with pytest.raises(ConfigError, match="drt="):
        KvbmLeader(1, object())


def test_tensors_that_are_not_understood_are_refused(engine_id: str) -> None:
    with pytest.raises(GeometryError):
        KvbmWorker(BLOCKS + 1, PAGE, kv_cache(), engine_id=engine_id)


def test_tensors_may_have_names(engine_id: str) -> None:
    tensors = {"model.layers.1.attn": kv_cache()[0], "model.layers.0.attn": kv_cache()[0]}
    worker = KvbmWorker(BLOCKS, PAGE, tensors, engine_id=engine_id)
    assert KvbmLeader(1, engine_id=engine_id).wait()[0].bytes_per_block == 2 * 2 * PAGE * 8 * 2
    worker.close()
    worker.close()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "devices"),
        ([torch.zeros((BLOCKS, 2, PAGE, 8), dtype=torch.float16, device="meta")], "'meta'"),
        (
            [
                torch.zeros((BLOCKS, 2, PAGE, 8), dtype=torch.float16, device=d)
                for d in ("cpu", "meta")
            ],
            "allowed is one",
        ),
    ],
)
def test_tensors_are_on_one_device_that_is_served(
    tensors: list[Any], message: str, engine_id: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        KvbmWorker(BLOCKS, PAGE, tensors, engine_id=engine_id)
