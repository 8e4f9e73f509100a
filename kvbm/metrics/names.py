# SPDX-License-Identifier: Apache-2.0
"""Which metric shows which counter of the segment."""

from __future__ import annotations

from typing import NamedTuple

from kvbm._fast.segment import COUNTER_NAMES

DEVICE, HOST, DISK = "device", "host", "disk"

# Upstream's names, without labels, exactly as it has them (no `_total`), with tier and counter that
# each shows. None: what it counts does not exist here, and stays 0.
UPSTREAM: dict[str, tuple[tuple[str, str] | None, str]] = {
    "kvbm_offload_blocks_d2h": ((HOST, "blocks_stored"), "Blocks copied from device to host."),
    "kvbm_offload_blocks_h2d": ((DISK, "blocks_stored"), "Blocks copied from host to disk."),
    "kvbm_offload_blocks_d2d": (None, "Blocks copied from device to disk, past the host."),
    "kvbm_offload_blocks_d2o": (None, "Blocks copied from device to an object store."),
    "kvbm_onboard_blocks_h2d": ((HOST, "blocks_loaded"), "Blocks copied from host to device."),
    "kvbm_onboard_blocks_d2d": (None, "Blocks copied from disk to device, past the host."),
    "kvbm_onboard_blocks_o2d": (None, "Blocks copied from an object store to device."),
    "kvbm_matched_tokens": ((HOST, "matched_tokens"), "Tokens found in the cache and loaded."),
    "kvbm_object_read_failures": (None, "Reads from an object store that failed."),
    "kvbm_object_write_failures": (None, "Writes to an object store that failed."),
}
HIT_RATES = {
    "kvbm_host_cache_hit_rate": "Share of the blocks that requests asked for: found on the host.",
    "kvbm_disk_cache_hit_rate": "Share of the blocks that requests asked for: found on disk.",
    "kvbm_object_cache_hit_rate": "There is no object store: 0.",
}


class Shown(NamedTuple):
    """How a counter is shown.

    Attributes
    ----------
    metric : str
        Name without `_total`.
    meaning : str
        In a sentence.
    labels : dict
        Beside those of the line.
    factor : float
        To seconds and so on.
    """

    metric: str
    meaning: str
    labels: dict[str, str]
    factor: float = 1.0


STORED = {"source": DEVICE, "target": HOST}
LOADED = {"source": HOST, "target": DEVICE}
_TRANSFERS = "kvbm_transfers", "Transfers, by how they ended."
_BLOCKS = "kvbm_transferred_blocks", "Blocks copied."
_BYTES = "kvbm_transferred_bytes", "Bytes copied."
_SECONDS = "kvbm_transfer_seconds", "Time spent copying."
_EVICTED = "kvbm_blocks_evicted", "Blocks that left the tier, by why."
_SKIPPED = "kvbm_stores_skipped", "What was not stored: blocks without a slot, transfers too many."

COUNTERS: dict[str, Shown] = {
    "lookups": Shown("kvbm_lookups", "Look-ups of a prefix.", {}),
    "lookup_probes": Shown("kvbm_lookup_probes", "Probes of the index by look-ups.", {}),
    "lookup_blocks": Shown("kvbm_blocks_looked_up", "Blocks that were looked up.", {}),
    "matched_blocks": Shown("kvbm_blocks_matched", "Blocks of these that were found.", {}),
    "matched_tokens": Shown("kvbm_tokens_matched", "Tokens found and loaded.", {}),
    "reserved": Shown("kvbm_blocks_reserved", "Blocks that were given a slot.", {}),
    "published": Shown("kvbm_blocks_published", "Blocks that were filled and can be found.", {}),
    "evicted_capacity": Shown(*_EVICTED, {"reason": "capacity"}),
    "evicted_cleared": Shown(*_EVICTED, {"reason": "cleared"}),
    "evicted_unreadable": Shown(*_EVICTED, {"reason": "unreadable"}),
    "abandoned": Shown("kvbm_blocks_abandoned", "Blocks given back before they were filled.", {}),
    "deduplicated": Shown("kvbm_blocks_deduplicated", "Blocks not stored: they were there.", {}),
    "stores": Shown(*_TRANSFERS, STORED | {"result": "done"}),
    "loads": Shown(*_TRANSFERS, LOADED | {"result": "done"}),
    "stores_failed": Shown(*_TRANSFERS, STORED | {"result": "failed"}),
    "loads_failed": Shown(*_TRANSFERS, LOADED | {"result": "failed"}),
    "stores_cancelled": Shown(*_TRANSFERS, STORED | {"result": "cancelled"}),
    "loads_cancelled": Shown(*_TRANSFERS, LOADED | {"result": "cancelled"}),
    "blocks_stored": Shown(*_BLOCKS, STORED),
    "blocks_loaded": Shown(*_BLOCKS, LOADED),
    "bytes_stored": Shown(*_BYTES, STORED),
    "bytes_loaded": Shown(*_BYTES, LOADED),
    "store_ns": Shown(*_SECONDS, STORED, 1e-9),
    "load_ns": Shown(*_SECONDS, LOADED, 1e-9),
    "skipped_no_slot": Shown(*_SKIPPED, {"reason": "no_slot"}),
    "skipped_no_operation": Shown(*_SKIPPED, {"reason": "no_operation"}),
    "declined": Shown("kvbm_declined", "Changes that were left out during a recovery.", {}),
    "index_full": Shown("kvbm_index_full", "Blocks not stored: no place in the index.", {}),
    "stale_entries": Shown("kvbm_stale_entries", "Index entries that were replaced.", {}),
    "check_failures": Shown("kvbm_check_failures", "Rows that were not what they should be.", {}),
    "recoveries": Shown("kvbm_recoveries", "Recoveries after a death.", {}),
    "recovered": Shown(
        "kvbm_blocks_recovered", "Blocks given back that the dead were filling or evicting.", {}
    ),
    "cpu_ns": Shown(
        "kvbm_cpu_seconds", "CPU time: of a rank's copies, of an engine's calls.", {}, 1e-9
    ),
    "errors": Shown("kvbm_errors", "Surprises that cost a request its cache.", {}),
    "resets": Shown("kvbm_resets", "Resets of the cache.", {}),
}

IN_OTHERS = frozenset({"evicted"})
"""Counters that are not shown: sums of others that are."""

# The disk tier's segment counts what moves between it and the host tier.
_FROM_DEVICE = {DEVICE: HOST, HOST: DISK}


SHOWN = tuple(name for name in COUNTER_NAMES if name not in IN_OTHERS)


def shown(counter: str, tier: str = HOST) -> Shown:
    """How a tier's counter is shown; one that the table does not have, under its own name."""
    found = COUNTERS.get(counter) or Shown(f"kvbm_{counter}", f"Counter {counter}.", {})
    if tier == HOST or "source" not in found.labels:
        return found
    ends = {end: _FROM_DEVICE[found.labels[end]] for end in ("source", "target")}
    return found._replace(labels=found.labels | ends)


LINE_LABELS = ("instance", "engine", "leader", "rank")
COUNTER_LABELS = (*LINE_LABELS, "tier")

HISTOGRAM_LABELS = (*COUNTER_LABELS, "source", "target")
HISTOGRAMS: dict[str, tuple[str, str]] = {
    "kvbm_transfer_latency_seconds": (
        "total",
        "What a transfer that was done took on a rank, from its submission on.",
    ),
    "kvbm_transfer_copy_seconds": ("copy", "What its copy took."),
}
"""Histogram: which of the segment's it shows, meaning."""


def label_names(metric: str) -> tuple[str, ...]:
    """Labels of one of our counters, in order."""
    for counter in SHOWN:
        if shown(counter).metric == metric:
            return (*COUNTER_LABELS, *shown(counter).labels)
    raise KeyError(metric)


GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "kvbm_up": ("Whether the instance's segment can be read.", ("instance",)),
    "kvbm_slots": ("Slots of a tier, by use.", ("instance", "tier", "state")),
    "kvbm_ready_slots": ("Slots whose memory is usable on a rank.", ("instance", "rank")),
    "kvbm_blocks": ("Blocks by state.", ("instance", "state")),
    "kvbm_blocks_held": ("Registered blocks that somebody holds.", ("instance",)),
    "kvbm_pinned_blocks": ("Blocks that a leader holds.", ("instance", "engine", "leader")),
    "kvbm_operations": (
        "Transfers in flight.",
        ("instance", "engine", "leader", "kind", "state"),
    ),
    "kvbm_oldest_operation_seconds": (
        "Age of the oldest transfer in flight; 0 if there is none.",
        ("instance",),
    ),
    "kvbm_queued_operations": ("Transfers that a worker has not seen yet.", LINE_LABELS),
    "kvbm_participants": ("Attached processes.", ("instance", "role", "state")),
    "kvbm_recovering": ("Whether a recovery is under way.", ("instance",)),
    "kvbm_disk_device_written_bytes": (
        "Written to the device under the disk tier since the machine started, by everybody.",
        ("instance", "device"),
    ),
    "kvbm_disk_device_lifetime_written_bytes": (
        "Written to its drives in their life; missing where it cannot be read.",
        ("instance", "device"),
    ),
    "kvbm_disk_device_wear_ratio": (
        "Share of the drives' life that is used, as they say; missing where it cannot be read.",
        ("instance", "device"),
    ),
    "kvbm_disk_device_spare_ratio": (
        "Share of their spare blocks that is left; missing where it cannot be read.",
        ("instance", "device"),
    ),
}
