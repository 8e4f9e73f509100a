# SPDX-License-Identifier: Apache-2.0
"""Opening an instance's segment: create it, adopt one that fits, or say why neither is possible."""

import contextlib
import logging
import time
from dataclasses import dataclass

import posix_ipc

from kvbm._fast.participants import claim_leader, participants
from kvbm._fast.recovery import recover
from kvbm._fast.segment import MAX_LEADERS, Segment, SegmentFault, Shape, shape_for
from kvbm.errors import (
    FingerprintMismatch,
    SegmentAccessDenied,
    SegmentCorrupt,
    SegmentError,
    SegmentInUse,
    TooManyLeaders,
    VersionMismatch,
)
from kvbm.fingerprint import Fingerprint
from kvbm.instance import is_private, remove_if_unused, segment_name

logger = logging.getLogger(__name__)

CREATOR_SECS = 10.0
"""How long a segment may take from its creation to its magic before it counts as abandoned."""

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
    mode, group : int, int or None
        Permission bits and group of the object.
    disk_slots : int
        Size of the disk tier, for the workers; its blocks have a segment of their own.
    """

    instance: str
    host_slots: int
    ranks: int
    block_tokens: int
    fingerprint: Fingerprint
    nonces: tuple[int, ...]
    mode: int = 0o600
    group: int | None = None
    disk_slots: int = 0

    @property
    def shape(self) -> Shape:
        """Sizes of the segment."""
        shape = shape_for(
            self.host_slots, 0, self.ranks, self.block_tokens, is_private(self.instance)
        )
        return shape._replace(disk_slots=self.disk_slots)


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
        It belongs to another user.
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
                spec.mode,
                spec.group,
            )
        except FileExistsError:  # another engine was faster
            segment = _adopt(spec)
            if segment is not None:
                return segment
            if time.monotonic() > deadline:
                raise SegmentInUse(name, "it can neither be attached nor replaced") from None


def _attach_when_ready(name: str) -> Segment | None:
    """Attach; None if there is nothing. Waits for a creator that is at work, for a bounded time."""
    deadline = time.monotonic() + CREATOR_SECS
    while True:
        try:
            return Segment.attach(name)
        except FileNotFoundError:
            return None
        except PermissionError:
            raise SegmentAccessDenied(name, "it belongs to another user") from None
        except SegmentFault as fault:
            if fault.kind != "not ready" or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _adopt(spec: SegmentSpec) -> Segment | None:
    """Existing segment if its content is usable; None after removing one that is not."""
    name = segment_name(spec.instance)
    try:
        segment = _attach_when_ready(name)
    except SegmentFault as fault:
        error: SegmentError = (
            VersionMismatch(name, "another", str(fault))
            if fault.kind == "version"
            else SegmentCorrupt(name, str(fault))
        )
        _replace(name, error)
        return None
    if segment is None:
        return None
    problem = _misfit(segment, spec)
    if problem is None:
        return segment
    in_use = _in_use(segment)
    segment.close()
    if in_use:
        raise problem
    _replace(name, problem)
    return None


def _in_use(segment: Segment) -> bool:
    """Return whether somebody stays attached.

    Workers that look for their leader (our own, at this moment) attach again and again for an
    instant; who uses the segment is there each time.
    """
    deadline = time.monotonic() + USER_SECS
    while segment.has_other_users():
        if time.monotonic() > deadline:
            return True
        time.sleep(0.001)
    return False


def _misfit(segment: Segment, spec: SegmentSpec) -> SegmentError | None:
    """Why this content cannot be used; None if it can."""
    if segment.fingerprint != spec.fingerprint.digest:
        found = segment.description.decode(errors="replace")
        return FingerprintMismatch(segment.name, found, spec.fingerprint.description.decode())
    if segment.shape != spec.shape:
        return SegmentInUse(
            segment.name, f"it has the sizes {segment.shape}, wanted are {spec.shape}"
        )
    # An engine that has just made the segment may not have marked its arenas yet.
    unmarked = segment.has_other_users()
    if any(nonce != segment.nonce and not (unmarked and nonce == 0) for nonce in spec.nonces):
        return SegmentCorrupt(segment.name, "an arena does not belong to it")
    return None


def _replace(name: str, problem: SegmentError) -> None:
    """Remove the segment alone: our workers use the arenas, which get its successor's nonce."""
    logger.warning("cached content is not used, starting clean: %s", problem)
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(name)


def close_and_remove(segment: Segment, instance: str) -> None:
    """Detach; the last user of a private instance removes it."""
    segment.close()
    if is_private(instance):
        remove_if_unused(instance)
