# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` in processes of its own on a free port of the loopback, and its clients."""

from __future__ import annotations

import atexit
import http.client
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.vllm_lab.child import redirect_output
from bench.vllm_lab.engine import fork_server
from bench.vllm_lab.processes import group_members, mapped_kvbm_names
from bench.vllm_lab.settings import EngineSettings
from tests.leaks import wait_until

HOST = "127.0.0.1"
MODEL = "model"
JSON = {"Content-Type": "application/json"}
START_S = 300.0
REQUEST_S = 120.0
END_S = 60.0
LOG_TAIL = 6000  # characters


@dataclass(frozen=True)
class Completion:
    """What a client has received of one request."""

    tokens: tuple[int, ...]
    finish_reason: str | None  # None: the client went away
    cached_tokens: int


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def arguments_of(settings: EngineSettings) -> list[str]:
    """Arguments of `vllm serve` that mean the same as the settings' of an `LLM`."""
    given = settings.llm_arguments()
    command = [given.pop("model"), "--served-model-name", MODEL]
    assert given.pop("disable_log_stats") is False  # on is the default of a server, and has no flag
    for name, value in given.items():
        flag = name.replace("_", "-")
        if value is True:
            command.append(f"--{flag}")
        elif value is False:
            command.append(f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            command += [f"--{flag}", text]
    return command


def serve(settings: EngineSettings, arguments: Sequence[str], log: Path) -> None:
    """Be `vllm serve`; the target of the process that `Server` starts."""
    os.setsid()  # a group of its own, so that all of its processes can be found
    redirect_output(log)
    settings.apply_environment()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # offers /reset_prefix_cache
    sys.argv = ["vllm", "serve", *arguments]
    from vllm.entrypoints.cli.main import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing skips these up to Python 3.12


class Server:
    """A server from start to end: a context manager, at whose end no process is left.

    Parameters
    ----------
    settings : EngineSettings
        The engine; must have `worker_processes`.
    log : Path
        File for the output of all of its processes.
    shutdown_timeout_s : int
        How long vLLM lets its engine core end by itself; 0 is vLLM's default, it kills the core.
    """

    def __init__(
        self, settings: EngineSettings, log: Path, shutdown_timeout_s: int = int(END_S) // 2
    ) -> None:
        self.port = free_port()
        self._log = log
        where = ("--host", HOST, "--port", str(self.port))
        options = ("--enable-prompt-tokens-details", "--shutdown-timeout", str(shutdown_timeout_s))
        arguments = (*arguments_of(settings), *where, *options)
        context = fork_server()
        self._process = context.Process(target=serve, args=(settings, arguments, log))
        self._process.start()

    def __enter__(self) -> Server:
        try:
            self._wait_until_ready()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._kill()

    def stop(self, how: signal.Signals = signal.SIGINT) -> int | None:
        """End it as an operator does, and return its exit status; no process may be left."""
        os.kill(self._process.pid, how)
        self._process.join(END_S)
        assert wait_until(lambda: not self.processes(), END_S), self._tail()
        return self._process.exitcode

    def processes(self) -> list[int]:
        """Ids of its live processes."""
        return group_members(self._process.pid)

    def mapped_names(self) -> tuple[str, ...]:
        """Kvbm's names in /dev/shm that its processes have mapped now."""
        return mapped_kvbm_names(self.processes())

    # ---- clients ---------------------------------------------------------------------------------
    def complete(
        self,
        prompt: Sequence[int],
        output_tokens: int,
        leave_after: int | None = None,
        rank: int | None = None,
    ) -> Completion:
        """Stream a completion; with `leave_after` the client goes away after so many tokens.

        With `rank` that data-parallel engine gets it.
        """
        body = {
            "model": MODEL,
            "prompt": list(prompt),
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        headers = JSON if rank is None else JSON | {"X-data-parallel-rank": str(rank)}
        tokens: list[int] = []
        reason, cached = None, 0
        with self._connection() as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            for event in _events(connection.getresponse()):
                for choice in event["choices"]:
                    tokens += choice["token_ids"]
                    reason = choice["finish_reason"] or reason
                if event.get("usage"):
                    cached = (event["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)
                if leave_after is not None and len(tokens) >= leave_after:
                    return Completion(tuple(tokens), None, cached)
        return Completion(tuple(tokens), reason, cached)

    def post(self, path: str) -> bytes:
        """Send a request without a body; fails unless it is answered with 200."""
        return self._ask("POST", path)

    def metrics(self) -> dict[str, float]:
        """Samples of `/metrics` by name, summed over their labels."""
        samples: dict[str, float] = {}
        for line in self._ask("GET", "/metrics").decode().splitlines():
            if not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], line.rpartition(" ")[2]
                samples[name] = samples.get(name, 0.0) + float(value)
        return samples

    def _ask(self, method: str, path: str) -> bytes:
        with self._connection() as connection:
            connection.request(method, path)
            response = connection.getresponse()
            answer = response.read()
        assert response.status == 200, (path, response.status, answer)
        return answer

    @contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=REQUEST_S)) as connection:
            yield connection

    # ---- start and end ---------------------------------------------------------------------------
    def _wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self._process.is_alive(), self._tail()
            with suppress(OSError):
                self._ask("GET", "/health")
                return True
            return False

        assert wait_until(ready, START_S), self._tail()

    def _kill(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.join(END_S)
        self._process.close()

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_TAIL:] if self._log.exists() else ""


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events of a stream, until its end."""
    assert response.status == 200, response.read()
    with response:
        for line in response:
            data = line.strip().removeprefix(b"data: ")
            if data and data != b"[DONE]":
                event: dict[str, Any] = json.loads(data)
                assert "choices" in event, event
                yield event
