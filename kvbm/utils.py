# SPDX-License-Identifier: Apache-2.0
"""Small helpers under upstream's names."""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar, overload

Function = TypeVar("Function", bound=Callable[..., Any])

__all__ = ["get_consolidator_mode", "is_dyn_runtime_enabled", "is_truthy", "nvtx_annotate"]

logger = logging.getLogger(__name__)

_MODE = "DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE"
_MODES = ("dedup", "passthrough")
_TRUTHY = frozenset({"1", "true", "on", "yes"})


def is_truthy(value: str) -> bool:
    """Return whether a text means yes: 1, true, on or yes, in any case.

    Examples
    --------
    >>> is_truthy("On"), is_truthy("2")
    (True, False)
    """
    return value.lower() in _TRUTHY


def get_consolidator_mode() -> str:
    """Return `DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE`: "dedup", the default, or "passthrough".

    Anything else gets a warning and is "dedup", as upstream's does; an engine's start refuses it.
    """
    mode = os.environ.get(_MODE, "").strip().lower() or "dedup"
    if mode in _MODES:
        return mode
    logger.warning(
        "%s=%r is not valid (allowed: %s); dedup is used", _MODE, mode, ", ".join(_MODES)
    )
    return "dedup"


def is_dyn_runtime_enabled() -> bool:
    """Return whether `DYN_RUNTIME_ENABLED_KVBM` is 1 or true. Nothing here needs the runtime."""
    return os.environ.get("DYN_RUNTIME_ENABLED_KVBM", "").lower() in {"1", "true"}


@overload
def nvtx_annotate(func: Function) -> Function: ...


@overload
def nvtx_annotate(
    func: None = None, *, domain: str = "kvbm", category: str | None = None
) -> Callable[[Function], Function]: ...


def nvtx_annotate(
    func: Function | None = None, *, domain: str = "kvbm", category: str | None = None
) -> Function | Callable[[Function], Function]:
    """Show calls of a function as ranges in Nsight; nothing happens if `nvtx` is not installed.

    Parameters
    ----------
    func : callable, optional
        With it, this is the decorator; without, it returns one.
    domain, category : str, str or None
        Of the range, whose name is the function's qualified name.
    """
    if func is None:
        return functools.partial(nvtx_annotate, domain=domain, category=category)
    try:
        import nvtx  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return func
    annotated: Function = nvtx.annotate(
        message=func.__qualname__, color="green", domain=domain, category=category
    )(func)
    return annotated
