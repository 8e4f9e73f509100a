# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from bench.vllm_lab.workload import FIRST_ORDINARY_TOKEN, Conversations, reusable_tokens

PLAN = Conversations()


def test_the_same_seed_gives_the_same_tokens() -> None:
    again = Conversations()
    assert PLAN.user_tokens(3, 0) == again.user_tokens(3, 0)
    assert PLAN.user_tokens(3, 1) == again.user_tokens(3, 1)


def test_seed_conversation_and_turn_change_the_tokens() -> None:
    seen = {
        tuple(plan.user_tokens(conversation, turn))
        for plan in (PLAN, Conversations(seed=PLAN.seed + 1))
        for conversation in range(4)
        for turn in range(3)
    }
    assert len(seen) == 2 * 4 * 3


def test_conversations_share_their_first_tokens_and_nothing_else() -> None:
    first, second = PLAN.user_tokens(0, 0), PLAN.user_tokens(1, 0)
    shared = PLAN.shared_tokens
    assert first[:shared] == second[:shared]
    assert first[shared] != second[shared]


def test_tokens_are_ordinary_ones_of_the_vocabulary() -> None:
    tokens = [token for turn in range(3) for token in PLAN.user_tokens(0, turn)]
    assert min(tokens) >= FIRST_ORDINARY_TOKEN
    assert max(tokens) < PLAN.vocabulary


def test_lengths_stay_within_their_bounds() -> None:
    for conversation in range(PLAN.count):
        own = len(PLAN.user_tokens(conversation, 0)) - PLAN.shared_tokens
        assert PLAN.first_tokens[0] <= own <= PLAN.first_tokens[1]
        later = sum(len(PLAN.user_tokens(conversation, turn)) for turn in range(1, PLAN.turns))
        history = PLAN.shared_tokens + own + later + PLAN.turns * PLAN.output_tokens
        assert PLAN.shortest_history_tokens() <= history <= PLAN.longest_tokens()


def test_one_turn_has_no_history() -> None:
    assert Conversations(turns=1).shortest_history_tokens() == 0


@pytest.mark.parametrize(
    ("earlier", "prompt", "expected"),
    [
        ([], range(10), 0),
        ([range(10)], range(10), 8),
        ([range(10)], range(8), 4),  # the last token is always computed
        ([range(10)], range(9), 8),
        ([range(7)], range(20), 4),  # whole blocks only
        ([range(1, 20)], range(20), 0),
        ([[0, 1, 2, 3, 9, 9, 9, 9], range(8)], range(20), 8),
        ([[0, 1, 2, 3, 9, 9, 9, 9], [9, 9, 9, 9, 4, 5, 6, 7]], range(20), 4),
    ],
)
def test_reusable_tokens_are_the_longest_common_run_of_blocks(
    earlier: list[list[int]], prompt: range, expected: int
) -> None:
    assert reusable_tokens([list(tokens) for tokens in earlier], list(prompt), 4) == expected
