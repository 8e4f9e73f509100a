# SPDX-License-Identifier: Apache-2.0
"""Compares the outputs of two phases that sent the same conversations."""

from dataclasses import dataclass

from bench.vllm_lab.results import PhaseResult, RequestResult

# Batches of another composition sum in another order. In float32 that moved the logprob of a chosen
# token by up to 3e-5 in measurements; a wrong KV row moves it by whole units.
LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """Where two phases differ."""

    requests: int
    prompt_differs: tuple[tuple[int, int], ...]  # (conversation, turn); a consequence, mostly
    tokens_differ: tuple[tuple[int, int], ...]
    logprob_difference: float  # greatest, over requests whose tokens are equal

    @property
    def equal(self) -> bool:
        """Same requests, same tokens, and logprobs within the noise of float32 sums."""
        parted = self.prompt_differs or self.tokens_differ
        return self.requests > 0 and not parted and self.logprob_difference <= LOGPROB_TOLERANCE

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, prompts differ in {len(self.prompt_differs)}, tokens in "
            f"{len(self.tokens_differ)} {list(self.tokens_differ[:8])}, greatest difference of a "
            f"logprob {self.logprob_difference:.2e}"
        )


def compare(reference: PhaseResult, other: PhaseResult) -> Comparison:
    """Compare request by request.

    Raises
    ------
    ValueError
        If the phases do not hold the same (conversation, turn) keys, each once.
    """
    left, right = _by_key(reference), _by_key(other)
    if left.keys() != right.keys():
        raise ValueError(
            f"phases {reference.name!r} and {other.name!r} hold different requests: "
            f"{sorted(left.keys() ^ right.keys())}"
        )
    prompts, tokens, noise = [], [], 0.0
    for key, expected in left.items():
        actual = right[key]
        if expected.prompt != actual.prompt:
            prompts.append(key)
        elif expected.output != actual.output:
            tokens.append(key)
        else:
            pairs = zip(expected.logprobs, actual.logprobs, strict=False)
            noise = max([noise, *(abs(a - b) for a, b in pairs)])
    return Comparison(len(left), tuple(prompts), tuple(tokens), noise)


def _by_key(phase: PhaseResult) -> dict[tuple[int, int], RequestResult]:
    requests = {request.key: request for request in phase.requests}
    if len(requests) != len(phase.requests):
        raise ValueError(f"phase {phase.name!r} holds a (conversation, turn) more than once")
    return requests
