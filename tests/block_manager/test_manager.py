# SPDX-License-Identifier: Apache-2.0
"""`BlockManager`: its two constructors, its pools, sharing, and that nothing is left."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvbm
from kvbm.block_manager import BlockManager
from kvbm.errors import ConfigError, NotEnoughBlocks, UnsupportedCacheLevel
from kvbm.hashing import token_chain
from kvbm.instance import remove_if_unused

PAGE = 4
ROOT = Path(__file__).resolve().parents[2]


def contents(count: int, first: int = 0) -> list:
    """Return the token blocks of a sequence."""
    chain = token_chain(PAGE)
    chain.update(range(first, first + count * PAGE))
    return chain.blocks()


def test_upstreams_names_are_there_and_cost_nothing_before_they_are_used() -> None:
    code = (
        "import sys, kvbm\n"
        "assert not {'numpy', 'torch', 'posix_ipc', 'pydantic'} & set(sys.modules)\n"
        "assert {'BlockManager', 'KvbmLeader', 'KvbmWorker'} <= set(dir(kvbm))\n"
        "from kvbm import BlockManager, KvbmLeader, KvbmWorker\n"
        "assert 'torch' not in sys.modules\n"
        "print(BlockManager.__name__, KvbmLeader.__name__, KvbmWorker.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "BlockManager KvbmLeader KvbmWorker\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = kvbm.Nothing


def test_the_arguments_are_upstreams() -> None:
    first = list(inspect.signature(BlockManager._with_leader).parameters.items())[1:]
    assert [(name, p.default) for name, p in first] == [
        ("leader", None),
        ("page_size", 32),
        ("num_device_blocks", None),
        ("disable_device_pool", False),
    ]
    second = list(inspect.signature(BlockManager._with_shape).parameters.items())[1:]
    assert [(n, p.default if p.default is not p.empty else "needed") for n, p in second] == [
        ("num_layer", "needed"),
        ("outer_dim", "needed"),
        ("page_size", "needed"),
        ("inner_dim", "needed"),
        ("dtype", None),
        ("host_num_blocks", None),
        ("device_num_blocks", None),
        ("device_id", 0),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "leader=None"),
        ({"num_layer": 0}, "num_layer=0 is not valid"),
        ({"inner_dim": -1}, "inner_dim=-1 is not valid"),
        ({"host_num_blocks": 0}, "host_num_blocks=0 is not valid"),
        ({"device_num_blocks": -3}, "device_num_blocks=-3 is not valid"),
        ({"dtype": "x"}, "dtype='x' is not valid"),
        ({"host_num_blocks": 10**9}, "host_num_blocks=1000000000: the host tier needs"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(
    arguments: dict[str, object], message: str
) -> None:
    shape = {"num_layer": 2, "outer_dim": 2, "page_size": PAGE, "inner_dim": 1024}
    with pytest.raises(ConfigError, match=message):
        BlockManager(0, **(shape | arguments if arguments else {}))  # type: ignore[call-overload]


def test_an_unknown_or_missing_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="outer_dim"):
        BlockManager(0, 2)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="pages"):
        BlockManager(0, pages=2)  # type: ignore[call-overload]


def test_pools_that_were_not_asked_for_are_not_there() -> None:
    manager = BlockManager(0, 2, 1, PAGE, 8, host_num_blocks=2)
    assert manager.block_size() == PAGE
    with pytest.raises(UnsupportedCacheLevel, match="'G1'"):
        manager.allocate_device_blocks_blocking(1)
    manager.close()
    manager = BlockManager(0, 2, 1, PAGE, 8)
    with pytest.raises(UnsupportedCacheLevel, match="'G2'"):
        manager.allocate_host_blocks_blocking(1)
    with pytest.raises(NotImplementedError, match=r"kvbm\.controller"):
        manager.init_controller(None)
    manager.close()


def test_awaiting_gives_the_same_as_blocking() -> None:
    manager = BlockManager(0, 2, 1, PAGE, 8, "fp32", 4)

    async def take() -> tuple[int, int]:
        first = await manager.allocate_host_blocks(1)
        with pytest.raises(NotEnoughBlocks):
            await manager.allocate_host_blocks(4)
        return len(first), len(await manager.allocate_host_blocks(3))

    assert asyncio.run(take()) == (1, 3)
    assert manager.host_pool.available_blocks == 4
    manager.close()


def test_device_blocks_are_torch_memory() -> None:
    torch = pytest.importorskip("torch")
    manager = BlockManager(0, 2, 2, PAGE, 8, "fp32", None, 3)
    blocks = manager.allocate_device_blocks_blocking(3)
    for number, block in enumerate(blocks):
        torch.from_dlpack(block)[...] = number
    assert [float(torch.from_dlpack(b[1]).mean()) for b in blocks] == [0.0, 1.0, 2.0]
    on_gpu = torch.cuda.is_available()
    assert blocks[0].__dlpack_device__() == ((2, 0) if on_gpu else (1, 0))
    del blocks, block
    manager.close()


def test_device_blocks_without_torch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "kvbm.block_manager.torch_memory", raising=False)
    with pytest.raises(ConfigError, match="device_num_blocks=3 needs torch"):
        BlockManager(0, 2, 2, PAGE, 8, device_num_blocks=3)


def test_the_two_pools_of_a_manager_have_nothing_in_common() -> None:
    pytest.importorskip("torch")
    manager = BlockManager(0, 2, 2, PAGE, 8, "fp32", 3, 2)
    (block,) = manager.allocate_device_blocks_blocking(1).to_list()
    block.apply_token_block(contents(1)[0])
    manager.device_pool.register_blocks([block])
    assert manager.host_pool.match_token_blocks(contents(1)) == []
    assert manager.host_pool.available_blocks == 3
    assert len(manager.device_pool.match_token_blocks(contents(1))) == 1
    del block
    manager.close()


def test_a_named_cache_outlives_its_manager_with_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = f"test-manager-{os.getpid()}"
    monkeypatch.setenv("DYN_KVBM_INSTANCE", instance)
    torch = pytest.importorskip("torch")
    first = BlockManager(0, 2, 1, PAGE, 8, "fp32", 4)
    blocks = first.allocate_host_blocks_blocking(2).to_list()
    for number, (block, content) in enumerate(zip(blocks, contents(2), strict=True)):
        torch.from_dlpack(block)[...] = 1 + number
        block.apply_token_block(content)
    first.host_pool.register_blocks(blocks)
    second = BlockManager(0, 2, 1, PAGE, 8, "fp32", 4)  # at the same time
    assert second.host_pool.status().active_blocks() == 2
    del blocks, block
    first.close()
    second.close()
    third = BlockManager(0, 2, 1, PAGE, 8, "fp32", 4)
    found = third.host_pool.match_token_blocks(contents(3))
    assert [set(np.from_dlpack(b).ravel().tolist()) for b in found] == [{1.0}, {2.0}]
    del found
    third.close()
    assert remove_if_unused(instance)


def test_a_manager_of_another_shape_does_not_find_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instance = f"test-manager-{os.getpid()}"
    monkeypatch.setenv("DYN_KVBM_INSTANCE", instance)
    first = BlockManager(0, 2, 1, PAGE, 8, "fp16", 4)
    (block,) = first.allocate_host_blocks_blocking(1).to_list()
    block.apply_token_block(contents(1)[0])
    first.host_pool.register_blocks([block])
    del block
    first.close()
    second = BlockManager(0, 2, 1, PAGE, 8, "bf16", 4)
    assert second.host_pool.match_token_blocks(contents(1)) == []
    assert second.host_pool.status().empty_blocks() == 4
    second.close()
    assert remove_if_unused(instance)


def test_a_process_that_ends_without_a_word_leaves_nothing() -> None:
    code = (
        "from kvbm import BlockManager\n"
        "m = BlockManager(0, 2, 1, 4, 8, 'fp32', 4)\n"
        "b = m.allocate_host_blocks_blocking(2)\n"
        "cycle = [b]; cycle.append(cycle)\n"
        "print(len(b))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("2\n", "", 0)
