# SPDX-License-Identifier: Apache-2.0
"""What an engine calls does not raise: that would end the engine, or its front end."""

import functools
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Hook = TypeVar("Hook", bound=Callable[..., Any])


def guarded(
    fallback: Callable[[], Any], lets_through: type[Exception] | tuple[()] = ()
) -> Callable[[Hook], Hook]:
    """Make a method return `fallback()` instead of raising.

    Its first error is logged in full; all are counted by the object's `count_error`, if it has one.

    Parameters
    ----------
    fallback : callable
        What the method returns then.
    lets_through : exception class, optional
        Errors that are raised all the same, since the engine must not go on.
    """

    def wrap(hook: Hook) -> Hook:
        reported = False

        @functools.wraps(hook)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal reported
            try:
                return hook(self, *args, **kwargs)
            except lets_through:
                raise
            except Exception:
                if not reported:
                    reported = True
                    logger.exception(
                        "%s failed; the engine goes on without the cache here", hook.__qualname__
                    )
                with suppress(Exception):  # the counters may be what is broken, or gone
                    self.count_error()
                return fallback()

        return call  # type: ignore[return-value]

    return wrap
