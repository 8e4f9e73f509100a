# SPDX-License-Identifier: Apache-2.0
"""What changed between two captures of one instance."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.inspect.decode import Segment
from kvbm.inspect.report import Row, block_row, participant_rows, pools

LISTED_MAX = 1000


def changes(old: Segment, new: Segment) -> Row:
    """Compare two captures: blocks by digest and group, participants by line and life."""
    old_keys, new_keys = _registered(old), _registered(new)
    came = np.flatnonzero(~np.isin(new_keys[1], old_keys[1]))
    went = np.flatnonzero(~np.isin(old_keys[1], new_keys[1]))
    old_lines = {(row["line"], row["epoch"]): row for row in participant_rows(old)}
    new_lines = {(row["line"], row["epoch"]): row for row in participant_rows(new)}
    old_pools, new_pools = pools(old), pools(new)
    old_counters, new_counters = old.counters(), new.counters()
    return {
        "same_content": int(old.header["nonce"]) == int(new.header["nonce"]),
        "seconds": _seconds(old, new),
        "registered": {"before": len(old_keys[1]), "after": len(new_keys[1])},
        "came": len(came),
        "went": len(went),
        "came_blocks": [block_row(new, int(b)) for b in new_keys[0][came[:LISTED_MAX]]],
        "went_blocks": [block_row(old, int(b)) for b in old_keys[0][went[:LISTED_MAX]]],
        "participants_came": [row for key, row in new_lines.items() if key not in old_lines],
        "participants_went": [row for key, row in old_lines.items() if key not in new_lines],
        "pools": {
            name: {"before": old_pools.get(name, {}).get("used"), "after": pool["used"]}
            for name, pool in new_pools.items()
        },
        "counters": {
            name: value - old_counters[name]
            for name, value in new_counters.items()
            if value != old_counters[name]
        },
    }


def _registered(segment: Segment) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Numbers of the registered blocks, and for each a key that survives a move."""
    blocks = segment.blocks
    chosen = np.flatnonzero(blocks.of_state("registered"))
    keys = np.empty((len(chosen), 3), "<u8")
    keys[:, :2] = blocks.digests.view("<u8")[chosen]
    keys[:, 2] = blocks.group[chosen]
    return chosen, keys.view("V24").ravel()


def _seconds(old: Segment, new: Segment) -> float | None:
    first, second = old.capture.realtime_ns, new.capture.realtime_ns
    return None if first is None or second is None else (second - first) / 1e9
