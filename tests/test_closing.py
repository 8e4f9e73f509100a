# SPDX-License-Identifier: Apache-2.0
"""What a process leaves open is closed when it ends, however it ends in good order."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys

import pytest

from kvbm.closing import close_at_exit

PROGRAM = """
import multiprocessing, sys
from kvbm.closing import close_at_exit

class Open:
    def close(self):
        print("closed", flush=True)

def begin():
    global one
    one = Open()
    close_at_exit(one, one.close)

if __name__ == "__main__":
    if sys.argv[1] == "self":
        begin()
    else:
        child = multiprocessing.get_context(sys.argv[1]).Process(target=begin)
        child.start()
        child.join()
"""


class Open:
    """Counts how often it was closed."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        """Count."""
        self.closed += 1


def output_of(text: str, how: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a program prints that ends in good order."""
    program = tmp_path_factory.mktemp("closing") / "program.py"
    program.write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(program), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["self", "fork", "spawn"])
def test_a_process_and_a_child_of_multiprocessing_close_at_their_end(
    how: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert "closed" in output_of(PROGRAM, how, tmp_path_factory)


def test_an_object_that_is_gone_is_neither_kept_nor_closed() -> None:
    closed: list[Open] = []

    class Gone(Open):
        def close(self) -> None:
            closed.append(self)

    one = Gone()
    close_at_exit(one, one.close)
    del one
    gc.collect()
    assert closed == []
    assert not [o for o in gc.get_objects() if type(o) is Gone]


END_PROGRAM = """
import multiprocessing, sys, threading
from kvbm.closing import call_after_children, close_at_exit

class Open:
    def __init__(self, told):
        self.told = told

    def close(self):
        print("closed", flush=True)
        self.told.send("closed")

def child(parent):
    parent.recv()
    threading.Event().wait(0.2)  # time in which a call that does not wait would come
    print("child", flush=True)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    theirs, ours = context.Pipe(duplex=False)
    call_after_children(lambda: print("end", flush=True))
    one = Open(ours)
    close_at_exit(one, one.close)
    context.Process(target=child, args=(theirs,)).start()
"""


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_call_after_children_comes_once_and_last(
    how: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = output_of(END_PROGRAM, how, tmp_path_factory).split()
    assert lines[-2:] == ["child", "end"]
    assert lines.count("end") == 1
    assert "closed" in lines[:-2]


WAITING = """
import signal, sys, threading
from kvbm.closing import end_asked_for

signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it starts in the background
# A thread of some library, which lets signals in; the main thread does not.
ends = threading.Event()
threading.Thread(target=ends.wait).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
with end_asked_for() as wait:
    print("ready", flush=True)
    wait()
ends.set()
print("asked to end", signal.getsignal(signal.SIGTERM).name)
"""


@pytest.mark.parametrize("asked_by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_wish_to_end_whichever_thread_gets_it(asked_by: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(asked_by)
        text, _ = process.communicate(timeout=60)
    assert (process.returncode, text) == (0, "asked to end SIG_DFL\n")
