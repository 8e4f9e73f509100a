# SPDX-License-Identifier: Apache-2.0
"""Every tunable, once: name with unit, upstream's default, variable, meaning, and whether it acts.

`load_settings` reads them: from vLLM's ``kv_connector_extra_config``, else the environment, else
the default. ``docs/configuration.md`` has the rules; its table is made from this file::

    python -m kvbm.config                                  the table, in Markdown
    python -m kvbm.config --update docs/configuration.md   put it into that page
    python -m kvbm.config --json                           the settings in effect here
"""

import difflib
import fnmatch
import functools
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from kvbm import log
from kvbm.config_kinds import (
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
    LogDirectives,
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
from kvbm.config_sizes import check_shm_room, tier_slots
from kvbm.errors import ConfigError

__all__ = ["Settings", "Status", "Tunable", "load_settings", "tunables"]

logger = logging.getLogger(__name__)

PREFIX = "DYN_KVBM_"


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
    disable_write_combined: FlagSet = _unneeded(
        "DYN_KVBM_DISABLE_WRITE_COMBINED",
        False,
        "Host memory without write-combining; shared memory never has it.",
    )
    enable_numa: Text | None = _unneeded(
        "DYN_KVBM_ENABLE_NUMA", None, "Deprecated upstream, without effect there too."
    )
    memory_disable_numa: Truthy = _unneeded(
        "DYN_MEMORY_DISABLE_NUMA",
        False,
        "Turn NUMA placement off; the system's own placement is used.",
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

    # Disk tier
    disk_cache_gb: Gigabytes = _unsupported(
        "DYN_KVBM_DISK_CACHE_GB",
        0.0,
        "Size of the disk tier, the total over all ranks. 0: no disk tier.",
    )
    disk_cache_override_num_blocks: Blocks = _unsupported(
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS",
        0,
        "Size of the disk tier in blocks; wins over `DYN_KVBM_DISK_CACHE_GB`.",
    )
    disk_cache_dir: Folder = _unsupported(
        "DYN_KVBM_DISK_CACHE_DIR",
        Path("/tmp"),
        "Folder of the disk tier's files; made if it is missing.",
    )
    disk_allocator_type: AllocatorType = _unsupported(
        "DYN_KVBM_DISK_ALLOCATOR_TYPE",
        "default",
        "`default` sets O_DIRECT on the open file, `open-direct` opens the file with it.",
    )
    disk_disable_o_direct: FlagSet = _unsupported(
        "DYN_KVBM_DISK_DISABLE_O_DIRECT", False, "Read and write through the page cache."
    )
    disk_zerofill_fallback: FlagSet = _unsupported(
        "DYN_KVBM_DISK_ZEROFILL_FALLBACK",
        False,
        "Write zeros to reserve the file where the file system cannot do it at once.",
    )
    disable_disk_offload_filter: Truthy = _unsupported(
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER",
        False,
        "Write a block to disk the first time it is seen, not the second.",
    )
    disk_write_budget_gb_per_day: PositiveGigabytes | None = _unsupported(
        "DYN_KVBM_DISK_WRITE_BUDGET_GB_PER_DAY",
        None,
        "Most that is written to disk in a day. Unset: no limit.",
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
    leader_zmq_pub_port: Port = _unneeded(
        "DYN_KVBM_LEADER_ZMQ_PUB_PORT",
        56001,
        "Port of the leader's broadcasts; no socket is opened.",
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
    cache_stats_max_requests: Count = _unsupported(
        "DYN_KVBM_CACHE_STATS_MAX_REQUESTS",
        1000,
        "Requests in the sliding window of the hit rates.",
    )
    cache_stats_log_interval_secs: Seconds = _unsupported(
        "DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS",
        5,
        "Least time between two log lines of hit rates.",
    )
    metrics: Truthy = _unsupported("DYN_KVBM_METRICS", False, "Serve Prometheus metrics.")
    metrics_port: Port = _unsupported("DYN_KVBM_METRICS_PORT", 6880, "Port of the metrics.")
    enable_record: Truthy = _unsupported(
        "DYN_KVBM_ENABLE_RECORD", False, "Record the leader's calls."
    )
    record_path: File = _unsupported(
        "DYN_KVBM_RECORD_PATH",
        Path("/tmp/records.jsonl"),
        "File of the record, in JSON lines; emptied at start.",
    )
    kv_events_enable_consolidator: Truthy = _unsupported(
        "DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR",
        True,
        "Merge the engine's KV events with those of the tiers.",
    )
    kv_events_consolidator_mode: ConsolidatorMode = _unsupported(
        "DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE",
        "dedup",
        "`dedup` sends an event when a block enters its first tier and when it leaves its last; "
        "`passthrough` sends all.",
    )
    trtllm_zmq_port: Port | None = _unsupported(
        "DYN_KVBM_TRTLLM_ZMQ_PORT", None, "Port of TensorRT-LLM's KV events."
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
        """Size of the host tier in slots; see `kvbm.config_sizes.tier_slots`."""
        size_gb, override = self.cpu_cache_gb, self.cpu_cache_override_num_blocks
        return tier_slots("DYN_KVBM_CPU_CACHE_GB", size_gb, override, bytes_per_block_all_ranks)

    def disk_slots(self, bytes_per_block_all_ranks: int) -> int:
        """Size of the disk tier in slots; see `kvbm.config_sizes.tier_slots`."""
        size_gb, override = self.disk_cache_gb, self.disk_cache_override_num_blocks
        return tier_slots("DYN_KVBM_DISK_CACHE_GB", size_gb, override, bytes_per_block_all_ranks)

    def check_shm_room(self, bytes_needed: int) -> None:
        """Check that ``/dev/shm`` has this much room; see `kvbm.config_sizes.check_shm_room`."""
        setting = f"DYN_KVBM_CPU_CACHE_GB={self.cpu_cache_gb}"
        if self.cpu_cache_override_num_blocks > 0:
            blocks = self.cpu_cache_override_num_blocks
            setting = f"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS={blocks} ({setting} is overridden)"
        check_shm_room(setting, bytes_needed)

    def require_a_tier(self) -> None:
        """Check that there is somewhere to offload to.

        Raises
        ------
        ConfigError
            No tier that this version supports has a size.
        """
        sizes = [t for t in tunables() if t.field in _TIER_SIZES]
        usable = [t for t in sizes if t.status is Status.SUPPORTED]
        if any(getattr(self, t.field) > 0 for t in usable):
            return
        ignored = [t for t in sizes if t not in usable and getattr(self, t.field) > 0]
        text = "no cache tier is configured, so there is nowhere to offload KV blocks to. Set "
        text += " or ".join(f"{t.variable} ({t.kind.allowed})" for t in usable)
        text += ": the total over all ranks, for example DYN_KVBM_CPU_CACHE_GB=20 or "
        text += "kv_connector_extra_config={'cpu_cache_gb': 20}."
        for t in ignored:
            text += f" {t.variable}={getattr(self, t.field)} alone is not enough: {t.status.value}."
        raise ConfigError(text)


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


# ---- reading -------------------------------------------------------------------------------------

# Names that upstream documents or mentions but does not read, and what to do instead.
NOT_READ = {
    "DYN_KVBM_TRANSFER_BATCH_SIZE": "upstream reads DYN_KVBM_MAX_TRANSFER_BATCH_SIZE",
    "DYN_KVBM_ENABLE": "to turn kvbm off, configure no connector",
    "DYN_KVBM_DEVICE_LAYOUT_TYPE": "the layout is taken from the engine's tensors",
    "DYN_KVBM_NIXL_BACKEND_*": "backends are probed",
    "DYN_KVBM_OBJECT_*": "there is no object tier",
}
# Keys of kv_connector_extra_config, or of a whole vLLM KVTransferConfig, that are not for kvbm.
FOREIGN_KEYS = frozenset(
    {
        "connectors",
        "enable_permute_local_kv",
        "engine_id",
        "kv_buffer_device",
        "kv_connector",
        "kv_connector_extra_config",
        "kv_connector_module_path",
        "kv_ip",
        "kv_load_failure_policy",
        "kv_parallel_size",
        "kv_port",
        "kv_rank",
        "kv_role",
    }
)


class _Given(NamedTuple):
    """A value as somebody gave it, and where."""

    label: str
    value: object

    def __str__(self) -> str:
        return f"{self.label}={self.value!r}"


def load_settings(
    extra_config: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Read and check all settings, and set the log levels that they ask for.

    Names and values that have no effect are logged, each once a process.

    Parameters
    ----------
    extra_config
        vLLM's ``kv_connector_extra_config``: field or variable names to values. None as a value
        means not set.
    environ
        Environment variables; `os.environ` if None.

    Returns
    -------
    Settings
        Extra config wins over the environment, the environment over the default.

    Raises
    ------
    ConfigError
        Values that are not allowed: all of them, each with where it stands and what is allowed.
    """
    environ = os.environ if environ is None else environ
    extra_config = {} if extra_config is None else extra_config
    if not isinstance(extra_config, Mapping):
        raise ConfigError(
            f"kv_connector_extra_config={extra_config!r} is not valid "
            "(allowed: a mapping of names to values)"
        )
    in_environ = _from_environ(environ)
    in_extra = _from_extra_config(extra_config)
    errors: list[str] = []
    low = _validated(in_environ, errors)
    high = _validated(in_extra, errors)
    settings = low.model_copy(update={f: getattr(high, f) for f in high.model_fields_set})
    log.configure(settings.log)
    _warn_unknown(environ, extra_config)
    if errors:
        raise ConfigError("; ".join(errors))
    for field in sorted(low.model_fields_set & high.model_fields_set):
        if getattr(low, field) != getattr(high, field):
            _warn_differs(used=in_extra[field], other=in_environ[field])
    _report_without_effect(settings, in_environ | in_extra)
    return settings


def _is_set(value: object, tunable: Tunable) -> bool:
    empty = isinstance(value, str) and not value.strip()
    return value is not None and (tunable.kind.empty_is_value or not empty)


def _from_environ(environ: Mapping[str, str]) -> dict[str, _Given]:
    """Values of known variables, by field."""
    return {
        t.field: _Given(t.variable, environ[t.variable])
        for t in tunables()
        if _is_set(environ.get(t.variable), t)
    }


def _from_extra_config(extra_config: Mapping[str, Any]) -> dict[str, _Given]:
    """Values of known keys, by field. Between its two names, that of the field wins."""
    given: dict[str, _Given] = {}
    for t in tunables():
        for key in (t.field, t.variable):
            value = extra_config.get(key)
            if not _is_set(value, t):
                continue
            here = _Given(f"kv_connector_extra_config[{key!r}]", value)
            first = given.setdefault(t.field, here)
            if first.value != here.value:
                _warn_differs(used=first, other=here)
    return given


def _validated(given: Mapping[str, _Given], errors: list[str]) -> Settings:
    """Settings with the given values; a text is added to `errors` for each that is not allowed."""
    try:
        return Settings.model_validate({field: g.value for field, g in given.items()})
    except ValidationError as error:
        kinds = {t.field: t.kind for t in tunables()}
        for field in dict.fromkeys(str(e["loc"][0]) for e in error.errors()):
            errors.append(f"{given[field]} is not valid (allowed: {kinds[field].allowed})")
        return Settings()


def _warn_unknown(environ: Mapping[str, str], extra_config: Mapping[str, Any]) -> None:
    """Warn about names that nobody reads, and name the nearest that is read."""
    variables = {t.variable for t in tunables()}
    for name in sorted({n for n in environ if n.startswith(PREFIX)} - variables):
        _warn_once(_unknown_text(name, name, variables))
    keys = variables | {t.field for t in tunables()}
    for key in sorted(extra_config.keys() - keys - FOREIGN_KEYS, key=str):
        label = f"kv_connector_extra_config[{key!r}]"
        _warn_once(_unknown_text(str(key), label, keys))


def _unknown_text(name: str, label: str, known: Iterable[str]) -> str:
    for pattern, advice in NOT_READ.items():
        if fnmatch.fnmatchcase(name, pattern):
            return f"{label} has no effect, neither here nor upstream: {advice}"
    # Compared without the common start, which would make everything look alike.
    bare = {n.removeprefix(PREFIX): n for n in sorted(known)}
    match = difflib.get_close_matches(name.removeprefix(PREFIX), bare, n=1)
    hint = f"; did you mean {bare[match[0]]}?" if match else ""
    return f"{label} is not a setting of kvbm and has no effect{hint}"


def _warn_differs(used: _Given, other: _Given) -> None:
    _warn_once(f"{used} is used; {other} differs and is ignored")


def _report_without_effect(settings: Settings, given: Mapping[str, _Given]) -> None:
    for tunable in tunables():
        if tunable.field not in given:
            continue
        shown = given[tunable.field]
        if tunable.status is Status.UNNEEDED:
            _log_once(logging.INFO, f"{shown} is accepted and not needed: {tunable.description}")
        elif (
            tunable.status is Status.UNSUPPORTED
            and getattr(settings, tunable.field) != tunable.default
        ):
            _warn_once(f"{shown} is not supported by this version and has no effect")


@functools.lru_cache(maxsize=1024)
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)


def _warn_once(message: str) -> None:
    _log_once(logging.WARNING, message)


if __name__ == "__main__":
    from kvbm.config_table import main

    sys.exit(main())
