# SPDX-License-Identifier: Apache-2.0
"""A record of what the leader decided, and on what: JSON lines, for `kvbm.replay` and for people.

Upstream records its leader's calls; so does this, with what came of each. ``docs/replay.md`` has
the format. The scheduler's thread does no more than put a tuple into a queue; another one makes
the lines. The record is bounded: one that has reached its size, or cannot be written, ends with a
log line, and events that the writer cannot keep up with are counted and left out.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import queue
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kvbm._fast.keys import Keys
from kvbm._fast.objects import open_file
from kvbm._fast.operation_table import OperationTable
from kvbm.config import Settings
from kvbm.errors import ConfigError
from kvbm.leader.disk_tier import DiskTier
from kvbm.leader.leader import Leader
from kvbm.leader.sequences import TrackedSequence

logger = logging.getLogger(__name__)

FORMAT = 1
QUEUE_EVENTS = 10_000
FILES_MAX = 16
CLOSE_SECS = 5.0
"""Longest wait at the end for what is still to be written."""


class Recorder:
    """Writes events to a file, by a thread of its own.

    Parameters
    ----------
    path : Path
        File to write, emptied first. While another engine writes it (data-parallel ones have one
        setting), ``-1``, ``-2``, ... is added to its name.
    bytes_max : int
        Size at which the record ends.

    Raises
    ------
    ConfigError
        The file cannot be opened.
    """

    def __init__(self, path: Path, bytes_max: int) -> None:
        self.path, descriptor = _open(path)
        self.left_out = 0
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._bytes_left = bytes_max
        self._began_ns = time.monotonic_ns()
        self._events: queue.Queue[tuple[int, str, dict[str, Any]] | None]
        self._events = queue.Queue(QUEUE_EVENTS)
        self._thread = threading.Thread(target=self._write, name="kvbm-recorder", daemon=True)

    def start(self) -> None:
        """Begin to write; until then events are kept."""
        self._thread.start()

    def record(self, event: str, **facts: Any) -> None:
        """Add an event; never waits. A fact that is an array or bytes of uint64 becomes a list."""
        try:
            self._events.put_nowait((time.monotonic_ns() - self._began_ns, event, facts))
        except queue.Full:
            self.left_out += 1

    def close(self) -> None:
        """Write what is there and close the file."""
        if not self._thread.is_alive():
            self._file.close()
            return
        try:
            self._events.put(None, timeout=CLOSE_SECS)
        except queue.Full:
            logger.warning("%s: the end of the record could not be written", self.path)
            return
        self._thread.join(CLOSE_SECS)

    def _write(self) -> None:
        """Take events until the end; after a failure they are only taken."""
        while (entry := self._events.get()) is not None:
            if self._bytes_left > 0:
                self._attempt(partial(self._write_line, *entry))
        self._attempt(self._file.close)

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            if self._bytes_left > 0:
                logger.warning("%s cannot be written any more: %s", self.path, error)
            self._bytes_left = 0

    def _write_line(self, elapsed_ns: int, event: str, facts: dict[str, Any]) -> None:
        self._file.write(self._line(elapsed_ns, event, facts))
        if self._bytes_left <= 0:
            logger.warning("%s has reached DYN_KVBM_RECORD_MAX_GB; the record ends", self.path)
        if self._events.empty():
            self._file.flush()

    def _line(self, elapsed_ns: int, event: str, facts: dict[str, Any]) -> str:
        if self.left_out:
            facts["left_out"] = self.left_out
        line = json.dumps({"t_ms": elapsed_ns / 1e6, "event": event, **facts}, default=_list) + "\n"
        self._bytes_left -= len(line)
        return line


def _open(path: Path) -> tuple[Path, int]:
    """Open and empty the first file of that name that no other engine writes; its descriptor."""
    for number in range(FILES_MAX):
        free = path.with_stem(f"{path.stem}-{number}") if number else path
        try:
            descriptor = _open_own(free)
        except OSError as error:
            raise ConfigError(
                f"DYN_KVBM_RECORD_PATH={str(path)!r} cannot be written: {error.strerror} "
                "(allowed: a file of your own, not a link, in a folder that exists)"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        os.ftruncate(descriptor, 0)
        return free, descriptor
    raise ConfigError(
        f"DYN_KVBM_RECORD_PATH={str(path)!r}: {FILES_MAX} engines write records of that name "
        "(allowed: another name)"
    )


def _open_own(path: Path) -> int:
    """Open or make a file; nobody else's, since the default's folder is everybody's."""
    descriptor = open_file(path, str(path), os.O_WRONLY | os.O_CREAT, trusted=False)
    owner = os.fstat(descriptor).st_uid
    if owner != os.geteuid():
        os.close(descriptor)
        raise PermissionError(errno.EACCES, f"it belongs to user {owner}")
    return descriptor


def open_recorder(settings: Settings) -> Recorder | None:
    """Begin the record that the settings ask for; None if they ask for none."""
    if not settings.enable_record:
        return None
    return Recorder(settings.record_path, int(settings.record_max_gb * 1e9))


def _list(value: object) -> list[int]:
    """Sequence hashes as JSON has them."""
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} does not belong into a record")
    return array("Q", value).tolist()


class RecordedLeader(Leader):
    """A leader whose decisions are recorded.

    Parameters
    ----------
    table, block_tokens, disk
        As for `Leader`.
    recorder : Recorder
        Closed with the leader.
    """

    def __init__(
        self, table: OperationTable, block_tokens: int, disk: DiskTier | None, recorder: Recorder
    ) -> None:
        super().__init__(table, block_tokens, disk)
        self.recorder = recorder
        recorder.start()
        shape = table.segment.shape
        recorder.record(
            "begin",
            format=FORMAT,
            unix_s=time.time(),
            segment=table.segment.name,
            block_tokens=block_tokens,
            host_slots=shape.host_slots,
            ranks=shape.ranks,
        )

    def track(self, request_id: str, keys: Sequence[Keys]) -> TrackedSequence:
        """Begin a sequence; see `Leader.track`."""
        sequence = super().track(request_id, keys)
        first = keys[0]
        self.recorder.record(
            "request",
            request=request_id,
            groups=len(keys),
            blocks=first.sequence_hashes(0, len(first)),
        )
        return sequence

    def match(self, sequence: TrackedSequence, start: int, stop: int) -> int:
        """Longest run of cached blocks; see `Leader.match`."""
        count = super().match(sequence, start, stop)
        self.recorder.record(
            "match", request=sequence.request_id, start=start, stop=stop, hits=count
        )
        return count

    def load(self, sequence: TrackedSequence, count: int) -> None:
        """Copy matched blocks to the device; see `Leader.load`."""
        super().load(sequence, count)
        self.recorder.record(
            "load",
            request=sequence.request_id,
            start=sequence.matched_from,
            blocks=count,
            operations=len(sequence.loads),
            failed=sequence.load_failed,
        )

    def _store(self, sequence: TrackedSequence, upto: int, step: int, priority: int = 0) -> None:
        before = len(sequence.stores)
        super()._store(sequence, upto, step, priority)
        if len(sequence.stores) > before:
            self.recorder.record(
                "store",
                request=sequence.request_id,
                step=step,
                stored=[group.stored for group in sequence.groups],
                operations=len(sequence.stores) - before,
            )

    def finish(self, request_id: str, computed_blocks: int, load_failed: bool = False) -> bool:
        """End a request; see `Leader.finish`."""
        sequence = self.sequences.get(request_id)
        held = super().finish(request_id, computed_blocks, load_failed)
        if sequence is not None:
            keys = sequence.groups[0].keys
            self.recorder.record(
                "finish",
                request=request_id,
                computed_blocks=computed_blocks,
                held=held,
                blocks=keys.sequence_hashes(0, min(computed_blocks, len(keys))),
            )
        return held

    def reset(self) -> int:
        """Make all cached content unreachable; see `Leader.reset`."""
        given_back = super().reset()
        self.recorder.record("reset", given_back=given_back)
        return given_back

    def close(self) -> None:
        """Return everything that this leader holds, and end the record."""
        super().close()
        self.recorder.close()


def make_leader(
    table: OperationTable, block_tokens: int, disk: DiskTier | None, recorder: Recorder | None
) -> Leader:
    """A leader whose decisions are recorded, if there is a recorder."""
    if recorder is None:
        return Leader(table, block_tokens, disk)
    return RecordedLeader(table, block_tokens, disk, recorder)
