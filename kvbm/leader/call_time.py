# SPDX-License-Identifier: Apache-2.0
"""What the engine's calls cost on the scheduler's thread, in the segment's counters."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Call = TypeVar("Call", bound=Callable[..., Any])


def counted(call: Call) -> Call:
    """Make a method count its CPU time by the object's `call_time`, also where it raises.

    One reading of the thread's clock before and one after: calls are counted, not blocks. A method
    that is counted must not call another one that is.
    """

    @functools.wraps(call)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.call_time:
            return call(self, *args, **kwargs)

    return timed  # type: ignore[return-value]
