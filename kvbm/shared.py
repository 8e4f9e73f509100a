# SPDX-License-Identifier: Apache-2.0
"""Opening an instance's segment: create it, adopt one that fits, or say why neither is possible."""

import logging
import os
import time
from dataclasses import dataclass

from kvbm._fast.locks import try_lock
from kvbm._fast.objects import object_path, open_object
from kvbm._fast.participants import claim_leader, participants
from kvbm._fast.recovery import recover
from kvbm._fast.segment import (
    FORMAT,
    LOCK_USERS_OFFSET,
    MAX_LEADERS,
    Segment,
    SegmentFault,
    Shape,
    segment_bytes,
    shape_for,
)
from kvbm.errors import (
    FingerprintMismatch,
    SegmentAccessDenied,
    SegmentCorrupt,
    SegmentError,
    SegmentInUse,
    TooManyLeaders,
    VersionMismatch,
)
from kvbm.fingerprint import Fingerprint, differences
from kvbm.instance import (
    arena_names,
    cannot_make,
    instances,
    is_private,
    remove_dead_private_instances,
    remove_if_unused,
    remove_ranks_from,
    reserved_bytes,
    segment_name,
)

logger = logging.getLogger(__name__)

CREATOR_SECS = 10.0
"""How long a segment may take from its creation to its magic before it counts as abandoned."""

ENDING_SECS = 5.0
"""Longest wait, at the end of a process, for the workers of engines that it has killed."""

USER_SECS = 0.5
"""How long somebody must have been attached at every look to count as a user."""


@dataclass(frozen=True)
class SegmentSpec:
    """What an engine wants its segment to be.

    Attributes
    ----------
    instance : str
        Name of the instance.
    host_slots, ranks, block_tokens : int
        Sizes: blocks, ranks, tokens.
    fingerprint : Fingerprint
        What must be equal for cached bytes to be reusable.
    nonces : tuple of int
        Of the content of each rank's arena.
    group : int or None
        Group id whose members may use it, too.
    disk_slots : int
        Size of the disk tier, for the workers; its blocks have a segment of their own.
    """

    instance: str
    host_slots: int
    ranks: int
    block_tokens: int
    fingerprint: Fingerprint
    nonces: tuple[int, ...]
    group: int | None = None
    disk_slots: int = 0

    @property
    def shape(self) -> Shape:
        """Sizes of the segment."""
        shape = shape_for(
            self.host_slots, 0, self.ranks, self.block_tokens, is_private(self.instance)
        )
        return shape._replace(disk_slots=self.disk_slots)

    def missing_bytes(self, bytes_per_block: int) -> int:
        """Shared memory that segment and arenas need beyond what they have already, in bytes.

        `bytes_per_block` is of all ranks together. Negative where there is more than is needed.
        """
        wanted = self.host_slots * bytes_per_block + segment_bytes(self.shape)
        names = [segment_name(self.instance), *arena_names(self.instance)]
        return wanted - reserved_bytes(names)


def open_as_leader(spec: SegmentSpec, engine: int) -> Segment:
    """Create or adopt the segment and claim a leader line in it.

    Content that does not fit (another fingerprint, size or format, arenas that belong to something
    else) is refused with one line in the log and replaced, unless a live engine uses it.

    Raises
    ------
    SegmentInUse, FingerprintMismatch, VersionMismatch
        A live engine uses the instance with other contents.
    TooManyLeaders
        All leader slots are taken.
    SegmentAccessDenied
        It belongs to another user, or others may write it.
    """
    segment = _adopt(spec) or _create(spec)
    try:
        recover(segment, rebuild=not any(line.alive for line in participants(segment)))
        claim_leader(segment, engine)
    except SegmentFault as fault:
        segment.close()
        if fault.kind == "full":
            raise TooManyLeaders(segment.name, MAX_LEADERS) from None
        raise
    except BaseException:
        segment.close()
        raise
    return segment


def _create(spec: SegmentSpec) -> Segment:
    name = segment_name(spec.instance)
    deadline = time.monotonic() + CREATOR_SECS
    while True:
        try:
            return Segment.create(
                name,
                spec.shape,
                spec.fingerprint.digest,
                spec.fingerprint.description,
                spec.group,
            )
        except PermissionError as error:
            raise SegmentAccessDenied(name, error.strerror or "") from None
        except FileExistsError:  # another engine was faster
            segment = _adopt(spec)
            if segment is not None:
                return segment
            if time.monotonic() > deadline:
                raise SegmentInUse(name, "it can neither be attached nor replaced") from None
        except OSError as error:
            raise cannot_make(name, segment_bytes(spec.shape), error) from None


def fault_error(name: str, fault: SegmentFault) -> SegmentError:
    """Return the error for an object that cannot be attached, which names both formats."""
    if fault.kind == "version":
        return VersionMismatch(name, fault.found, FORMAT)
    return SegmentCorrupt(name, str(fault))


def _attach_when_ready(name: str, group: int | None) -> Segment:
    """Attach; waits for a creator that is at work, for a bounded time."""
    deadline = time.monotonic() + CREATOR_SECS
    while True:
        try:
            return Segment.attach(name, group=group)
        except SegmentFault as fault:
            if fault.kind != "not ready" or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _adopt(spec: SegmentSpec) -> Segment | None:
    """Existing segment if its content is usable; None if there is none, or none any more."""
    name = segment_name(spec.instance)
    while True:  # each turn more means that another engine has replaced the object meanwhile
        try:
            # Opened before it is looked at, so that what is removed is what was looked at.
            fd = open_object(name, group=spec.group)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise SegmentAccessDenied(name, error.strerror or "") from None
        try:
            segment, problem = _look_at(spec)
            if segment is not None:
                return segment
            if problem is not None:
                _remove_unused(fd, spec, problem)
        finally:
            os.close(fd)


def _look_at(spec: SegmentSpec) -> tuple[Segment | None, SegmentError | None]:
    """Segment if it can be used, else why not; neither if it has gone meanwhile."""
    name = segment_name(spec.instance)
    try:
        segment = _attach_when_ready(name, spec.group)
    except FileNotFoundError:
        return None, None
    except SegmentFault as fault:
        return None, fault_error(name, fault)
    problem = _misfit(segment, spec)
    if problem is None:
        return segment, None
    segment.close()
    return None, problem


def _remove_unused(fd: int, spec: SegmentSpec, problem: SegmentError) -> None:
    """Remove a segment that cannot be used, and arenas that its successor has no ranks for.

    The other arenas stay: our workers have opened them, and they get the successor's nonce. Workers
    that look for their leader (our own, at this moment) attach again and again for an instant; who
    uses the segment is there each time, and then the problem is raised.
    """
    deadline = time.monotonic() + USER_SECS
    name = segment_name(spec.instance)
    while not try_lock(fd, LOCK_USERS_OFFSET, exclusive=True):
        if os.fstat(fd).st_nlink == 0:
            return
        if time.monotonic() > deadline:
            raise problem from SegmentInUse(
                name, "end that engine, or give this one another DYN_KVBM_INSTANCE"
            )
        time.sleep(0.001)
    if os.fstat(fd).st_nlink > 0:  # nobody else removes it while the lock is held
        logger.warning("cached content is not used, starting clean: %s", problem)
        os.unlink(object_path(name))
        remove_ranks_from(spec.instance, spec.ranks)


def _misfit(segment: Segment, spec: SegmentSpec) -> SegmentError | None:
    """Why this content cannot be used; None if it can."""
    if segment.fingerprint != spec.fingerprint.digest:
        return FingerprintMismatch(
            segment.name, *differences(segment.description, spec.fingerprint.description)
        )
    if segment.shape != spec.shape:
        return SegmentInUse(
            segment.name, f"it has the sizes {segment.shape}, wanted are {spec.shape}"
        )
    # An engine that has just made the segment may not have marked its arenas yet.
    unmarked = segment.has_other_users()
    if any(nonce != segment.nonce and not (unmarked and nonce == 0) for nonce in spec.nonces):
        return SegmentCorrupt(segment.name, "an arena does not belong to it")
    return None


def remove_as_engines_end(wait_secs: float = ENDING_SECS) -> None:
    """Remove private instances that nobody uses; wait for those whose leader has died to be so.

    For the process that engines were started from: it may have killed them, and a process that is
    killed keeps its locks until the kernel has taken down its memory.
    """
    deadline = time.monotonic() + wait_secs
    while True:
        remove_dead_private_instances()
        ending = any(is_private(one) and _lost_its_leader(one) for one in instances())
        if not ending or time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _lost_its_leader(instance: str) -> bool:
    """Return whether an instance of this user has a segment, and no live leader."""
    name = segment_name(instance)
    try:
        if os.stat(object_path(name), follow_symlinks=False).st_uid != os.geteuid():
            return False
        segment = Segment.attach(name, writable=False)
    except (OSError, SegmentFault):
        return False
    try:
        return not any(line.alive and line.role == "leader" for line in participants(segment))
    finally:
        segment.close()


def close_and_remove(segment: Segment, instance: str) -> None:
    """Detach; the last user of a private instance removes it."""
    segment.close()
    if is_private(instance):
        remove_if_unused(instance)
