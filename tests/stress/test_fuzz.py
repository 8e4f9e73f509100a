# SPDX-License-Identifier: Apache-2.0
"""Hostile and corrupt segments end in a refusal or a bounded answer; what does not is noticed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tests.fuzz.__main__ as fuzz
from scripts import sanitize
from tests.fast.raw_segment import SHM
from tests.fuzz import cases, server
from tests.fuzz.cases import Case
from tests.fuzz.server import WALKS, Server, walks_for

CASES = 2000
SECONDS = 12
CORPUS = Path(fuzz.__file__).with_name("corpus.jsonl")


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose children have little processor time."""
    monkeypatch.setattr(server, "CPU_SECS", 3.0)
    with Server() as one:
        yield one
    assert not [*SHM.glob(f"kvbm-fuzz-{os.getpid()}*")]


def command(*arguments: object) -> list[str]:
    """The command line of a run."""
    return [sys.executable, "-m", fuzz.__name__.rpartition(".")[0], *map(str, arguments)]


def found(status: int, output: str) -> Any:
    """The summary of a run that found nothing."""
    assert status == 0, output[-5000:]
    summary = json.loads(output.splitlines()[-1])
    assert summary["failures"] == []
    return summary


@pytest.mark.slow
def test_no_case_ends_badly(scale: float, summary: list[str]) -> None:
    """Cases of fixed seeds, as many as there is time for, and every walk in them."""
    seconds = SECONDS * scale
    words = command("--cases", int(CASES * max(1, scale)), "--seconds", seconds)
    done = subprocess.run(words, capture_output=True, text=True)
    did = found(done.returncode, done.stdout or done.stderr)
    walked = {outcome.split()[0] for outcome in did["outcomes"]}
    assert walked == set(WALKS)
    assert sum(n for name, n in did["outcomes"].items() if name.endswith("answered")) > 100
    assert sum(n for name, n in did["outcomes"].items() if name.endswith("refused")) > 100
    summary.append(
        f"fuzz: {did['cases']} corrupt segments, {sum(did['outcomes'].values())} walks through "
        "them, 0 crashes, 0 hangs"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_case_reads_or_writes_outside_of_its_memory(
    address_build: Path, tmp_path: Path, scale: float, summary: list[str]
) -> None:
    seconds = SECONDS * scale / 2
    words = command("--cases", int(CASES * max(1, scale)), "--seconds", seconds, "--seed", 10**6)
    done = sanitize.watch("address", address_build, tmp_path / "reports", words, capture=True)
    assert not done.reports, "\n".join(done.reports)
    did = found(done.status, done.output)
    summary.append(f"fuzz with the address sanitizer: {did['cases']} corrupt segments, 0 reports")


def kept() -> list[tuple[str, Case]]:
    """The corpus: what a check that is missing has let through, with the name of the check."""
    lines = [json.loads(line) for line in CORPUS.read_text().splitlines()]
    return [(line["without"], Case.from_json(json.dumps(line["case"]))) for line in lines]


def test_no_case_of_the_corpus_ends_badly() -> None:
    with Server() as one:
        result = one.run([case for _, case in kept()])
    assert [(failure.how, failure.case) for failure in result.failures] == []
    assert result.cases == len(kept()) > 10


def test_a_case_is_the_same_from_its_seed_and_from_its_line(serving: Server) -> None:
    images = [*serving.images.values()]
    made = [cases.make(seed, images, walks_for) for seed in range(50)]
    assert made == [cases.make(seed, images, walks_for) for seed in range(50)]
    assert made == [Case.from_json(case.to_json()) for case in made]
    assert len({case.steps for case in made}) == 50


def crash(*_: object) -> None:
    """End as an access outside of any memory does."""
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(*_: object) -> None:
    """Never end, with work."""
    while True:
        pass


def sleep(*_: object) -> None:
    """Never end, without work."""
    signal.pause()


def fill(*_: object) -> None:
    """Take all the memory that there is."""
    bytearray(64 << 30)


def confuse(*_: object) -> None:
    """Fail in a way that says nothing to whoever asked."""
    raise TypeError("a bug")


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        (crash, "SIGSEGV"),
        (hang, "SIGVTALRM"),
        (sleep, "SIGALRM"),
        (fill, "MemoryError"),
        (confuse, "TypeError: a bug"),
    ],
)
def test_a_case_that_ends_badly_is_named_and_the_others_run(
    fault: Any, how: str, serving: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(server.WALKS, "fault", fault)
    if fault is sleep:
        monkeypatch.setattr(server, "CLOCK_SECS", 5.0)
    good = Case("full", (("walk", "look", 1),))
    noise = ("set", "counters", 0, "value", 0, 7)
    bad = Case("full", (noise, ("walk", "look", 1), ("walk", "fault", 1), noise))
    result = serving.run([good, good, bad, good])
    assert result.cases == 4
    assert [failure.case for failure in result.failures] == [bad]
    assert how in result.failures[0].how
    assert result.outcomes["look answered"] >= 3
    if fault in (crash, confuse):
        shortest = server.shorter(serving, result.failures[0])
        assert shortest.steps == (("walk", "fault", 1),)
