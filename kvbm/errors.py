# SPDX-License-Identifier: Apache-2.0
"""Every exception that kvbm raises on purpose.

All of them are a `KvbmError`. Those that a caller would also look for under a built-in name
(`ValueError`, `TimeoutError`) inherit from it too. An error that has facts keeps them as
attributes, and survives pickling with them: engines send exceptions between processes.

The tree::

    KvbmError
      ConfigError (ValueError)
      GeometryError (ValueError)
      SegmentError
        SegmentNotFound
        SegmentExists
        SegmentInUse
        SegmentAccessDenied
        SegmentCorrupt
        SegmentClosed
        VersionMismatch
        FingerprintMismatch
        TooManyLeaders
      BlockError
        NotEnoughBlocks
        BlockStateError
        TokenBlockError
        ResetError
        UnsupportedCacheLevel (ValueError)
      TransferError
      SlabError
      LeaderTimeout (TimeoutError)
      TraceError (ValueError)
      InspectError
"""

from collections.abc import Sequence

__all__ = [
    "BlockError",
    "BlockStateError",
    "ConfigError",
    "FingerprintMismatch",
    "GeometryError",
    "InspectError",
    "KvbmError",
    "LeaderTimeout",
    "NotEnoughBlocks",
    "ResetError",
    "SegmentAccessDenied",
    "SegmentClosed",
    "SegmentCorrupt",
    "SegmentError",
    "SegmentExists",
    "SegmentInUse",
    "SegmentNotFound",
    "SlabError",
    "TokenBlockError",
    "TooManyLeaders",
    "TraceError",
    "TransferError",
    "UnsupportedCacheLevel",
    "VersionMismatch",
]


class KvbmError(Exception):
    """Base of all errors of this library."""


class ConfigError(KvbmError, ValueError):
    """A setting has a value that is not allowed, is missing, or does not fit this machine.

    Raised while settings are read and while tiers are sized, before anything is allocated. The
    message names each setting, its value and what is allowed.
    """


class GeometryError(KvbmError, ValueError):
    """The layout of the engine's KV tensors is not understood or not the same on all ranks.

    Raised when KV caches are registered and when the leader compares the ranks' arenas. The
    message has the shape and strides, or both ranks' numbers.
    """


class SegmentError(KvbmError):
    """Something is wrong with a shared-memory object; base of the errors that say what.

    Parameters
    ----------
    name
        Name of the object, with its leading slash, e.g. ``/kvbm-chat``.
    detail
        What is wrong, as the end of a sentence that begins with the name.
    """

    _summary = "cannot be used"

    def __init__(self, name: str, detail: str = "") -> None:
        super().__init__(name, detail)
        self.name = name
        self.detail = detail

    def __str__(self) -> str:
        head = f"shared-memory object {self.name} {self._summary}"
        return f"{head}: {self.detail}" if self.detail else head


class SegmentNotFound(SegmentError):
    """No object of that name exists. Raised by attach, by the viewer and by removal."""

    _summary = "does not exist"


class SegmentExists(SegmentError):
    """An object of that name exists already. Raised by a create that must be the first."""

    _summary = "exists already"


class SegmentInUse(SegmentError):
    """A living process uses the object. Raised by removal and by a reset that needs it alone."""

    _summary = "is in use by a living process"


class SegmentAccessDenied(SegmentError):
    """The object belongs to another user or its mode lets others write.

    Raised by attach and create: also when the system refuses (``EACCES``, ``EPERM``, ``EROFS``).
    """

    _summary = "may not be used by this process"


class SegmentCorrupt(SegmentError):
    """The object's header or a structure in it is impossible. Raised by attach and by checks.

    Nothing in such an object is trusted; it is refused or replaced, never repaired in place.
    """

    _summary = "is corrupt"


class SegmentClosed(SegmentError):
    """A handle is used after `close`, or in a child process that was forked after the attach."""

    _summary = "is closed in this process"


def _shown(value: object) -> str:
    """Text of one side of a mismatch: bytes as hex, everything else as it prints."""
    return value.hex() if isinstance(value, bytes) else str(value)


class _Mismatch(SegmentError):
    """An object has one value of `_what` and this process needs another."""

    _what = "value"

    def __init__(self, name: str, found: object, expected: object) -> None:
        super().__init__(name)
        self.args = (name, found, expected)
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        return (
            f"shared-memory object {self.name} has {self._what} {_shown(self.found)}, "
            f"this process needs {_shown(self.expected)}"
        )


class VersionMismatch(_Mismatch):
    """The object was made by a library with another format version. Raised by attach.

    Parameters
    ----------
    name
        Name of the object.
    found, expected
        Format version in the object and of this library.
    """

    _what = "format version"


class FingerprintMismatch(_Mismatch):
    """The object holds bytes of another model, layout, block size, or set of ranks.

    Raised by attach, before any block is looked at: the content can never be right here.

    Parameters
    ----------
    name
        Name of the object.
    found, expected
        Fingerprint in the object and of this process: bytes (shown as hex) or text.
    """

    _what = "fingerprint"


class TooManyLeaders(SegmentError):
    """As many leaders as the segment has places for are attached and alive.

    Parameters
    ----------
    name
        Name of the segment.
    limit
        Number of leaders that fit.
    """

    _summary = "has no place for another leader"

    def __init__(self, name: str, limit: int) -> None:
        super().__init__(name, f"{limit} of {limit} leaders are attached")
        self.args = (name, limit)
        self.limit = limit


class BlockError(KvbmError):
    """A request about blocks cannot be met; base of the errors that say why."""


class NotEnoughBlocks(BlockError):
    """Fewer blocks are free, or can be evicted now, than were asked for. Nothing was taken.

    Parameters
    ----------
    requested, available
        Numbers of blocks.
    """

    def __init__(self, requested: int, available: int) -> None:
        super().__init__(requested, available)
        self.requested = requested
        self.available = available

    def __str__(self) -> str:
        return f"{self.requested} blocks requested, {self.available} available"


class BlockStateError(BlockError):
    """An operation on a block that its state does not allow, or through a stale reference.

    Raised by the Python API of blocks (e.g. registering a block that is not complete). Leaders do
    not raise it for blocks that changed hands meanwhile: to them that is a miss.

    Parameters
    ----------
    block
        Index of the block in the table.
    found, expected
        State that the block is in and the one that is needed.
    """

    def __init__(self, block: int, found: str, expected: str) -> None:
        super().__init__(block, found, expected)
        self.block = block
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        return f"block {self.block} is {self.found}, needed is {self.expected}"


class TokenBlockError(BlockError):
    """Tokens do not fit what a block has room for or contains.

    Parameters
    ----------
    kind
        "full", "empty", "insufficient tokens", "incomplete" or "size".
    message
        The same with the numbers.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


class ResetError(BlockError):
    """A pool cannot be reset because blocks of it are in use. Nothing was reset.

    Parameters
    ----------
    total, available
        Numbers of blocks; they would have to be equal.
    """

    def __init__(self, total: int, available: int) -> None:
        super().__init__(total, available)
        self.total = total
        self.available = available

    def __str__(self) -> str:
        return f"blocks are in use: total blocks: {self.total}, available blocks: {self.available}"


class UnsupportedCacheLevel(BlockError, ValueError):
    """There is no pool of that level here.

    Parameters
    ----------
    level
        As it was given: "G1" device, "G2" host, "G3" disk.
    why
        Why not, and what is allowed.
    """

    def __init__(self, level: object, why: str) -> None:
        super().__init__(level, why)
        self.level = level
        self.why = why

    def __str__(self) -> str:
        return f"cache level {self.level!r}: {self.why}"


class TransferError(KvbmError):
    """A copy between tiers failed, so its target holds nothing that may be used.

    Raised by transfer backends and by the synchronous Python API. In an engine it ends as blocks
    reported with load errors, which the engine recomputes.
    """


class SlabError(KvbmError):
    """The file of a disk tier cannot be made or used.

    Attributes
    ----------
    where : str
        The file, or its folder.
    reason : str
        Why, and what to change.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"disk tier: {self.where} cannot be used: {self.reason}"


class LeaderTimeout(KvbmError, TimeoutError):
    """Not every worker announced itself before the leader's deadline.

    Parameters
    ----------
    timeout_secs
        Deadline in seconds, from ``DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS``.
    missing_ranks
        Ranks that did not announce themselves.
    world_size
        Number of ranks waited for.
    """

    def __init__(self, timeout_secs: float, missing_ranks: Sequence[int], world_size: int) -> None:
        super().__init__(timeout_secs, missing_ranks, world_size)
        self.timeout_secs = timeout_secs
        self.missing_ranks = tuple(missing_ranks)
        self.world_size = world_size

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.missing_ranks))
        return (
            f"{len(self.missing_ranks)} of {self.world_size} workers did not announce themselves "
            f"within DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS={self.timeout_secs} (ranks {ranks}): "
            "look for their errors above, or allow more seconds"
        )


class TraceError(KvbmError, ValueError):
    """A file is not a request trace; the message names the line and what is wrong in it."""


class InspectError(KvbmError):
    """What is to be looked at is not there or cannot be read."""
