# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.model``: the tables of bench/results/model.md."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tests.model.explore import Violation, explore
from tests.model.mutations import MUTATIONS
from tests.model.rules import PROTOCOL
from tests.model.scenarios import scenarios
from tests.model.setting import build

HEAD = """\
# The model of the segment's protocol

Made by `python -m tests.model`. Every interleaving of the actors is explored, with up to the given
number of deaths: of anybody, before any step that may write, while he waits, or after the last.
States count what all cells and all actors are; memories count the cells alone. All invariants of
`tests/model/invariants.py` hold in all of them.
"""

MUTATED = """
One rule of the protocol broken at a time: which scenario notices it first, with how many deaths at
least, in how many steps (a shortest trace; `python -m tests.model --trace RULE` prints it), and
what it sees.
"""


def scenario_rows() -> Iterator[str]:
    """Explore each scenario; one row each."""
    yield "| scenario | what happens | deaths | states | transitions | memories | ends | seconds |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    states = transitions = 0
    seconds = 0.0
    for scenario in scenarios():
        found = explore(lambda scenario=scenario: build(scenario, PROTOCOL))
        states += found.states
        transitions += found.transitions
        seconds += found.seconds
        yield (
            f"| {scenario.name} | {scenario.about} | {scenario.crashes} | {found.states:,} | "
            f"{found.transitions:,} | {found.memories:,} | {found.ends} | {found.seconds:.1f} |"
        )
    yield f"| all | | | {states:,} | {transitions:,} | | | {seconds:.0f} |"


def mutation_rows() -> Iterator[str]:
    """Explore each mutation until it is noticed; one row each."""
    known = {scenario.name: scenario for scenario in scenarios()}
    yield "| rule | broken | scenario | deaths | steps | noticed |"
    yield "|---|---|---|--:|--:|---|"
    for mutation in MUTATIONS:
        try:
            explore(lambda m=mutation: m.model(known))
            noticed, steps = "not noticed", "-"
        except Violation as violation:
            noticed, steps = violation.message, str(len(violation.trace))
        deaths = str(mutation.deaths)
        row = (mutation.rule, mutation.about, mutation.scenario, deaths, steps, noticed)
        yield f"| {' | '.join(row)} |"


def print_trace(rule: str) -> None:
    """Print the shortest way to a violation without a rule."""
    known = {scenario.name: scenario for scenario in scenarios()}
    for mutation in MUTATIONS:
        if mutation.rule == rule:
            print(f"{mutation.about}, in '{mutation.scenario}':")
            try:
                explore(lambda m=mutation: m.model(known))
            except Violation as violation:
                print(violation)


def main() -> None:
    """Print the tables, or a trace."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--trace", metavar="RULE", help="how the protocol fails without a rule")
    trace = parser.parse_args().trace
    if trace is not None:
        print_trace(trace)
        return
    print(HEAD)
    for row in scenario_rows():
        print(row, flush=True)
    print(MUTATED)
    for row in mutation_rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
