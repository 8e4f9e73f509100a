# SPDX-License-Identifier: Apache-2.0
"""Scraping over HTTP; a port in use costs the metrics and nothing else."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
from pathlib import Path

import pytest

from kvbm._fast.keys import Keys
from kvbm.metrics.__main__ import main
from kvbm.metrics.exporter import Exporter, start_exporter
from tests.fast.instances import cache, digests
from tests.inspect.samples import Sample
from tests.metrics.scrape import free_port, scrape, value

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_scrape_shows_the_moment(sample: Sample) -> None:
    rates = [(0.0, 0.0)]
    exporter = Exporter(lambda: [sample.name], 0, lambda: rates[0], "127.0.0.1")
    try:
        assert value(scrape(exporter.port), "kvbm_blocks", state="registered") == 20
        cache(sample.table, Keys(digests(7, "between two scrapes")))
        rates[0] = (0.75, 0.0)
        found = scrape(exporter.port)
        assert value(found, "kvbm_blocks", state="registered") == 27
        assert value(found, "kvbm_host_cache_hit_rate") == 0.75
    finally:
        exporter.close()
    with pytest.raises(urllib.error.URLError):
        scrape(exporter.port)


def test_scrapes_at_once_do_not_disturb_each_other(sample: Sample) -> None:
    exporter = Exporter(lambda: [sample.name], 0, None, "127.0.0.1")
    found: list[float] = []

    def ask() -> None:
        for _ in range(5):
            found.append(value(scrape(exporter.port), "kvbm_blocks", state="registered"))

    threads = [threading.Thread(target=ask, name="kvbm-test-scrape") for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        exporter.close()
    assert found == [20.0] * 20


def test_a_port_in_use_is_a_warning_that_says_what_to_do(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("kvbm"), "propagate", True)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert start_exporter("any", port, lambda: (0.0, 0.0)) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"no metrics on port {port} (Address already in use)" in caplog.text
    assert "DYN_KVBM_METRICS_PORT" in caplog.text


def test_an_engines_exporter_serves_and_gives_its_port_back(sample: Sample) -> None:
    port = free_port()
    for _ in range(2):
        exporter = start_exporter(sample.name, port, lambda: (0.0, 0.0))
        assert exporter is not None
        assert value(scrape(port), "kvbm_up") == 1
        exporter.close()


def test_the_exporter_of_its_own_serves_all_instances_until_a_signal(sample: Sample) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kvbm.metrics", "--port", "0", "--address", "127.0.0.1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        match = re.match(r"serving on 127\.0\.0\.1:(\d+)/metrics", process.stdout.readline())
        assert match is not None
        found = scrape(int(match[1]))
        assert value(found, "kvbm_blocks", instance=sample.name, state="registered") == 20
        assert not [name for name, _ in found if name.endswith("hit_rate")]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_port_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "70000"]) == 1
    assert capsys.readouterr().err.startswith("kvbm.metrics: ")
