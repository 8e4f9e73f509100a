# SPDX-License-Identifier: Apache-2.0
"""Reading and writing traces."""

import json
from pathlib import Path

import pytest

from kvbm.errors import TraceError
from kvbm.replay.trace import BLOCK_TOKENS, Request, Trace, lines, parse, read

LINE = {"timestamp": 5, "input_length": 900, "output_length": 3, "hash_ids": [0, 1]}


def test_a_line_of_the_format_becomes_a_request() -> None:
    trace = parse([json.dumps(LINE), "\n", json.dumps({**LINE, "hash_ids": [0, 2, 3]})], "t")
    assert trace.requests == [Request(5, 900, 3, [0, 1]), Request(5, 900, 3, [0, 2, 3])]
    assert (trace.references, trace.distinct) == (5, 4)


def test_what_is_written_is_read_back() -> None:
    trace = Trace("t", [Request(0, 10, 1, [7]), Request(9, 600, 2, [7, 8])], BLOCK_TOKENS)
    assert parse(lines(trace), "t") == trace


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ("[1]", "an object is needed"),
        (json.dumps({"timestamp": 0}), "input_length, output_length, hash_ids missing"),
        (json.dumps({**LINE, "timestamp": -1}), "timestamp=-1"),
        (json.dumps({**LINE, "timestamp": True}), "timestamp=True"),
        (json.dumps({**LINE, "output_length": 1.5}), "output_length=1.5"),
        (json.dumps({**LINE, "hash_ids": 3}), "hash_ids"),
        (json.dumps({**LINE, "hash_ids": ["a"]}), "hash_ids"),
        (json.dumps({**LINE, "timestamp": 4}), "timestamp=4 is before the one ahead of it (5)"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(line: str, says: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse([json.dumps(LINE), line], "some.jsonl")
    assert "some.jsonl, line 2" in str(caught.value)
    assert says in str(caught.value)


def test_an_empty_trace_and_an_unreadable_file_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(TraceError, match=r"empty\.jsonl has no request"):
        read(empty)
    with pytest.raises(TraceError, match="cannot read the trace"):
        read(tmp_path / "missing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="cannot read the trace"):
        read(tmp_path / "binary")


def record(*entries: dict[str, object]) -> list[str]:
    begin = {"t_ms": 0.1, "event": "begin", "format": 1, "block_tokens": 16}
    return [json.dumps(entry) for entry in (begin, *entries)]


REQUEST = {"t_ms": 5.7, "event": "request", "request": "a", "groups": 1, "blocks": [11, 12]}
FINISH = {"t_ms": 9.0, "event": "finish", "request": "a", "held": False, "blocks": [11, 12, 13]}


def test_a_record_becomes_a_trace_with_the_blocks_of_answers() -> None:
    match = {"t_ms": 6.0, "event": "match", "request": "a", "start": 0, "stop": 2, "hits": 0}
    other = {**REQUEST, "t_ms": 8.0, "request": "b", "blocks": [11]}
    trace = parse(record(REQUEST, match, other, FINISH), "r")
    assert trace.block_tokens == 16
    assert trace.requests == [Request(5, 32, 16, [11, 12], (13,)), Request(8, 16, 0, [11])]
    assert (trace.references, trace.distinct) == (3, 3)


def test_the_torn_last_line_of_a_killed_engine_is_left_out() -> None:
    lines = [*record(REQUEST), '{"t_ms": 9.0, "eve']
    assert parse(lines, "r").requests == [Request(5, 32, 0, [11, 12])]
    with pytest.raises(TraceError, match="r, line 3: not an event"):
        parse([*lines, json.dumps(FINISH)], "r")


def test_a_record_of_another_format_is_refused_by_both_numbers() -> None:
    begin = json.dumps({"event": "begin", "format": 2, "block_tokens": 16})
    with pytest.raises(TraceError, match="record of format 2; this version reads 1"):
        parse([begin], "r")
