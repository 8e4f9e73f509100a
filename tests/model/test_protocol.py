# SPDX-License-Identifier: Apache-2.0
"""The protocol keeps its invariants in every interleaving, whoever dies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.model.cells import EVICTING, PARTIAL, REGISTERED, RESET
from tests.model.explore import Explorer
from tests.model.rules import PROTOCOL
from tests.model.scenarios import Scenario, scenarios
from tests.model.setting import build

FAST = Path(__file__).resolve().parents[2] / "kvbm" / "_fast"
MODEL = Path(__file__).resolve().parent
LABEL = re.compile(r"\[([PESDOR]\d)\]")
SCENARIOS = scenarios()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_protocol_holds(scenario: Scenario) -> None:
    explorer = Explorer(build(scenario, PROTOCOL))
    found = explorer.search()
    assert found.ends > 0
    assert found.transitions >= found.states - 1


def test_the_scenarios_contain_every_transition_of_a_block() -> None:
    seen: set[tuple[str, str]] = set()
    for name in ("publish and evict", "publish and abandon"):
        scenario = next(s for s in SCENARIOS if s.name == name)
        explorer = Explorer(build(scenario, PROTOCOL))
        explorer.search()
        for _, program in explorer.acting:
            for node in program.nodes.values():
                for before, entry in node.table.items():
                    old = explorer.decoded[ord(before)]
                    if entry is not None and hasattr(old, "holders"):
                        seen.add((old.state, explorer.decoded[ord(entry[0])].state))
    between = {(before, after) for before, after in seen if before != after}
    assert between == {
        (RESET, PARTIAL),
        (PARTIAL, REGISTERED),
        (PARTIAL, EVICTING),
        (REGISTERED, EVICTING),
        (EVICTING, RESET),
    }


def test_every_step_that_the_sources_label_is_in_the_model() -> None:
    sources = [*FAST.glob("*.pyx"), FAST / "layout.h"]
    labelled = {label for path in sources for label in LABEL.findall(path.read_text())}
    modelled = {label for path in MODEL.glob("*.py") for label in LABEL.findall(path.read_text())}
    assert labelled
    assert labelled <= modelled
