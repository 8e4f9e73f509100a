# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's own tests are run with kvbm's connector, and why the others are not.

Names are those of vLLM 0.32; what another version does not have is passed over.
``docs/vllm-tests.md`` says the same in words.
"""

from __future__ import annotations

import fnmatch

UNIT = "tests/v1/kv_connector/unit"
CORE = "tests/v1/core"

FILES = (
    f"{UNIT}/test_cache_pollution_prevention.py",
    f"{UNIT}/test_error_propagation.py",
    f"{UNIT}/test_hma_auto_config.py",
    f"{UNIT}/test_invalid_blocks_correctness.py",
    f"{UNIT}/test_kv_connector_lifecycle.py",
    f"{UNIT}/test_kv_load_failure_recovery.py",
    f"{UNIT}/test_remote_prefill_lifecycle.py",
    f"{CORE}/test_async_scheduler.py",
    f"{CORE}/test_deferred_block_free.py",
    f"{CORE}/test_prefix_caching.py",
    f"{CORE}/test_prefix_replay.py",
    f"{CORE}/test_scheduler.py",
)
"""Files with tests that make an engine's scheduler with a connector by name."""

IN_CORE = frozenset(
    {
        "test_abort_request_finished_recving",
        "test_abort_request_waiting_for_remote_kvs",
        "test_async_load_reservation_prevents_wedge_e2e",
        "test_async_remote_kv_hit_replays_after_load",
        "test_connector_metadata_precedes_async_placeholder_advance",
        "test_delayed_kv_connector_free_keeps_scheduler_active",
        "test_external_prefix_cache_metrics",
        "test_gate_enabled_for_async_consumer",
        "test_has_sync_kv_loads",
        "test_hisparse_admitted_async_loads_can_finish_with_nothing_running",
        "test_hisparse_async_admission_requires_full_prompt_host_pages",
        "test_hit_no_longer_than_window_is_ignored",
        "test_kv_connector_basic",
        "test_kv_connector_handles_preemption",
        "test_kv_connector_honors_skip_reading_prefix_cache",
        "test_kv_connector_records_external_cache_hit_sources",
        "test_kv_connector_unable_to_allocate",
        "test_kv_load_carrying_window_does_not_replay",
        "test_kv_load_zeroing_respects_loaded_groups",
        "test_kv_pressure_preempt_mid_handoff",
        "test_pause_new_drains_async_kv_loads",
        "test_prefix_cache_query_not_inflated_by_connector_defer",
        "test_prepend_skipped_requests_order",
        "test_priority_scheduling_preemption_and_resumption_when_out_of_kv",
        "test_remote_kv_hit_is_taken_in_whole_blocks",
        "test_requires_kv_delivery_defaults_to_producer_role",
        "test_spec_decode_padding_resumed_request_without_running_requests",
        "test_throttle_prefills_defers_remote_kv_resume_with_local_prefill",
        "test_throttle_prefills_excludes_fully_transferred_remote_kv",
    }
)
"""Of the files in CORE only these tests have a connector."""

HYBRID = "the model is a hybrid one, or the connector is expected to support the hybrid manager"

NOT_OURS = (
    ("test_remote_prefill_lifecycle.py::test_basic_lifecycle", "the last token is never loaded"),
    ("test_remote_prefill_lifecycle.py::test_full_block_prompt", "the last token is never loaded"),
    (
        "test_remote_prefill_lifecycle.py::test_no_spurious_prefix_caching",
        "a second request with the same prompt is expected to find nothing; it finds its blocks",
    ),
    ("test_remote_prefill_lifecycle.py::test_p_side_chunked_prefill_mamba", HYBRID),
    ("test_remote_prefill_lifecycle.py::test_async_load_reserves_blocks_for_promotion_*", HYBRID),
    ("test_remote_prefill_lifecycle.py::test_async_load_does_not_double_reserve_*", HYBRID),
    (
        "test_async_scheduler.py::test_requires_kv_delivery_defaults_to_producer_role",
        "nobody waits for the stores of a cache, whatever its role: requires_kv_delivery is False",
    ),
    (
        "test_async_scheduler.py::test_kv_pressure_preempt_mid_handoff[[]kv_producer-*",
        "nobody waits for the stores of a cache, whatever its role: requires_kv_delivery is False",
    ),
    (
        "test_scheduler.py::test_priority_scheduling_preemption_and_resumption_when_out_of_kv",
        "a resumed request is expected to compute again at once; it loads its blocks first",
    ),
    ("test_prefix_caching.py::test_hisparse_*", "HiSparse adds groups of its own to each request"),
)
"""Patterns of test ids, and why the connector is not meant to pass."""


def why_not(node_id: str) -> str | None:
    """Reason for which a test is skipped, None if it is run."""
    for pattern, reason in NOT_OURS:
        if fnmatch.fnmatchcase(node_id, f"*/{pattern}") or node_id.endswith(f"/{pattern}"):
            return reason
        if fnmatch.fnmatchcase(node_id, f"*/{pattern}[[]*"):
            return reason
    return None


def is_selected(node_id: str) -> bool:
    """Whether a test of the files has a connector at all."""
    path, _, name = node_id.partition("::")
    return f"{CORE}/" not in path or name.partition("[")[0] in IN_CORE
