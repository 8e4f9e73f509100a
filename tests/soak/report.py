# SPDX-License-Identifier: Apache-2.0
"""What a soak did, as a table, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from tests.soak.traffic import Round
from tests.soak.usage import Usage

MIB = 1 << 20
RSS_ALLOWED_BYTES = 24 * MIB
"""Most growth of the resident memory from the second third of the rounds to the last.

The first third is warm-up: torch reaches its working set, and so do vLLM's own pools.
"""
RSS_JUDGED_S = 180.0
"""Seconds of traffic from which on memory is judged: torch alone grows by more in the first."""

ABORTS, FAULTS = "aborted ", "fault "


@dataclass
class EngineSoak:
    """All rounds of one engine.

    Attributes
    ----------
    name : str
        How the engine was started.
    seconds : float
        Time under traffic.
    rounds : list of Round
        In order.
    engine_counters, kvbm_counters : Counter
        Movement of vLLM's and kvbm's counters over all rounds.
    left : list of str
        What was left of kvbm after the engine's shutdown.
    """

    name: str
    seconds: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    engine_counters: Counter[str] = field(default_factory=Counter)
    kvbm_counters: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """What the traffic did, over all rounds."""
        return sum((each.counts for each in self.rounds), Counter())

    def total(self, prefix: str) -> int:
        """Sum of the counts whose names begin with a word."""
        return sum(number for name, number in self.counts.items() if name.startswith(prefix))

    def usage(self) -> tuple[Usage, Usage]:
        """Median after the warm-up and at the end: of the second and of the last third."""
        usages = [each.usage for each in self.rounds if each.usage is not None]
        third = max(1, len(usages) // 3)
        return _median(usages[third : 2 * third] or usages[:1]), _median(usages[-third:])


def _median(usages: Sequence[Usage]) -> Usage:
    return Usage(
        int(median(usage.rss_bytes for usage in usages)),
        int(median(usage.descriptors for usage in usages)),
        int(median(usage.threads for usage in usages)),
    )


def problems(soak: EngineSoak) -> list[str]:
    """Everything that must not be, one line each; empty if the soak is good."""
    found = [f"wrong output: {wrong}" for each in soak.rounds for wrong in each.wrong]
    for number, each in enumerate(soak.rounds, 1):
        left = {what: count for what, count in each.left.items() if count}
        if left:
            found.append(f"left after round {number}: {left}")
    found += [f"left at the end: {what}" for what in soak.left]
    if not soak.counts["requests"]:
        found.append("no request was finished")
    before, after = soak.usage()
    growth = after.rss_bytes - before.rss_bytes
    if soak.seconds >= RSS_JUDGED_S and growth > RSS_ALLOWED_BYTES:
        found.append(f"resident memory grew by {growth / MIB:.1f} MiB: {before} to {after}")
    if after.descriptors > before.descriptors:
        found.append(f"descriptors grew: {before} to {after}")
    if after.threads > before.threads:
        found.append(f"threads grew: {before} to {after}")
    return [f"{soak.name}: {line}" for line in found]


def missing(soak: EngineSoak) -> list[str]:
    """What never happened although a soak is about it; a long one must have seen all of it."""
    wanted = {
        "device hits": _hits(soak, "local_cache_hit"),
        "host hits": _hits(soak, "external_kv_transfer"),
        "evictions": soak.kvbm_counters["kvbm_evicted_blocks"],
        "failed loads": soak.kvbm_counters["kvbm_onboard_failures"],
        "cancelled loads": soak.kvbm_counters["kvbm_onboard_cancelled"],
        "cancelled stores": soak.kvbm_counters["kvbm_offload_cancelled"],
        "preemptions": soak.engine_counters["num_preemptions"],
        "resets": soak.counts["reset connector"],
    }
    states = ("waiting", "loading", "running", "storing")
    wanted |= {f"aborts while {state}": soak.counts[f"{ABORTS}{state}"] for state in states}
    return [what for what, number in wanted.items() if not number]


def _hits(soak: EngineSoak, source: str) -> int:
    return int(soak.engine_counters[f"prompt_tokens_by_source/{source}"])


def rows(soak: EngineSoak) -> list[tuple[str, str]]:
    """The figures of one engine, with their names."""
    before, after = soak.usage()
    aborts = ", ".join(
        f"{name.removeprefix(ABORTS)} {number:,}"
        for name, number in sorted(soak.counts.items())
        if name.startswith(ABORTS)
    )
    counts, kvbm = soak.counts, soak.kvbm_counters
    return [
        ("seconds of traffic", f"{soak.seconds:,.0f}"),
        ("engine steps", f"{counts['steps']:,}"),
        ("requests finished and compared", f"{counts['requests']:,}"),
        ("wrong outputs", f"{counts['wrong outputs']:,}"),
        ("tokens: prompts, outputs", f"{counts['prompt tokens']:,}, {counts['output tokens']:,}"),
        (
            "prompt tokens hit: device, host",
            f"{_hits(soak, 'local_cache_hit'):,}, {_hits(soak, 'external_kv_transfer'):,}",
        ),
        ("blocks stored", f"{kvbm['kvbm_offload_blocks_d2h']:,.0f}"),
        ("blocks loaded", f"{kvbm['kvbm_onboard_blocks_h2d']:,.0f}"),
        ("blocks evicted", f"{kvbm['kvbm_evicted_blocks']:,.0f}"),
        ("aborts", f"{soak.total(ABORTS):,} ({aborts})"),
        ("preemptions", f"{soak.engine_counters['num_preemptions']:,.0f}"),
        (
            "resets: connector, device",
            f"{counts['reset connector']:,}, {counts['reset device']:,}",
        ),
        ("copy thread held", f"{counts['copies held']:,}"),
        ("faults injected", f"{soak.total(FAULTS):,}"),
        (
            "loads failed, cancelled",
            f"{kvbm['kvbm_onboard_failures']:,.0f}, {kvbm['kvbm_onboard_cancelled']:,.0f}",
        ),
        (
            "stores failed, cancelled",
            f"{kvbm['kvbm_offload_failures']:,.0f}, {kvbm['kvbm_offload_cancelled']:,.0f}",
        ),
        (
            "surprises that cost a request its cache",
            f"{kvbm['kvbm_errors']:,.0f}",
        ),
        (
            "resident memory after warm-up, at the end (MiB)",
            f"{before.rss_bytes / MIB:,.1f}, {after.rss_bytes / MIB:,.1f}",
        ),
        (
            "descriptors after warm-up, at the end",
            f"{before.descriptors}, {after.descriptors}",
        ),
        ("threads after warm-up, at the end", f"{before.threads}, {after.threads}"),
        ("left after a round, after the engine", f"{_left_in_rounds(soak)}, {len(soak.left)}"),
    ]


def _left_in_rounds(soak: EngineSoak) -> int:
    return sum(sum(each.left.values()) for each in soak.rounds)


def table(soaks: Sequence[EngineSoak]) -> str:
    """A Markdown table, a column an engine."""
    columns = [dict(rows(soak)) for soak in soaks]
    lines = [
        "| | " + " | ".join(soak.name for soak in soaks) + " |",
        "|---" * (len(soaks) + 1) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(column[name] for column in columns) + " |"
        for name in columns[0]
    ]
    return "\n".join(lines)
