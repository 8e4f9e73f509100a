# SPDX-License-Identifier: Apache-2.0
"""What is read of a live instance, of one whose engine was killed, and of files; their damage."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kvbm._fast.objects import SHARED_MEMORY
from kvbm.errors import InspectError
from kvbm.inspect.capture import capture, resolve, write_snapshot
from tests.fast.instances import instance
from tests.inspect.conftest import Inspect
from tests.inspect.samples import Sample
from tests.small_engine import SmallEngine
from tests.stress.traffic import Payloads, run

KILLS = 3


def test_a_capture_attaches_to_nothing_and_changes_nothing(sample: Sample) -> None:
    path = SHARED_MEMORY / sample.instance.name.lstrip("/")
    before = path.read_bytes()
    taken = capture(sample.name)
    assert taken.data == before == path.read_bytes()
    assert taken.locked == {0, 16, 17}
    assert taken.in_use
    assert taken.objects == {sample.instance.name: len(before)}


def test_a_segment_that_others_have_open_is_in_use_and_then_idle(engine: SmallEngine) -> None:
    assert capture(engine.instance).in_use
    assert 0 in capture(engine.instance).arenas
    with open(SHARED_MEMORY / engine.segment.name.lstrip("/"), "rb") as file:
        assert file.fileno() >= 0  # a reader that holds no lock is no user
        names = capture(engine.instance).objects
    assert set(names) == {engine.segment.name, engine.segment.name + ".host.0"}


@pytest.mark.parametrize("form", ["{}", "/kvbm-{}", "kvbm-{}", "/dev/shm/kvbm-{}"])
def test_an_instance_is_found_under_its_name_and_its_objects(form: str, sample: Sample) -> None:
    assert resolve(form.format(sample.name)) == sample.name


def test_without_a_name_the_only_instance_is_meant(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm.inspect.capture.instances", lambda: {"one": []})
    assert resolve(None) == "one"
    monkeypatch.setattr("kvbm.inspect.capture.instances", lambda: {"one": [], "two": []})
    with pytest.raises(InspectError, match="instances on this host: one, two"):
        resolve(None)
    monkeypatch.setattr("kvbm.inspect.capture.instances", dict)
    with pytest.raises(InspectError, match="instances on this host: none"):
        resolve(None)


def test_a_plain_copy_is_read_without_knowing_who_is_alive(
    sample: Sample, tmp_path: Path, inspect: Inspect
) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes((SHARED_MEMORY / sample.instance.name.lstrip("/")).read_bytes())
    result = inspect("participants", copy)
    assert result.exit_code == 0
    assert result.stdout.count("?") == 3
    assert "unknown" in inspect("show", copy).stdout
    assert "who was alive is not known" in inspect("verify", copy).stdout


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "a byte of the segment": lambda data: data[:2000] + b"\xff\xff\xff" + data[2003:],
    "no entries": lambda data: b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_snapshot_is_one_line(how: str, snapshot_file: Path, inspect: Inspect) -> None:
    damaged = Path("damaged.kvbm")
    damaged.write_bytes(DAMAGE[how](snapshot_file.read_bytes()))
    result = inspect("verify", damaged)
    assert result.exit_code in (1, 2)  # what is no archive any more is read as a plain copy
    assert "damaged" in result.stderr or "violated     layout" in result.stdout


def test_a_snapshot_of_another_format_is_refused(
    snapshot_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = capture(str(snapshot_file))
    with monkeypatch.context() as patch:
        patch.setattr("kvbm.inspect.capture.SNAPSHOT_FORMAT", 99)
        write_snapshot(taken, Path("other.kvbm"))
    with pytest.raises(InspectError, match="a snapshot of format 99, this version reads 1"):
        capture("other.kvbm")
    assert sorted(path.name for path in Path().iterdir()) == ["other.kvbm", "sample.kvbm"]


def work(name: str, seed: int, ready: multiprocessing.connection.Connection) -> None:
    """A leader's process that reports until it is killed."""
    run(name, seed, 60, lambda done: ready.send(Counter(done)))


def test_every_command_reads_what_a_killed_leader_left(tmp_path: Path, inspect: Inspect) -> None:
    one = instance(host_slots=200)
    payloads = Payloads(one.name, 200)
    name = one.name.removeprefix("/kvbm-")
    context = multiprocessing.get_context("forkserver")
    try:
        for kill in range(KILLS):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(one.name, kill, theirs), daemon=True)
            process.start()
            assert mine.poll(30)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            mine.close()
            theirs.close()
            for command in ("show", "blocks", "tree", "ops", "participants", "verify"):
                assert inspect(command, name).exit_code == 0, command
            picture = tmp_path / "map.svg"
            assert inspect("map", picture, name).exit_code == 0
            assert picture.stat().st_size > 10_000
            assert "dead" in inspect("show", name).stdout.splitlines()[0]
    finally:
        payloads.close(remove=True)
        one.remove()
