# SPDX-License-Identifier: Apache-2.0
"""What clients can count of their own traffic, and the metrics of the engine that it went to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.vllm_lab.model import ModelShape
from bench.vllm_lab.results import RequestResult
from tests.e2e.server import Completion, Server
from tests.leaks import wait_until
from tests.metrics.scrape import Samples, scrape

BLOCK = 32  # tokens, the default of the lab's engines
BLOCK_BYTES = BLOCK * ModelShape().kv_bytes_per_token()
SETTLE_S = 30.0


@dataclass(frozen=True)
class Traffic:
    """Requests that were answered to their end.

    Attributes
    ----------
    requests, prompt_tokens, output_tokens, cached_tokens : int
        Sums of what was sent, received, and reported as not computed.
    asked_blocks : int
        Blocks of all prompts that a cache may serve: whole ones, without the last token.
    distinct_blocks : int
        Different chains of whole blocks whose KV has been computed: what a cache that keeps
        everything stores. The last token of an output has none.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    asked_blocks: int
    distinct_blocks: int


def traffic_of(requests: Sequence[RequestResult], completions: Sequence[Completion]) -> Traffic:
    """Count requests and the completions that their clients received."""
    chains: set[tuple[int, ...]] = set()
    for request, completion in zip(requests, completions, strict=True):
        computed = (*request.prompt, *completion.tokens[:-1])
        chains |= {computed[:end] for end in range(BLOCK, len(computed) + 1, BLOCK)}
    return Traffic(
        requests=len(completions),
        prompt_tokens=sum(len(request.prompt) for request in requests),
        output_tokens=sum(len(completion.tokens) for completion in completions),
        cached_tokens=sum(completion.cached_tokens for completion in completions),
        asked_blocks=sum((len(request.prompt) - 1) // BLOCK for request in requests),
        distinct_blocks=len(chains),
    )


@dataclass
class Scraped:
    """Metrics of one moment, when nothing was in flight.

    Attributes
    ----------
    vllm : dict of str to float
        vLLM's `/metrics`, with kvbm's in it, summed over labels.
    kvbm : dict
        Those of kvbm's own exporter.
    """

    vllm: dict[str, float] = field(default_factory=dict)
    kvbm: Samples = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples of kvbm's exporter with this name and (at least) these labels."""
        return sum(
            number
            for (other, found), number in self.kvbm.items()
            if other == name and labels.items() <= dict(found).items()
        )


def scrape_settled(server: Server, port: int) -> Scraped:
    """Both, once no copy is in flight and vLLM's front end has heard of all that were."""
    found = Scraped()

    def settled() -> bool:
        found.vllm, found.kvbm = server.metrics(), scrape(port)
        stored = found.total("kvbm_offload_blocks_d2h")
        return found.total("kvbm_operations") == 0 and stored == found.vllm.get(
            "kvbm_offload_blocks_d2h_total"
        )

    assert wait_until(settled, SETTLE_S), found
    return found
