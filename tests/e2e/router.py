# SPDX-License-Identifier: Apache-2.0
"""A router in a process of its own, to be killed: ``python -m tests.e2e.router``.

Its arguments are output, replay socket and a file. After each batch it saves to the file what it
knows and the number that it expects next; started with that file, it goes on from there. For each
line on its standard input it prints what it knows.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from kvbm.events.index import EventIndex
from kvbm.events.zmq_receiver import BatchReceiver

ROOT = Path(__file__).resolve().parent.parent.parent
END_S = 30.0


class Router:
    """Starts the process, asks it, and kills it as nobody expects; a context manager."""

    def __init__(self, output: str, replay: str, memory: Path) -> None:
        self.starts = 0
        self._command = [sys.executable, "-m", "tests.e2e.router", output, replay, str(memory)]
        self._memory = memory

    def __enter__(self) -> Router:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._kill()

    def restart(self, remembers: bool) -> None:
        """Kill it and start it again, with or without what it had saved."""
        self._kill()
        if not remembers:
            self._memory.unlink(missing_ok=True)
        self._start()

    def knows(self) -> dict[str, Any]:
        """What it knows: `blocks`, `parents`, `ranks`, `lost`, and how many `resumed` starts."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(b"\n")
        stdin.flush()
        told: dict[str, Any] = json.loads(stdout.readline())
        for name in ("blocks", "parents"):  # JSON has text keys only
            told[name] = {int(key): value for key, value in told[name].items()}
        return told

    def _start(self) -> None:
        self.starts += 1
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, env=environment, stdin=pipe, stdout=pipe)

    def _kill(self) -> None:
        with self._process as process:  # closes the pipes
            process.kill()
            process.wait(END_S)


def state_of(receiver: BatchReceiver, index: EventIndex, ranks: set[int]) -> dict[str, Any]:
    """What is saved and printed."""
    return {
        "blocks": index.blocks,
        "parents": index.parents,
        "ranks": sorted(ranks),
        "lost": receiver.lost,
        "expected": receiver.expected,
    }


def save(memory: Path, state: dict[str, Any]) -> None:
    """Replace what was saved: a kill leaves the old or the new."""
    fresh = memory.with_suffix(".new")
    fresh.write_text(json.dumps(state))
    fresh.replace(memory)


def main(output: str, replay: str, memory: Path) -> None:
    """Receive until the standard input is closed."""
    index, ranks, expected = EventIndex(), set(), None
    if memory.exists():
        state = json.loads(memory.read_text())
        index.blocks = {int(key): value for key, value in state["blocks"].items()}
        index.parents = {int(key): value for key, value in state["parents"].items()}
        expected = state["expected"]
    resumed = expected is not None
    receiver = BatchReceiver(output, replay, expected)
    while True:
        batches = receiver.receive(0.02)
        for batch in batches:
            index.apply(batch)
            ranks.add(batch.rank)
        if batches:
            save(memory, state_of(receiver, index, ranks))
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                break
            print(json.dumps({**state_of(receiver, index, ranks), "resumed": resumed}), flush=True)
    receiver.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
