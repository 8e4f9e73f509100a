# SPDX-License-Identifier: Apache-2.0
"""Hits are read from a record beside those of LRU and the replay."""

from __future__ import annotations

import json
from pathlib import Path

from bench.recorded import Found, found_in, traffic
from kvbm.leader.recorder import FORMAT


def test_the_last_answer_of_each_request_counts(tmp_path: Path) -> None:
    events = [
        {"event": "begin", "format": FORMAT, "block_tokens": 16},
        {"event": "request", "request": "a", "blocks": [1, 2]},
        {"event": "match", "request": "a", "start": 0, "stop": 2, "hits": 0},
        {"event": "finish", "request": "a", "blocks": [1, 2, 3]},
        {"event": "request", "request": "b", "blocks": [1, 2, 3, 4]},
        {"event": "match", "request": "b", "start": 0, "stop": 4, "hits": 1},
        {"event": "match", "request": "b", "start": 0, "stop": 4, "hits": 3},
    ]
    path = tmp_path / "record.jsonl"
    path.write_text("".join(json.dumps({"t_ms": 0, **event}) + "\n" for event in events))
    assert found_in(path, 10) == Found(
        requests=2, asked=6, recorded=3, references=6, lru=3, replayed=3
    )


def test_the_traffic_repeats_turns_of_its_conversations() -> None:
    chat, *again = traffic(3, 2)
    assert [phase.source for phase in again] == [chat.name] * 3  # type: ignore[union-attr]
