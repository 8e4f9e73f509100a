# SPDX-License-Identifier: Apache-2.0
"""Runs cases in forked children, some dozens each, and says how each that ended badly did.

A child that a signal ends was at the case that it named last. The kernel ends one that needs too
much processor time for a case (SIGVTALRM), or too much time of the clock (SIGALRM), wherever it is.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import resource
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz import disk, readers, steps
from tests.fuzz.cases import Case, Maker
from tests.fuzz.images import IMAGES, Image, make
from tests.fuzz.world import World, run_case

BATCH = 150
CPU_SECS = 10.0
CLOCK_SECS = 60.0
MEMORY_BYTES = 4 << 30
"""More than this in addition is as bad as a crash; not with a sanitizer, whose shadow is memory."""

WALKS: dict[str, Callable[..., object]] = {**steps.WALKS, **readers.WALKS, **disk.WALKS}
CHEAP = (
    "match",
    "unpin",
    "reserve",
    "publish",
    "operate",
    "collect",
    "disturb",
    "disturb_chain",
    "control",
    "look",
)
SELDOM = ("recovery", "take_part", "open_engine", "worker", *readers.WALKS)


def walks_for(image: Image) -> Sequence[str]:
    """Names of the walks through an image; the cheap ones several times."""
    return [*CHEAP * 5, *SELDOM, *(disk.WALKS if image.name == "disk" else ())]


@dataclass
class Failure:
    """A case that ended badly, and how."""

    case: Case
    how: str


@dataclass
class Result:
    """What a run found."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)


class Server:
    """Images, made once, and the children that run cases on them; a context manager."""

    def __init__(self) -> None:
        self.images = {name: make(name) for name in IMAGES}
        self.folder = Path(tempfile.mkdtemp(prefix="kvbm-fuzz-"))
        self.world = World(f"fuzz-{os.getpid()}", self.images, self.folder)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.world.remove()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def run(self, cases: Sequence[Case]) -> Result:
        """Run cases; after one that ended badly a new child goes on with the next."""
        result = Result()
        todo = list(cases)
        while todo:
            done = self._child(todo[:BATCH], result)
            result.cases += done
            del todo[:done]
        return result

    def _child(self, cases: Sequence[Case], result: Result) -> int:
        """Run a batch in a child; how many cases are over."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self._serve(cases, writing)
        os.close(writing)
        finished, raised = 0, ""
        with os.fdopen(reading) as lines:
            for line in lines:
                found = json.loads(line)
                result.outcomes.update(found["outcomes"])
                raised = found["raised"]
                finished += 1
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if raised:
            result.failures.append(Failure(cases[finished - 1], raised))
        elif status != 0 or finished < len(cases):
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            result.failures.append(Failure(cases[min(finished, len(cases) - 1)], how))
            finished = min(finished + 1, len(cases))
        return finished

    def _serve(self, cases: Sequence[Case], writing: int) -> None:
        """The child: a line a case, until one raises something that is no refusal."""
        status = 1
        try:
            faulthandler.enable()
            for number in (signal.SIGALRM, signal.SIGVTALRM):  # whoever forked may have a handler
                signal.signal(number, signal.SIG_DFL)
            logging.disable()
            if "LD_PRELOAD" not in os.environ:
                _bound_memory()
            for case in cases:
                signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECS)
                signal.setitimer(signal.ITIMER_REAL, CLOCK_SECS)
                outcomes, raised = self._one(case)
                line = json.dumps({"outcomes": outcomes, "raised": raised}) + "\n"
                os.write(writing, line.encode())
                if raised:
                    break
            status = 0
        finally:
            os._exit(status)

    def _one(self, case: Case) -> tuple[list[str], str]:
        scribbling = scribbler(self.world, case) if case.racing else contextlib.nullcontext()
        with scribbling:
            try:
                return run_case(self.world, case, WALKS), ""
            except Exception:  # noqa: BLE001  each is a finding
                return [], traceback.format_exc()


def _bound_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))


@contextlib.contextmanager
def scribbler(world: World, case: Case) -> Iterator[None]:
    """Another process, which edits the segment as long as the case runs."""
    image = world.images[case.image]
    world.begin(image)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            # Where the case makes the segment shorter, an edit under way ends this process, and
            # nothing is wrong.
            faulthandler.disable()
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            maker = Maker(image, Random(case.seed))
            world.image = image
            while os.getppid() == parent:
                world.edit(maker.many())
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def shorter(server: Server, failure: Failure) -> Case:
    """The same failure with fewer steps: each is left out that is not needed."""
    case = failure.case
    size = max(1, len(case.steps) // 2)
    while size:
        at = 0
        while at < len(case.steps):
            less = Case(
                case.image, case.steps[:at] + case.steps[at + size :], case.racing, case.seed
            )
            if server.run([less]).failures:
                case = less
            else:
                at += size
        size //= 2
    return case
