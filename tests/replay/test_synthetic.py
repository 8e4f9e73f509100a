# SPDX-License-Identifier: Apache-2.0
"""Traces made from a seed."""

from kvbm.replay.policies import unbounded_hits
from kvbm.replay.synthetic import conversations
from kvbm.replay.trace import lines, parse


def test_a_seed_makes_one_trace_and_another_seed_another() -> None:
    assert conversations(200, 3) == conversations(200, 3)
    assert conversations(200, 3).requests != conversations(200, 4).requests


def test_the_trace_is_well_formed_and_has_prefixes_to_reuse() -> None:
    trace = conversations(500, 1)
    assert len(trace.requests) == 500
    assert parse(lines(trace), trace.name) == trace
    assert unbounded_hits(trace, 0) > trace.references / 4
