# SPDX-License-Identifier: Apache-2.0
"""The demo's figures: a table, a verdict and a JSON document."""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.vllm_lab.compare import Comparison, compare
from bench.vllm_lab.results import PhaseResult

TIERS = ("device", "host", "disk", "remote")
NOTHING = "-"


@dataclass(frozen=True)
class Figures:
    """What one engine showed in the measured phase."""

    requests: int
    prompt_tokens: int
    computed_tokens: int
    tier_tokens: dict[str, int]  # prompt tokens reused, by tier
    hit_rate: float  # share of the prompt tokens that was reused
    ttft_mean_ms: float
    ttft_p99_ms: float
    output_tokens_per_s: float
    wall_s: float


@dataclass(frozen=True)
class Verdict:
    """Whether the demo showed what it is to show, and why not."""

    equal: bool
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Equal outputs, and something was brought back."""
        return not self.reasons


def figures(phase: PhaseResult) -> Figures:
    """Figures of a phase; what a connector provides without naming a tier counts as host."""
    tiers = dict.fromkeys(TIERS, 0)
    for source, tokens in phase.tier_hit_tokens().items():
        tier = source if source in TIERS else "host"
        tiers[tier] += tokens
    mean, p99 = phase.ttft_ms()
    return Figures(
        requests=len(phase.requests),
        prompt_tokens=phase.prompt_tokens,
        computed_tokens=phase.computed_tokens,
        tier_tokens=tiers,
        hit_rate=sum(tiers.values()) / phase.prompt_tokens,
        ttft_mean_ms=mean,
        ttft_p99_ms=p99,
        output_tokens_per_s=phase.output_tokens / phase.wall_s,
        wall_s=phase.wall_s,
    )


def judge(without: PhaseResult, with_kvbm: PhaseResult) -> Verdict:
    """Compare the outputs and see that kvbm did something."""
    comparison: Comparison = compare(without, with_kvbm)
    reasons = []
    if not comparison.equal:
        reasons.append(f"the outputs differ: {comparison}")
    if with_kvbm.external_hit_tokens == 0:
        reasons.append("no token was reused through kvbm")
    return Verdict(comparison.equal, tuple(reasons))


def table(without: Figures, with_kvbm: Figures) -> Table:
    """Both engines side by side."""
    result = Table(title="vLLM without and with kvbm")
    result.add_column("")
    result.add_column("without", justify="right")
    result.add_column("with kvbm", justify="right")
    result.add_row("requests", f"{without.requests}", f"{with_kvbm.requests}")
    result.add_row("prompt tokens", f"{without.prompt_tokens:,}", f"{with_kvbm.prompt_tokens:,}")
    for tier in TIERS:
        pair = [side.tier_tokens[tier] for side in (without, with_kvbm)]
        if any(pair) or tier in ("device", "host"):
            result.add_row(f"  reused from {tier}", *[f"{n:,}" if n else NOTHING for n in pair])
    result.add_row("  computed", f"{without.computed_tokens:,}", f"{with_kvbm.computed_tokens:,}")
    result.add_row("hit rate", f"{without.hit_rate:.1%}", f"{with_kvbm.hit_rate:.1%}")
    rows = [
        ("TTFT mean, ms", without.ttft_mean_ms, with_kvbm.ttft_mean_ms),
        ("TTFT P99, ms", without.ttft_p99_ms, with_kvbm.ttft_p99_ms),
        ("output tokens / s", without.output_tokens_per_s, with_kvbm.output_tokens_per_s),
        ("wall time, s", without.wall_s, with_kvbm.wall_s),
    ]
    for name, left, right in rows:
        result.add_row(name, f"{left:,.1f}", f"{right:,.1f}")
    return result


def document(
    without: Figures, with_kvbm: Figures, verdict: Verdict, settings: dict[str, Any]
) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "settings": settings,
        "without": vars(without),
        "with_kvbm": vars(with_kvbm),
        "outputs_equal": verdict.equal,
        "passed": verdict.passed,
        "reasons": list(verdict.reasons),
    }
