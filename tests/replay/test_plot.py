# SPDX-License-Identifier: Apache-2.0
"""The picture."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the picture needs matplotlib")

from kvbm.replay.manager import replay
from kvbm.replay.plot import plot
from kvbm.replay.policies import lru_hits
from kvbm.replay.report import Comparison
from kvbm.replay.synthetic import conversations

TRACE = conversations(60, 1)
COMPARISONS = [Comparison(replay(TRACE, n), {"LRU": lru_hits(TRACE, n)}) for n in (20, 200)]


def test_the_picture_has_a_curve_for_each_policy_and_an_axis_in_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "hits.svg"
    plot("conversations", COMPARISONS, 1_000_000, path)
    text = path.read_text()
    for label in ("kvbm", "LRU", "conversations", "capacity, GB over all ranks"):
        assert f"<!-- {label} -->" in text


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nope"):
        plot("t", COMPARISONS, None, tmp_path / "hits.nope")
