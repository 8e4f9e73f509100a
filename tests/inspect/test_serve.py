# SPDX-License-Identifier: Apache-2.0
"""`serve`: the page in a browser, its documents, who may ask, and an end that leaves nothing."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvbm.errors import InspectError
from kvbm.inspect.serve import PageServer, run
from tests.inspect.conftest import Inspect
from tests.inspect.disk_samples import DiskSample
from tests.inspect.samples import Sample
from tests.inspect.test_cli import check_golden

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_S = 60.0
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
BROWSER_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)


@contextmanager
def served(instances: Callable[[], Iterable[str]]) -> Iterator[PageServer]:
    """A server on a free port."""
    made = PageServer(instances, 0, "127.0.0.1")
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


@pytest.fixture
def server(sample: Sample) -> Iterator[PageServer]:
    """A server of the sample."""
    with served(lambda: [sample.name]) as made:
        yield made


def ask(
    server: PageServer, path: str, host: str = "localhost"
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE_S)
    try:
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def document(server: PageServer, path: str, host: str = "localhost") -> tuple[int, Any]:
    status, headers, body = ask(server, path, host)
    assert headers["Content-Type"] == "application/json"
    return status, json.loads(body)


def test_the_documents_are_the_names_and_a_picture(server: PageServer, sample: Sample) -> None:
    assert document(server, "/instances.json") == (
        200,
        {"schema": 1, "command": "list", "instances": [sample.name]},
    )
    status, picture = document(server, f"/frame.json?instance={sample.name}")
    assert status == 200
    assert picture["pools"]["host"] == {"used": 23, "total": 64}


def test_what_is_not_there_is_said_and_no_other_instance_is_shown(server: PageServer) -> None:
    assert document(server, "/frame.json?instance=../other")[1]["error"] == (
        "there is no instance '../other'"
    )
    assert document(server, "/frame.json")[0] == 404
    assert document(server, "/elsewhere") == (
        404,
        {"schema": 1, "error": "there is no /elsewhere"},
    )


def test_the_page_may_only_do_what_it_needs(server: PageServer) -> None:
    status, headers, body = ask(server, "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"
    assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")


@pytest.mark.parametrize(("host", "status"), [("evil.example", 403), ("127.0.0.1:1", 200)])
def test_another_site_cannot_read_a_local_page(server: PageServer, host: str, status: int) -> None:
    assert document(server, "/instances.json", host)[0] == status


def test_an_address_in_use_is_one_line(server: PageServer) -> None:
    with pytest.raises(InspectError, match=f"cannot listen on 127.0.0.1:{server.port}: .*in use"):
        run(list, server.port, "127.0.0.1", print)


def test_a_file_cannot_be_served(snapshot_file: Path, inspect: Inspect) -> None:
    result = inspect("serve", snapshot_file)
    assert result.exit_code == 2
    assert "top and serve follow a live instance" in result.stderr


@pytest.mark.parametrize("words", [("127.0.0.1",), ("::1",), ("127.0.0.1", "--json")])
def test_a_signal_ends_the_command(sample: Sample, words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "kvbm.inspect", "serve", sample.name, "--port", "0"]
    with subprocess.Popen(
        [*command, "--address", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        while "--json" in words and not told.endswith("\n}\n"):
            told += process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, problem = process.communicate(timeout=DEADLINE_S)
    if "Cannot assign requested address" in problem:
        pytest.skip("this host has no IPv6 loopback")
    url = json.loads(told)["url"] if "--json" in words else told
    if "::1" not in words:
        form = "json" if "--json" in words else "txt"
        check_golden(f"serve.{form}", re.sub(r":\d+/", ":PORT/", told))
    assert url.startswith("http://[::1]:" if "::1" in words else "http://127.0.0.1:")
    assert (process.returncode, problem) == (0, "")


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_shows_the_numbers(server: PageServer, sample: Sample, tmp_path: Path) -> None:
    shown = shown_by_a_browser(server, tmp_path)
    assert "<td>written to disk</td>" not in shown
    for text in (
        f'<option value="{sample.name}">',
        "host: 23 of 64 (35.9 %)",
        "registered <b>20</b>",
        "worker 0.1",
        "submitted",
        '<path d="M',
    ):
        assert text in shown, shown


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_shows_the_disk_tier(disk: DiskSample, tmp_path: Path) -> None:
    with served(lambda: [disk.name]) as server:
        shown = shown_by_a_browser(server, tmp_path / "browser")
    for text in ("disk: 18 of 32 (56.3 %)", "<td>written to disk", "<td>read from disk"):
        assert text in shown, shown


def shown_by_a_browser(server: PageServer, folder: Path) -> str:
    """The page as a browser has it after some pictures, without an error."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *BROWSER_OPTIONS,
            f"--user-data-dir={folder}",
            "--virtual-time-budget=2500",
            "--dump-dom",
            f"http://127.0.0.1:{server.port}/",
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert "CONSOLE" not in done.stderr  # neither an error nor a breach of the page's policy
    return done.stdout
