# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding in real vLLM on a device, as in tests/e2e/test_speculation.py.

Steps are CUDA graphs, scheduled one after the other: with asynchronous scheduling vLLM looks up its
drafts on the device, by code that it must be allowed to compile.
"""

from __future__ import annotations

import pytest

from tests.e2e.test_speculation import (
    expected,
    run,
    test_a_request_that_ends_while_it_stores_leaves_good_blocks,
    test_nothing_is_left,
    test_outputs_are_those_without_speculation_and_without_kvbm,
    test_preempted_requests_give_the_same_outputs,
    test_tokens_were_proposed,
)

__all__ = [
    "expected",
    "run",
    "test_a_request_that_ends_while_it_stores_leaves_good_blocks",
    "test_nothing_is_left",
    "test_outputs_are_those_without_speculation_and_without_kvbm",
    "test_preempted_requests_give_the_same_outputs",
    "test_tokens_were_proposed",
]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
