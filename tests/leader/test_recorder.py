# SPDX-License-Identifier: Apache-2.0
"""The record of a leader's decisions."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from kvbm._fast.keys import Keys
from kvbm.errors import ConfigError
from kvbm.leader.recorder import FORMAT, Recorder, open_recorder
from tests.engines import MakeEngine
from tests.fast.instances import digests
from tests.leaks import wait_until
from tests.small_engine import BLOCK_TOKENS, settings_for


def started(path: Path, bytes_max: int = 10**6) -> Recorder:
    recorder = Recorder(path, bytes_max)
    recorder.start()
    return recorder


def events(path: Path) -> list[dict[str, Any]]:
    """What a record says, without its times, which never run backwards."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    times = [entry.pop("t_ms") for entry in entries]
    assert times == sorted(times)
    return entries


def hashes_of(blocks: int) -> list[int]:
    """Sequence hashes of the sequence that `SmallEngine.track` makes of so many blocks."""
    keys = Keys(digests(blocks, 0), 1, 0)
    return [keys.identity(index)[1] for index in range(blocks)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record.jsonl"


def test_nothing_is_recorded_unless_it_is_asked_for(path: Path) -> None:
    assert open_recorder(settings_for(4, record_path=path)) is None
    assert not path.exists()


def test_a_request_is_recorded_from_its_prompt_to_its_end(
    make_engine: MakeEngine, path: Path
) -> None:
    engine = make_engine(enable_record=True, record_path=path)
    engine.store("first", [1, 2, 3])
    sequence = engine.load("second", [10, 11, 12])
    engine.run_until(lambda: "second" in engine.received)
    engine.leader.finish(sequence.request_id, 3)
    engine.leader.reset()
    name = engine.segment.name
    engine.close()

    begin, *entries = events(path)
    assert begin.pop("unix_s") > 1e9
    assert begin == {
        "event": "begin",
        "format": FORMAT,
        "segment": name,
        "block_tokens": BLOCK_TOKENS,
        "host_slots": 32,
        "ranks": 1,
    }
    of_second = [entry for entry in entries if entry.get("request") == "second"]
    assert of_second == [
        {"event": "request", "request": "second", "groups": 1, "blocks": hashes_of(3)},
        {"event": "match", "request": "second", "start": 0, "stop": 3, "hits": 3},
        {
            "event": "load",
            "request": "second",
            "start": 0,
            "blocks": 3,
            "operations": 1,
            "failed": False,
        },
        {
            "event": "finish",
            "request": "second",
            "computed_blocks": 3,
            "held": False,
            "blocks": hashes_of(3),
        },
    ]
    assert {"event": "reset", "given_back": 3} in entries
    stores = [entry for entry in entries if entry["event"] == "store"]
    assert stores == [
        {"event": "store", "request": "first", "step": 1, "stored": [3], "operations": 1}
    ]


def test_a_miss_is_recorded_as_one(make_engine: MakeEngine, path: Path) -> None:
    engine = make_engine(enable_record=True, record_path=path)
    engine.leader.match(engine.track("cold", 4), 0, 4)
    engine.close()
    assert events(path)[-1] == {
        "event": "match",
        "request": "cold",
        "start": 0,
        "stop": 4,
        "hits": 0,
    }


def test_a_second_engine_writes_a_file_of_its_own(path: Path) -> None:
    first, second = started(path), started(path)
    first.record("of", engine=1)
    second.record("of", engine=2)
    first.close()
    second.close()
    assert events(path) == [{"event": "of", "engine": 1}]
    assert second.path == path.with_name("record-1.jsonl")
    assert events(second.path) == [{"event": "of", "engine": 2}]


def test_a_file_that_was_there_is_emptied_and_nobody_else_may_read_a_new_one(path: Path) -> None:
    recorder = started(path)
    recorder.record("old")
    recorder.close()
    assert os.stat(path).st_mode & 0o777 == 0o600
    started(path).close()
    assert path.read_text() == ""


def test_a_record_ends_at_its_size_and_says_so_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = started(path, 1000)
    with caplog.at_level(logging.WARNING, "kvbm.leader.recorder"):
        for number in range(200):
            recorder.record("n", number=number)
        recorder.close()
    found = [entry["number"] for entry in events(path)]
    assert found == list(range(len(found)))
    assert 1000 <= path.stat().st_size < 1100
    assert [r.getMessage() for r in caplog.records] == [
        f"{path} has reached DYN_KVBM_RECORD_MAX_GB; the record ends"
    ]


def test_a_full_disk_ends_the_record_and_nothing_else(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr("kvbm.leader.recorder._open", lambda path: (path, full))
    recorder = started(path)
    with caplog.at_level(logging.WARNING, "kvbm.leader.recorder"):
        recorder.record("lost")
        assert wait_until(lambda: caplog.records, 10)
        recorder.record("lost, too")
        recorder.close()
    assert "cannot be written any more: [Errno 28]" in caplog.records[0].getMessage()
    assert len(caplog.records) == 1


def test_events_that_the_writer_cannot_keep_up_with_are_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm.leader.recorder.QUEUE_EVENTS", 4)
    recorder = started(path, 10**9)
    facts = {"blocks": bytes(8 * 20_000)}
    for number in range(200):
        recorder.record("n", number=number, **facts)
    assert recorder.left_out > 0
    assert wait_until(recorder._events.empty, 10)
    recorder.record("last")
    recorder.close()
    assert events(path)[-1] == {"event": "last", "left_out": recorder.left_out}


@pytest.mark.parametrize("where", ["/nowhere/record.jsonl", "/"])
def test_a_file_that_cannot_be_opened_is_refused_by_name(where: str) -> None:
    with pytest.raises(ConfigError, match=f"DYN_KVBM_RECORD_PATH='{where}' cannot be written"):
        Recorder(Path(where), 1000)


def test_a_link_is_never_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    path.symlink_to(target)
    with pytest.raises(ConfigError, match="not a link"):
        Recorder(path, 1000)
    assert target.read_text() == "kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_that_another_user_has_put_there_is_refused(path: Path) -> None:
    path.write_text("planted")
    os.chown(path, 65534, 65534)
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="it belongs to user 65534"):
        Recorder(path, 1000)
    assert path.read_text() == "planted"


def test_a_pipe_is_refused_and_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="cannot be written"):
        Recorder(path, 1000)
