# SPDX-License-Identifier: Apache-2.0
"""`KvbmLeader` and `KvbmWorker`: the two sides of a cache without an engine's connector.

How they find each other. Both work on an *instance* (kvbm/instance.py): the one that
`DYN_KVBM_INSTANCE` names, else a private one whose name follows from what the processes of one job
have in common: the user, the process-id namespace and the process group, which a shell makes anew
for each job and children inherit. So a launcher's children, a parent and its children, and one
process with both sides find each other without a setting. Two jobs in one process group (a script
that starts both in the background), or sides in different groups, need a name: `engine_id=` on
both, and `DYN_KVBM_INSTANCE` where they are to share blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvbm._fast.segment import MAX_RANKS, Segment
from kvbm.closing import close_at_exit
from kvbm.config import Settings, load_settings
from kvbm.errors import BlockError, ConfigError
from kvbm.fingerprint import Fingerprint
from kvbm.instance import engine_key, private_instance, remove_dead_private_instances
from kvbm.shared import SegmentSpec, close_and_remove, open_as_leader
from kvbm.tiers.host import ArenaHeader, wait_for_headers
from kvbm.transfer.backends import Device
from kvbm.transfer.geometry import geometry_of
from kvbm.worker.worker import Worker, WorkerPlace

__all__ = ["KvbmLeader", "KvbmWorker", "default_engine_id"]


def default_engine_id() -> str:
    """Name of the engine that the processes of one job have in common."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"kvbm-{os.getuid()}-{namespace}-{os.getpgrp()}"


def _refuse_runtime(drt: object) -> None:
    if drt is not None:
        raise ConfigError(
            f"drt={drt!r} is not valid (allowed: None): there is no runtime to attach to, "
            "leader and workers meet in shared memory"
        )


class KvbmLeader:
    """Sizes the host tier from what the workers announce, and makes or adopts its segment.

    The constructor reads the settings and returns at once, as upstream's does: the workers may be
    made after it. Who needs them (`BlockManager`, `wait`) waits for them.

    Parameters
    ----------
    world_size : int
        Number of workers, 1 to 16.
    drt : None
        Upstream's runtime; there is none here.
    engine_id : str, optional
        Name that this leader and its workers share; see the module.

    Raises
    ------
    ConfigError
        No tier is configured, or an argument or a setting is not allowed.
    """

    def __init__(
        self, world_size: int, drt: object = None, *, engine_id: str | None = None
    ) -> None:
        _refuse_runtime(drt)
        if not 1 <= world_size <= MAX_RANKS:
            raise ConfigError(f"world_size={world_size} is not valid (allowed: 1 to {MAX_RANKS})")
        self.world_size = world_size
        self.settings = load_settings()
        self.settings.require_a_tier()
        self.engine_id = default_engine_id() if engine_id is None else engine_id
        self.instance = self.settings.instance or private_instance(self.engine_id)
        self._headers: list[ArenaHeader] | None = None
        self._segment: Segment | None = None

    def wait(self) -> list[ArenaHeader]:
        """Wait until all workers have announced themselves; returns what each says of its rank.

        Raises
        ------
        LeaderTimeout
            Some have not within `DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS`.
        ConfigError
            A worker says that there is another number of workers.
        """
        if self._headers is None:
            headers = wait_for_headers(
                self.instance,
                self.world_size,
                self.settings.leader_worker_init_timeout_secs,
                self.settings.shm_group,
            )
            for header in headers:
                if header.ranks != self.world_size:
                    raise ConfigError(
                        f"the leader has world_size={self.world_size}, the worker of rank "
                        f"{header.rank} world_size={header.ranks}: both must be equal"
                    )
            self._headers = headers
        return self._headers

    def open(self, page_size: int) -> Segment:
        """Make or adopt the segment, with this process as a leader of it. Waits for the workers.

        Parameters
        ----------
        page_size : int
            Tokens in a block.

        Raises
        ------
        ConfigError
            The tier does not fit.
        SegmentError
            The segment cannot be used.
        BlockError
            This leader has it open: what a leader holds is counted in one place.
        """
        if self._segment is not None:
            raise BlockError(
                f"this leader has {self._segment.name} open: one BlockManager a leader"
            )
        headers = self.wait()
        remove_dead_private_instances()
        self._segment = open_segment(
            self.settings, self.instance, self.engine_id, headers, page_size
        )
        close_at_exit(self, self.close)
        return self._segment

    @property
    def segment(self) -> Segment | None:
        """What `open` has opened."""
        return self._segment

    def close(self) -> None:
        """Detach; the last user of a private instance removes it. May be called twice."""
        segment, self._segment = self._segment, None
        if segment is not None:
            close_and_remove(segment, self.instance)


def open_segment(
    settings: Settings,
    instance: str,
    engine_id: str,
    headers: Sequence[ArenaHeader],
    page_size: int,
    host_slots: int | None = None,
) -> Segment:
    """Make or adopt the segment for these arenas; `host_slots` by default from the settings."""
    per_block = sum(header.bytes_per_block for header in headers)
    slots = settings.host_slots(per_block) if host_slots is None else host_slots
    spec = SegmentSpec(
        instance=instance,
        host_slots=slots,
        ranks=len(headers),
        block_tokens=page_size,
        fingerprint=Fingerprint(
            {
                "engine": "kvbm block API",
                "block_tokens": page_size,
                "geometry": [header.geometry.hex() for header in headers],
            }
        ),
        nonces=tuple(header.nonce for header in headers),
        group=settings.shm_group,
    )
    if host_slots is None:
        settings.check_shm_room(spec.missing_bytes(per_block))
    return open_as_leader(spec, engine_key(engine_id))


class KvbmWorker:
    """Registers one rank's KV cache and copies its blocks to and from the host tier.

    Parameters
    ----------
    num_device_blocks : int
        Blocks in the KV cache.
    page_size : int
        Tokens in a block.
    tensors : sequence of tensors, or mapping of layer name to tensor
        The KV cache; where the blocks lie is found from shapes and strides.
    device_id : int
        Number of the device; the default of `rank`.
    dtype_width_bytes : int
        Bytes of an element; compared with that of the tensors.
    drt : None
        Upstream's runtime; there is none here.
    layout_blocking, device_layout_type, host_layout_type, disk_layout_type
        Not needed: accepted if they are what upstream's Python could give (False and None).
    rank, world_size : int, optional
        This worker among all, by default `device_id` of 1.
    nccl_comm_ref : None
        Each rank loads its own blocks.
    engine_id : str, optional
        Name that leader and workers share; see the module.

    Raises
    ------
    ConfigError
        An argument or a setting is not allowed.
    GeometryError
        A tensor is not understood.
    """

    def __init__(
        self,
        num_device_blocks: int,
        page_size: int,
        tensors: Sequence[Any] | Mapping[str, Any],
        device_id: int = 0,
        dtype_width_bytes: int = 2,
        drt: object = None,
        layout_blocking: bool = False,
        device_layout_type: object = None,
        host_layout_type: object = None,
        disk_layout_type: object = None,
        rank: int | None = None,
        world_size: int | None = None,
        nccl_comm_ref: object = None,
        *,
        engine_id: str | None = None,
    ) -> None:
        _refuse_runtime(drt)
        _refuse_others(
            layout_blocking=layout_blocking or None,
            device_layout_type=device_layout_type,
            host_layout_type=host_layout_type,
            disk_layout_type=disk_layout_type,
            nccl_comm_ref=nccl_comm_ref,
        )
        named = _named(tensors)
        _check_elements(named.values(), dtype_width_bytes)
        device = _device_of(named.values())
        ranks = 1 if world_size is None else world_size
        if not 1 <= ranks <= MAX_RANKS:
            raise ConfigError(f"world_size={world_size} is not valid (allowed: 1 to {MAX_RANKS})")
        self.rank = (device_id if ranks > 1 else 0) if rank is None else rank
        if not 0 <= self.rank < ranks:
            raise ConfigError(
                f"rank={self.rank} is not valid (allowed with world_size={ranks}: 0 to {ranks - 1})"
            )
        self.page_size = page_size
        self.settings = load_settings()
        self.settings.require_a_tier()
        self.engine_id = default_engine_id() if engine_id is None else engine_id
        self.instance = self.settings.instance or private_instance(self.engine_id)
        remove_dead_private_instances()
        self._worker: Worker | None = Worker(
            WorkerPlace(self.instance, self.engine_id, self.rank, ranks),
            self.settings,
            [geometry_of(named, num_device_blocks)],
            keep_alive=named,
            device=device,
        )
        close_at_exit(self, self.close)

    def close(self) -> None:
        """Stop and detach; may be called twice."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


def _refuse_others(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ConfigError(
                f"{name}={value!r} is not valid (allowed: the default): layouts are taken from the "
                "tensors, and each rank copies its own blocks"
            )


def _named(tensors: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(tensors, Mapping):
        return dict(tensors)
    return {f"layers.{number}": tensor for number, tensor in enumerate(tensors)}


def _check_elements(tensors: Iterable[Any], dtype_width_bytes: int) -> None:
    for tensor in tensors:
        if tensor.element_size() != dtype_width_bytes:
            raise ConfigError(
                f"dtype_width_bytes={dtype_width_bytes} is not valid: the tensors have elements of "
                f"{tensor.element_size()} bytes"
            )


def _device_of(tensors: Iterable[Any]) -> Device:
    """Device that all tensors are on."""
    devices = {(str(tensor.device.type), tensor.device.index) for tensor in tensors}
    if len(devices) != 1:
        raise ConfigError(f"tensors on devices {sorted(map(str, devices))}: allowed is one")
    kind, index = devices.pop()
    if kind != "cuda":
        return Device(kind)
    from kvbm.block_manager.torch_memory import cuda_device

    return cuda_device(index)
