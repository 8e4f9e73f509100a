# SPDX-License-Identifier: Apache-2.0
"""What a reader and a program get to see."""

import io
import json

from rich.console import Console

from kvbm.replay.disk import replay_with_disk
from kvbm.replay.manager import CALLS, replay
from kvbm.replay.policies import lru_hits
from kvbm.replay.report import Comparison, as_dict, show
from kvbm.replay.synthetic import conversations

TRACE = conversations(100, 1)
COMPARISONS = [Comparison(replay(TRACE, n), {"LRU": lru_hits(TRACE, n)}) for n in (50, 200)]


def test_the_json_has_every_figure_of_the_outcome() -> None:
    found = json.loads(json.dumps(as_dict(TRACE, COMPARISONS)))
    assert found["trace"]["references"] == TRACE.references
    for entry, (outcome, others) in zip(found["capacities"], COMPARISONS, strict=True):
        assert entry["blocks"] == outcome.capacity
        assert entry["hit_rate"] == outcome.hit_rate
        assert entry["hits_by_tier"] == {"host": outcome.hits}
        assert entry["hit_rate_of"] == {"LRU": others["LRU"] / TRACE.references}
        assert entry["decisions"] == outcome.decisions
        for call in CALLS:
            low, middle, high = entry["latency_us"][call]
            assert 0 < low <= middle <= high


def test_a_disk_tier_has_a_table_of_its_own_with_what_moved() -> None:
    outcome = replay_with_disk(TRACE, 50, 1000, filtered=False)
    assert outcome.disk is not None
    text = io.StringIO()
    show(Console(file=text, width=120), TRACE, [Comparison(outcome, {})], 2_000_000_000)
    rows = [line for line in text.getvalue().splitlines() if "│" in line]
    cells = [cell.strip() for cell in rows[1].strip("│").split("│")]
    assert cells == [
        "50",
        "1,000",
        f"{100 * outcome.host_hits / outcome.references:.1f}",
        f"{100 * outcome.disk.hits / outcome.references:.1f}",
        f"{2 * outcome.disk.written:,.1f}",
        f"{2 * outcome.disk.read:,.1f}",
    ]
    entry = as_dict(TRACE, [Comparison(outcome, {})])["capacities"][0]
    assert entry["hits_by_tier"] == {"host": outcome.host_hits, "disk": outcome.disk.hits}
    assert entry["disk"]["written"] == outcome.disk.written


def test_the_tables_show_a_row_a_capacity_and_gigabytes_when_a_size_is_given() -> None:
    text = io.StringIO()
    show(Console(file=text, width=120), TRACE, COMPARISONS, 2_000_000_000)
    rows = [line for line in text.getvalue().splitlines() if "│" in line]
    rates = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows[:2]]
    assert [(row[0], row[1]) for row in rates] == [("50", "100.0"), ("200", "400.0")]
    assert [row[2] for row in rates] == [f"{100 * c.outcome.hit_rate:.1f}" for c in COMPARISONS]
    assert len(rows) == 2 + 2 * len(CALLS)
