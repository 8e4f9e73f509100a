# SPDX-License-Identifier: Apache-2.0
"""Capsules show memory as it is and keep its owner as long as anybody uses it, and no longer."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from kvbm._fast.dlpack import DEVICE_CPU, DEVICE_CUDA_HOST, capsule

TYPES = {
    np.uint8: (1, 8),
    np.int16: (0, 16),
    np.float16: (2, 16),
    np.float32: (2, 32),
    np.int64: (0, 64),
}


class Owner:
    """Something with an identity."""


class Exporter:
    """What a consumer calls."""

    def __init__(self, made: Any, device: tuple[int, int] = (DEVICE_CPU, 0)) -> None:
        self.made, self.device = made, device

    def __dlpack__(self) -> Any:
        return self.made

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


@pytest.mark.parametrize("dtype", TYPES)
def test_a_consumer_sees_and_changes_the_same_memory(dtype: Any) -> None:
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    made = capsule(array.ctypes.data, array.shape, TYPES[dtype], (DEVICE_CPU, 0), array)
    seen = np.from_dlpack(Exporter(made))
    assert seen.dtype == array.dtype
    assert (seen == array).all()
    array[1, 2, 3] = 99
    assert seen[1, 2, 3] == 99


def test_the_owner_lives_as_long_as_the_tensor() -> None:
    array, owner = np.zeros(4), Owner()
    gone = weakref.ref(owner)
    made = capsule(array.ctypes.data, (4,), (2, 64), (DEVICE_CPU, 0), owner)
    seen = np.from_dlpack(Exporter(made))
    del owner, made
    gc.collect()
    assert gone() is not None
    del seen
    assert gone() is None


def test_the_owner_of_a_capsule_that_nobody_consumed_goes_with_it() -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    made = capsule(4096, (4,), (2, 32), (DEVICE_CUDA_HOST, 0), owner)
    del owner
    assert gone() is not None
    del made
    assert gone() is None


def test_a_capsule_is_consumed_once() -> None:
    array = np.zeros(4, np.float32)
    exporter = Exporter(capsule(array.ctypes.data, (4,), (2, 32), (DEVICE_CPU, 0), array))
    np.from_dlpack(exporter)
    with pytest.raises((ValueError, RuntimeError)):
        np.from_dlpack(exporter)


@pytest.mark.parametrize(("address", "shape"), [(0, (1,)), (4096, ()), (4096, (1,) * 17)])
def test_memory_that_is_not_there_and_too_many_axes_are_refused(
    address: int, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="one to 16 axes"):
        capsule(address, shape, (2, 32), (DEVICE_CPU, 0), None)
