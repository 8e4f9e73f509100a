# SPDX-License-Identifier: Apache-2.0
"""The measurement of reading ahead: it finds a use where there is one, and else none."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.read_ahead import main, measure
from kvbm.replay import trace as traces
from kvbm.replay.synthetic import conversations
from kvbm.replay.trace import Request, Trace

PROMPTS = [[1, 2, 3, 4], [7, 8, 9, 10], [1, 2], [1, 2, 3, 4]]


def trace(prompts: list[list[int]]) -> Trace:
    requests = [Request(1000 * i, 512 * len(p), 0, p) for i, p in enumerate(prompts)]
    return Trace("t", requests, 512)


@pytest.mark.parametrize(("bound", "ahead"), [(0, 0), (1, 1), (8, 2)])
def test_a_continuation_that_is_asked_for_next_was_of_use(bound: int, ahead: int) -> None:
    found = measure(trace(PROMPTS), 4, 100, bound, filtered=False, only_after_disk=True)
    assert (found.ahead, found.useful) == (ahead, ahead)
    assert found.read == 4
    assert found.host * 14 == pytest.approx(2 + ahead)


def test_a_continuation_that_nobody_asks_for_was_of_none() -> None:
    found = measure(trace(PROMPTS[:3]), 4, 100, 8, filtered=False, only_after_disk=True)
    assert (found.ahead, found.useful) == (2, 0)


def test_nothing_is_read_ahead_where_a_chain_branches() -> None:
    prompts = [[1, 2, 3], [1, 2, 4], [7, 8, 9], [10, 11, 12], [1, 2]]
    found = measure(trace(prompts), 3, 100, 8, filtered=False, only_after_disk=True)
    assert found.ahead == 0
    assert found.disk > 0


def test_the_table_has_a_row_for_each_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(traces.lines(conversations(50, 1))))
    main([str(path), "--host", "40", "--disk", "1k", "--blocks", "8,32", "--unfiltered"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[3].strip() for row in rows[2:]] == ["0", "8", "32"]
