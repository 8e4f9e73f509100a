# SPDX-License-Identifier: Apache-2.0
"""Each rule of the protocol is needed: without it the model finds what goes wrong."""

from __future__ import annotations

import dataclasses

import pytest

from tests.model.explore import Explorer, Violation, explore
from tests.model.mutations import MUTATIONS, PIN_BY_GENERATION, Mutation
from tests.model.rules import PROTOCOL
from tests.model.scenarios import Scenario, reuse_scenarios, scenarios
from tests.model.setting import build

SCENARIOS = {scenario.name: scenario for scenario in scenarios()}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.rule}: {m.scenario}")
def test_a_broken_rule_is_noticed(mutation: Mutation) -> None:
    with pytest.raises(Violation) as caught:
        explore(lambda: mutation.model(SCENARIOS))
    assert mutation.notices in caught.value.message
    assert len(caught.value.trace) > 3


def test_every_rule_has_a_mutation() -> None:
    flags = {field.name for field in dataclasses.fields(PROTOCOL) if getattr(PROTOCOL, field.name)}
    assert {mutation.rule for mutation in MUTATIONS} == flags


@pytest.mark.parametrize("rule", ["generation_moves", "evict_requires_no_child"])
def test_the_table_of_transitions_notices_by_itself(rule: str) -> None:
    rules = dataclasses.replace(PROTOCOL, **{rule: False})
    with pytest.raises(Violation, match="a word moves from"):
        Explorer(build(SCENARIOS["publish and evict"], rules)).search()


@pytest.mark.parametrize("scenario", list(reuse_scenarios()), ids=lambda scenario: scenario.name)
def test_a_pin_by_generation_would_do_without_the_comparison(scenario: Scenario) -> None:
    assert Explorer(build(scenario, PIN_BY_GENERATION)).search().ends > 0
