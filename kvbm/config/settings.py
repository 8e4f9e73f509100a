# SPDX-License-Identifier: Apache-2.0
"""Every tunable, once: name with unit, upstream's default, variable, meaning, and whether it acts.

The table of ``docs/configuration.md`` is made from this file (`kvbm.config.table`).
"""

import functools
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kvbm.config.kinds import (
    AllocatorType,
    Blocks,
    ConsolidatorMode,
    Count,
    File,
    FlagSet,
    Folder,
    Gigabytes,
    GroupId,
    InstanceName,
    LoadFailurePolicy,
    LogDirectives,
    PolicyName,
    Port,
    PositiveGigabytes,
    PositiveSeconds,
    Seconds,
    Status,
    Text,
    Truthy,
    Tunable,
    Uint32,
    tunable_field,
)
from kvbm.config.sizes import check_shm_room, tier_slots
from kvbm.errors import ConfigError

_supported = functools.partial(tunable_field, Status.SUPPORTED)
_unneeded = functools.partial(tunable_field, Status.UNNEEDED)
_unsupported = functools.partial(tunable_field, Status.UNSUPPORTED)


class Settings(BaseModel):
    """All settings of one process, checked and frozen. Made by `load_settings`.

    A field is called like its variable, in lower case, without ``DYN_KVBM_`` or ``DYN_``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Host tier
    cpu_cache_gb: Gigabytes = _supported(
        "DYN_KVBM_CPU_CACHE_GB",
        0.0,
        "Size of the host tier, the total over all ranks. 0: no host tier.",
    )
    cpu_cache_override_num_blocks: Blocks = _supported(
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS",
        0,
        "Size of the host tier in blocks; wins over `DYN_KVBM_CPU_CACHE_GB`.",
    )
    host_offload_prefix_min_priority: Uint32 = _supported(
        "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY",
        0,
        "Offload only the leading blocks of a request that have this priority or more. 0: all.",
    )
    verify_host: Truthy = _supported(
        "DYN_KVBM_VERIFY_HOST", False, "Check a checksum of host blocks when they are loaded."
    )
    eviction_policy: PolicyName = _supported(
        "DYN_KVBM_EVICTION_POLICY",
        "lru",
        "Which host block is evicted first, among those of the lowest priority: `lru` the least "
        "recently returned, `reuse` the least likely to be used again, as it learns "
        "(docs/eviction.md).",
    )
    device_staging: Truthy = _supported(
        "DYN_KVBM_DEVICE_STAGING",
        True,
        "Copy blocks of many short pieces through buffers on the GPU, 128 MiB in all. 0: straight.",
    )
    device_calibration: Truthy = _supported(
        "DYN_KVBM_DEVICE_CALIBRATION",
        True,
        "Measure once a GPU below which size pieces are not copied straight, for some tenths of a "
        "second, and keep it in `$XDG_CACHE_HOME/kvbm`. 0: assume what an H100 has.",
    )
    disable_write_combined: FlagSet = _unneeded(
        "DYN_KVBM_DISABLE_WRITE_COMBINED",
        False,
        "Host memory without write-combining; shared memory never has it.",
    )
    enable_numa: Text | None = _unneeded(
        "DYN_KVBM_ENABLE_NUMA", None, "Deprecated upstream, without effect there too."
    )
    memory_disable_numa: Truthy = _supported(
        "DYN_MEMORY_DISABLE_NUMA",
        False,
        "Touch the host tier's memory on any processor instead of those near the GPU.",
    )

    # Shared memory
    instance: InstanceName | None = _supported(
        "DYN_KVBM_INSTANCE",
        None,
        "Name of a cache that outlives the engine; engines that give the same name share it. "
        "Unset: private, removed at exit.",
    )
    shm_group: GroupId | None = _supported(
        "DYN_KVBM_SHM_GROUP",
        None,
        "Group whose members may attach to the cache. Unset: its owner only.",
    )
    leader_worker_init_timeout_secs: PositiveSeconds = _supported(
        "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS",
        1800,
        "How long the leader waits at start for all workers.",
    )

    load_failure_policy: LoadFailurePolicy = _supported(
        "DYN_KVBM_LOAD_FAILURE_POLICY",
        "recompute",
        "What becomes of a request whose load fails: `recompute` computes what did not arrive, "
        "`fail` ends the request with an error.",
    )

    # Disk tier
    disk_cache_gb: Gigabytes = _supported(
        "DYN_KVBM_DISK_CACHE_GB",
        0.0,
        "Size of the disk tier, the total over all ranks. 0: no disk tier.",
    )
    disk_cache_override_num_blocks: Blocks = _supported(
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS",
        0,
        "Size of the disk tier in blocks; wins over `DYN_KVBM_DISK_CACHE_GB`.",
    )
    disk_cache_dir: Folder = _supported(
        "DYN_KVBM_DISK_CACHE_DIR",
        Path("/tmp"),
        "Folder of the disk tier's files; made if it is missing.",
    )
    disk_allocator_type: AllocatorType = _supported(
        "DYN_KVBM_DISK_ALLOCATOR_TYPE",
        "default",
        "`default` sets O_DIRECT on the open file, `open-direct` opens the file with it.",
    )
    disk_disable_o_direct: FlagSet = _supported(
        "DYN_KVBM_DISK_DISABLE_O_DIRECT", False, "Read and write through the page cache."
    )
    disk_zerofill_fallback: FlagSet = _supported(
        "DYN_KVBM_DISK_ZEROFILL_FALLBACK",
        False,
        "Write zeros to reserve the file where the file system cannot do it at once.",
    )
    disable_disk_offload_filter: Truthy = _supported(
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER",
        False,
        "Write a block to disk the first time it is seen, not the second.",
    )
    disk_write_budget_gb_per_day: PositiveGigabytes | None = _supported(
        "DYN_KVBM_DISK_WRITE_BUDGET_GB_PER_DAY",
        None,
        "Most that is written to disk in a day. Unset: no limit.",
    )

    nixl_backend_posix: Truthy = _supported(
        "DYN_KVBM_NIXL_BACKEND_POSIX",
        False,
        "Move the disk tier's blocks with NIXL's POSIX backend; needs `kvbm[nixl]`.",
    )
    nixl_backend_gds: Truthy = _supported(
        "DYN_KVBM_NIXL_BACKEND_GDS",
        False,
        "With its GDS backend, where that works; it comes before POSIX.",
    )
    nixl_backend_gds_mt: Truthy = _supported(
        "DYN_KVBM_NIXL_BACKEND_GDS_MT",
        False,
        "With its GDS_MT backend, where that works; it comes before GDS.",
    )

    # Transfers
    max_concurrent_transfers: Count = _unneeded(
        "DYN_KVBM_MAX_CONCURRENT_TRANSFERS",
        4,
        "Transfers in flight a path; the table of operations is the bound.",
    )
    max_transfer_batch_size: Count = _unneeded(
        "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE",
        16,
        "Blocks a transfer; neighbouring blocks are copied together as far as they go.",
    )
    leader_zmq_host: Text = _unneeded(
        "DYN_KVBM_LEADER_ZMQ_HOST",
        "127.0.0.1",
        "Leader and workers meet in shared memory, not over a socket.",
    )
    leader_zmq_pub_port: Port = _supported(
        "DYN_KVBM_LEADER_ZMQ_PUB_PORT",
        56001,
        "KV events are published 1000 ports above it and replayed 2000 above it, where a rank of "
        "data parallelism adds its number. No socket is opened on it itself.",
    )
    leader_zmq_ack_port: Port = _unneeded(
        "DYN_KVBM_LEADER_ZMQ_ACK_PORT", 56002, "Port of the workers' answers; no socket is opened."
    )
    nccl_mla_mode: Truthy = _unneeded(
        "DYN_KVBM_NCCL_MLA_MODE",
        False,
        "Load replicated KV on one rank and broadcast it; here each rank loads its own.",
    )
    nccl_max_ctas: Count = _unneeded(
        "DYN_KVBM_NCCL_MAX_CTAS", 8, "Share of the GPU that NCCL may use; NCCL is not used."
    )
    fatbin_path: File | None = _unneeded(
        "DYN_FATBIN_PATH", None, "File of copy kernels; none is loaded."
    )

    # Metrics, events, records
    cache_stats_max_requests: Count = _supported(
        "DYN_KVBM_CACHE_STATS_MAX_REQUESTS",
        1000,
        "Requests in the sliding window of the hit rates.",
    )
    cache_stats_log_interval_secs: Seconds = _supported(
        "DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS",
        5,
        "Least time between two log lines of hit rates.",
    )
    metrics: Truthy = _supported("DYN_KVBM_METRICS", False, "Serve Prometheus metrics.")
    metrics_port: Port = _supported("DYN_KVBM_METRICS_PORT", 6880, "Port of the metrics.")
    enable_record: Truthy = _supported(
        "DYN_KVBM_ENABLE_RECORD", False, "Record the leader's calls and what came of them."
    )
    record_path: File = _supported(
        "DYN_KVBM_RECORD_PATH",
        Path("/tmp/records.jsonl"),
        "File of the record, in JSON lines; emptied at start.",
    )
    record_max_gb: PositiveGigabytes = _supported(
        "DYN_KVBM_RECORD_MAX_GB", 4.0, "Size at which the record ends."
    )
    kv_events_enable_consolidator: Truthy = _supported(
        "DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR",
        True,
        "Publish the engine's KV events, if it has any, and those of the tiers as one stream.",
    )
    kv_events_consolidator_mode: ConsolidatorMode = _supported(
        "DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE",
        "dedup",
        "`dedup` sends an event when a block enters its first tier and when it leaves its last; "
        "`passthrough` sends all.",
    )
    trtllm_zmq_port: Port | None = _supported(
        "DYN_KVBM_TRTLLM_ZMQ_PORT",
        None,
        "Port at which TensorRT-LLM's KV events are published, by `dynamo.trtllm`.",
    )

    # General
    log: LogDirectives = _supported("DYN_LOG", "info", "Levels of the `kvbm` loggers.")
    otel_export_enabled: Truthy = _unsupported(
        "OTEL_EXPORT_ENABLED", False, "Export traces by OpenTelemetry."
    )
    runtime_enabled_kvbm: Truthy = _unsupported(
        "DYN_RUNTIME_ENABLED_KVBM", False, "Attach to a Dynamo runtime."
    )

    def host_slots(self, bytes_per_block_all_ranks: int) -> int:
        """Size of the host tier in slots; see `kvbm.config.sizes.tier_slots`."""
        size_gb, override = self.cpu_cache_gb, self.cpu_cache_override_num_blocks
        return tier_slots("DYN_KVBM_CPU_CACHE_GB", size_gb, override, bytes_per_block_all_ranks)

    def staging_slots(self, bytes_per_block_all_ranks: int) -> int:
        """Size of the host tier in slots where only a disk tier is configured.

        Blocks pass through host memory on their way to and from disk.
        """
        wanted = max(STAGING_BLOCKS_MIN, STAGING_BYTES // bytes_per_block_all_ranks)
        return min(wanted, self.disk_slots(bytes_per_block_all_ranks))

    def disk_slots(self, bytes_per_block_all_ranks: int) -> int:
        """Size of the disk tier in slots; see `kvbm.config.sizes.tier_slots`."""
        size_gb, override = self.disk_cache_gb, self.disk_cache_override_num_blocks
        return tier_slots("DYN_KVBM_DISK_CACHE_GB", size_gb, override, bytes_per_block_all_ranks)

    def check_shm_room(self, bytes_wanted: int) -> None:
        """Check that ``/dev/shm`` has this much room; see `kvbm.config.sizes.check_shm_room`."""
        check_shm_room(self._host_setting(), bytes_wanted)

    def _host_setting(self) -> str:
        """The setting that asks for host memory, with its value."""
        size = f"DYN_KVBM_CPU_CACHE_GB={self.cpu_cache_gb}"
        if self.cpu_cache_override_num_blocks > 0:
            blocks = self.cpu_cache_override_num_blocks
            return f"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS={blocks} ({size} is overridden)"
        if self.cpu_cache_gb > 0:
            return size
        return f"{size} and a disk tier, whose blocks pass through host memory"

    @property
    def host_bytes(self) -> int:
        """Size of the host tier in bytes, as far as it is known before a block's size is."""
        return 0 if self.cpu_cache_override_num_blocks else int(self.cpu_cache_gb * 1e9)

    def require_a_tier(self) -> None:
        """Check that there is somewhere to offload to.

        Raises
        ------
        ConfigError
            No tier has a size.
        """
        sizes = [t for t in tunables() if t.field in _TIER_SIZES]
        if any(getattr(self, t.field) > 0 for t in sizes):
            return
        text = "no cache tier is configured, so there is nowhere to offload KV blocks to. Set "
        text += " or ".join(f"{t.variable} ({t.kind.allowed})" for t in sizes)
        text += ": the total over all ranks, for example DYN_KVBM_CPU_CACHE_GB=20 or "
        text += "kv_connector_extra_config={'cpu_cache_gb': 20}."
        raise ConfigError(text)


STAGING_BYTES = 1_000_000_000
STAGING_BLOCKS_MIN = 64
"""Host memory through which blocks pass where there is no host tier."""

_TIER_SIZES = (
    "cpu_cache_gb",
    "cpu_cache_override_num_blocks",
    "disk_cache_gb",
    "disk_cache_override_num_blocks",
)


@functools.cache
def tunables() -> tuple[Tunable, ...]:
    """All tunables, in the order of the documentation."""
    return tuple(Tunable.of(field, info) for field, info in Settings.model_fields.items())
