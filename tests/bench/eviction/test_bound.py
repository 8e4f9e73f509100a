# SPDX-License-Identifier: Apache-2.0
"""Bounds are bounds, and the command prints them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.eviction import __main__ as command
from bench.eviction.bound import bound, held_out, stays
from kvbm.replay.policies import unbounded_hits
from kvbm.replay.synthetic import conversations
from kvbm.replay.trace import lines


def test_more_knowledge_never_lowers_the_bound() -> None:
    of = stays(conversations(800, seed=2))
    bounds = [bound(of, name, 300) for name in of.classes]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("name", ["none", "turn", "all"])
def test_ages_from_the_other_half_do_not_exceed_the_bound(name: str) -> None:
    of = stays(conversations(800, seed=2))
    assert 0 < held_out(of, name, 400) <= bound(of, name, 400)


def test_classes_that_tell_nothing_apart_do_not_help() -> None:
    of = stays(conversations(800, seed=2))
    same = of._replace(classes={"same": of.classes["none"] + 7})
    assert bound(same, "same", 400) == bound(of, "none", 400)


def test_with_room_for_all_the_bound_is_what_is_used_again() -> None:
    trace = conversations(300, seed=4)
    assert bound(stays(trace), "none", trace.distinct) == pytest.approx(
        unbounded_hits(trace, 0), rel=1e-3
    )


def test_the_command_prints_a_row_a_capacity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(lines(conversations(300, seed=4))), encoding="utf-8")
    command.main([str(path), "--capacity", "100,200", "--bounds"])
    out = capsys.readouterr().out
    for capacity in (100, 200):
        rows = [line for line in out.splitlines() if line.startswith(f"| {capacity} |")]
        assert [row.count("|") for row in rows] == [6, 7, 7]
