# SPDX-License-Identifier: Apache-2.0
"""Settings and code agree: what is said to act is read, and all of upstream's names are there."""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm import config
from kvbm.config import Status, settings, tunables
from kvbm.config.loading import NOT_READ

KVBM = Path(config.__file__).parent.parent

# What upstream's last version reads, but for the trial variables of its tests.
READ_UPSTREAM = """
DYN_FATBIN_PATH
DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS
DYN_KVBM_CACHE_STATS_MAX_REQUESTS
DYN_KVBM_CPU_CACHE_GB
DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS
DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER
DYN_KVBM_DISABLE_WRITE_COMBINED
DYN_KVBM_DISK_ALLOCATOR_TYPE
DYN_KVBM_DISK_CACHE_DIR
DYN_KVBM_DISK_CACHE_GB
DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS
DYN_KVBM_DISK_DISABLE_O_DIRECT
DYN_KVBM_DISK_ZEROFILL_FALLBACK
DYN_KVBM_ENABLE_NUMA
DYN_KVBM_ENABLE_RECORD
DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY
DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE
DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR
DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS
DYN_KVBM_LEADER_ZMQ_ACK_PORT
DYN_KVBM_LEADER_ZMQ_HOST
DYN_KVBM_LEADER_ZMQ_PUB_PORT
DYN_KVBM_MAX_CONCURRENT_TRANSFERS
DYN_KVBM_MAX_TRANSFER_BATCH_SIZE
DYN_KVBM_METRICS
DYN_KVBM_METRICS_PORT
DYN_KVBM_NCCL_MAX_CTAS
DYN_KVBM_NCCL_MLA_MODE
DYN_KVBM_TRTLLM_ZMQ_PORT
DYN_LOG
DYN_MEMORY_DISABLE_NUMA
DYN_RUNTIME_ENABLED_KVBM
OTEL_EXPORT_ENABLED
"""
# Documented or mentioned upstream, and read by nobody.
NOT_READ_UPSTREAM = """
DYN_KVBM_DEVICE_LAYOUT_TYPE
DYN_KVBM_ENABLE
DYN_KVBM_OBJECT_ACCESS_KEY
DYN_KVBM_OBJECT_BUCKET
DYN_KVBM_OBJECT_ENABLED
DYN_KVBM_OBJECT_ENDPOINT
DYN_KVBM_OBJECT_NUM_BLOCKS
DYN_KVBM_OBJECT_REGION
DYN_KVBM_OBJECT_SECRET_KEY
DYN_KVBM_TRANSFER_BATCH_SIZE
"""


def attributes(node: ast.AST, owners: tuple[str, ...]) -> Iterator[str]:
    """Names that are read as attributes of something that is called like one of `owners`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Load):
            owner = part.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if name in owners:
                yield part.attr


def read_of_settings() -> set[str]:
    """Fields that the code reads, directly or through a method of `Settings` that it calls."""
    own = KVBM / "config" / "settings.py"
    read: set[str] = set()
    for path in KVBM.rglob("*.py"):
        if path != own:
            read |= set(attributes(ast.parse(path.read_text()), ("settings", "_settings")))
    tree = ast.parse(own.read_text())
    read |= set(attributes(tree, ("settings",)))
    model = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Settings")
    for method in model.body:
        if isinstance(method, ast.FunctionDef) and method.name in read:
            read |= set(attributes(method, ("self",)))
            if "_TIER_SIZES" in ast.unparse(method):  # by getattr
                read |= set(settings._TIER_SIZES)
    return read


def test_every_setting_that_is_said_to_act_is_read() -> None:
    acting = {t.field for t in tunables() if t.status is Status.SUPPORTED}
    assert acting - read_of_settings() == set()


def test_a_setting_that_is_said_not_to_act_is_not_read() -> None:
    other = {t.field for t in tunables() if t.status is not Status.SUPPORTED}
    assert other & read_of_settings() <= set(settings._TIER_SIZES)


@pytest.mark.parametrize("name", READ_UPSTREAM.split())
def test_every_variable_that_upstream_reads_is_in_the_table(name: str) -> None:
    assert name in {t.variable for t in tunables()}


@pytest.mark.parametrize("name", NOT_READ_UPSTREAM.split())
def test_every_variable_that_upstream_only_documents_has_its_advice(name: str) -> None:
    assert name not in {t.variable for t in tunables()}
    assert any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_READ)
