# SPDX-License-Identifier: Apache-2.0
"""Closing what a process leaves open when it ends."""

import atexit
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import util as multiprocessing_util
from types import MethodType
from typing import cast


def call_after_children(call: Callable[[], None]) -> None:
    """Call a function at the end of this process, once its `multiprocessing` children are gone.

    Not in children that are forked from it.
    """
    # Those with a negative priority come after the children have been joined.
    multiprocessing_util.Finalize(None, call, exitpriority=-1)


def close_at_exit(owner: object, close: Callable[[], None]) -> None:
    """Call a bound method when the process ends, unless its object has gone before.

    Children of `multiprocessing` end without running `atexit`, but run the finalizers of their own
    module; an ordinary process may run both, so the method must bear being called twice.
    """
    # Not a WeakMethod: where a garbage collection takes it with its object, its callback fails.
    bound = cast(MethodType, close)
    target, method = weakref.ref(bound.__self__), bound.__func__

    def call() -> None:
        found = target()
        if found is not None:
            method(found)

    atexit.register(call)
    finalizer = multiprocessing_util.Finalize(None, call, exitpriority=100)

    def forget() -> None:
        atexit.unregister(call)
        finalizer.cancel()

    # Not at exit: `weakref` has a hook of its own there, which could forget the call before it ran.
    weakref.finalize(owner, forget).atexit = False


@contextmanager
def end_asked_for() -> Iterator[Callable[[], None]]:
    """Take SIGINT and SIGTERM as a wish to end; gives a function that waits for one of them.

    Also where a shell has started the process with SIGINT ignored, as it does in the background,
    and where the kernel gives the signal to a thread of some library: Python's own waits would not
    notice that. In the main thread only.
    """
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    wakeup = signal.set_wakeup_fd(writes)
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(one, lambda *_: None) for one in signals]

    def wait() -> None:
        os.read(reads, 1)

    try:
        yield wait
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(reads)
        os.close(writes)
