# SPDX-License-Identifier: Apache-2.0
"""Records of layout.h as numpy sees them: their types, the parts of their words, the sizes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._fast import contract
from kvbm._fast.segment import Shape

Array = npt.NDArray[Any]


@functools.cache
def record_dtype(name: str) -> np.dtype[Any]:
    """Structured type of a record of layout.h; of plain 64-bit words for an empty name."""
    if not name:
        return np.dtype("<u8")
    record = contract.RECORDS[name]
    formats: list[Any] = []
    for field in record.fields:
        element = record_dtype("kv_row") if field.name == "rows" else np.dtype(f"<u{field.size}")
        formats.append(element if field.length == 1 else (element, (field.length,)))
    return np.dtype(
        {
            "names": [field.name for field in record.fields],
            "formats": formats,
            "offsets": [field.offset for field in record.fields],
            "itemsize": record.size,
        }
    )


def part(words: Array, word: str, name: str) -> Array:
    """Bits of one part of an array of words, as numbers."""
    mask = contract.BITS[word][name]
    shift = (mask & -mask).bit_length() - 1
    return ((words & np.uint64(mask)) >> np.uint64(shift)).astype(np.int64)


def shape_of(data: bytes) -> Shape | None:
    """Sizes in a header; None if there is no header. They may be impossible."""
    if len(data) < contract.PAGE_BYTES:
        return None
    header = np.frombuffer(data, record_dtype("kv_header"), 1)[0]
    sizes: dict[str, Any] = {name: int(header[f"shape.{name}"]) for name in Shape._fields}
    return Shape(**sizes | {"private_instance": bool(sizes["private_instance"])})
