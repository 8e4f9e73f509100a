# SPDX-License-Identifier: Apache-2.0
"""What a run sends to the engine: a list of phases, each one of the classes below.

Chat              conversations turn by turn; a prompt is the whole history with what was generated
Replay            the requests of an earlier phase again, prompt by prompt
Send              prompts given as they are
ResetPrefixCache  the engine's own call that forgets cached blocks, also the connector's
Call              a function in the engine's process, for what no request can do
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Special tokens of the model stay out of prompts.
FIRST_ORDINARY_TOKEN = 3


@dataclass(frozen=True)
class Conversations:
    """Seeded multi-turn conversations; lengths are in tokens.

    Lengths vary by conversation and turn, so that block borders fall everywhere. Turn *t* of every
    conversation is sent before turn *t + 1* of any: with a working set larger than the device
    cache, the blocks of a conversation are gone from the device when its next turn comes.
    """

    count: int = 8
    turns: int = 3
    shared_tokens: int = 64  # the same first tokens in all conversations, as a system prompt
    first_tokens: tuple[int, int] = (160, 280)  # first user message, shortest and longest
    turn_tokens: tuple[int, int] = (60, 120)  # later user messages, shortest and longest
    output_tokens: int = 40
    together: int = 2  # requests given to the engine at once
    vocabulary: int = 2048
    seed: int = 8  # of those tried, the one whose tokens lead the next best by most

    def user_tokens(self, conversation: int, turn: int) -> list[int]:
        """Tokens that the user adds in a turn; those of the first turn include the shared ones."""
        generator = random.Random(f"{self.seed}/{conversation}/{turn}")
        shortest, longest = self.first_tokens if turn == 0 else self.turn_tokens
        own = _random_tokens(generator, generator.randint(shortest, longest), self.vocabulary)
        if turn > 0:
            return own
        shared = random.Random(f"{self.seed}/shared")
        return _random_tokens(shared, self.shared_tokens, self.vocabulary) + own

    def request_count(self) -> int:
        """Requests that the phase sends."""
        return self.count * self.turns

    def shortest_history_tokens(self) -> int:
        """Lower bound of what a conversation has said before its last turn; 0 with one turn."""
        if self.turns == 1:
            return 0
        later = (self.turns - 2) * (self.turn_tokens[0] + self.output_tokens)
        return self.shared_tokens + self.first_tokens[0] + self.output_tokens + later

    def longest_tokens(self) -> int:
        """Upper bound of prompt and output of the last turn."""
        later = (self.turns - 1) * (self.turn_tokens[1] + self.output_tokens)
        return self.shared_tokens + self.first_tokens[1] + self.output_tokens + later


@dataclass(frozen=True)
class Chat:
    """A phase that holds conversations."""

    name: str
    conversations: Conversations


@dataclass(frozen=True)
class Replay:
    """A phase that sends the requests of an earlier phase of the run again.

    With `turns` only these turns, in the order given; with `latest_first` in reverse order, so that
    a cache that keeps the most recently used blocks still has those of the first requests.
    """

    name: str
    source: str
    turns: tuple[int, ...] | None = None
    latest_first: bool = False
    together: int = 2


@dataclass(frozen=True)
class Prompt:
    """A prompt with its place in the conversations that it came from."""

    conversation: int
    turn: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Send:
    """A phase that sends the given prompts in order."""

    name: str
    prompts: tuple[Prompt, ...]
    output_tokens: int = 40
    together: int = 2


@dataclass(frozen=True)
class ResetPrefixCache:
    """A phase that calls ``LLM.reset_prefix_cache``; its answer is the phase's value."""

    name: str
    connector: bool = True


@dataclass(frozen=True)
class Call:
    """A phase that calls ``function(llm, *arguments)`` in the process of the engine's front end.

    The function must be importable there by its module's name; what it returns is the phase's value
    and must be plain data.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


Phase = Chat | Replay | Send | ResetPrefixCache | Call


def reusable_tokens(earlier: Sequence[Sequence[int]], prompt: Sequence[int], block: int) -> int:
    """Most tokens of `prompt` that a cache which forgets nothing could provide.

    Parameters
    ----------
    earlier : sequence of sequence of int
        For each earlier request the tokens whose KV was computed: prompt and output without the
        last token, which was sampled but never fed.
    prompt : sequence of int
        The prompt asked for. Its last token is always computed, since its logits are needed.
    block : int
        Tokens of a block: only whole blocks are shared.

    Returns
    -------
    int
        Tokens, a multiple of `block`.
    """
    limit = (len(prompt) - 1) // block * block
    best = 0
    for tokens in earlier:
        whole = min(limit, len(tokens) // block * block)
        matched = 0
        while matched < whole and _same_block(tokens, prompt, matched, block):
            matched += block
        best = max(best, matched)
    return best


def _same_block(left: Sequence[int], right: Sequence[int], start: int, block: int) -> bool:
    return list(left[start : start + block]) == list(right[start : start + block])


def _random_tokens(generator: random.Random, count: int, vocabulary: int) -> list[int]:
    return [generator.randrange(FIRST_ORDINARY_TOKEN, vocabulary) for _ in range(count)]
