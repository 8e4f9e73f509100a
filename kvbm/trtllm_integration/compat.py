# SPDX-License-Identifier: Apache-2.0
"""Everything that differs between the TensorRT-LLM versions that are supported.

1.2.0rc2 is the first one whose scheduler output says how many tokens are scheduled. The module of
the connector's interface moved in the 1.3.0 release candidates, and a request's cache salt is a
text there, a hash of it before. `tests/trtllm_integration/interface.py` has what is read of each.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import tensorrt_llm
from tensorrt_llm._utils import mpi_broadcast

INTERFACE_MODULES = (
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",  # 1.3
    "tensorrt_llm._torch.pyexecutor.kv_cache_connector",  # 1.2
)

VERSION = str(tensorrt_llm.__version__)

_MISSING = object()


def _interface() -> Any:
    """Return the module that has the connector's base classes."""
    problem: ImportError | None = None
    for name in INTERFACE_MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            problem = error
    raise ImportError(
        f"TensorRT-LLM {VERSION} has no KV cache connector in any of "
        f"{', '.join(INTERFACE_MODULES)}: kvbm needs 1.2.0rc2 or newer"
    ) from problem


_module = _interface()
SchedulerBase: Any = _module.KvCacheConnectorScheduler
WorkerBase: Any = _module.KvCacheConnectorWorker


def from_first_rank(value: str) -> str:
    """Return the first rank's value; all ranks must call it at the same point of their start."""
    return str(mpi_broadcast(value, root=0))


def salt_of(request: Any) -> str | None:
    """Return what a request's cache salt is known by, None if it has none.

    Raises
    ------
    AttributeError
        The request tells nothing about salts.
    """
    text = getattr(request, "cache_salt", _MISSING)
    number = getattr(request, "cache_salt_id", _MISSING)
    if text is _MISSING and number is _MISSING:
        raise AttributeError(f"{type(request).__name__} has neither cache_salt nor cache_salt_id")
    if isinstance(text, str):
        return text
    return None if number in (None, _MISSING) else f"id {number}"


def priorities_of(data: Any) -> Sequence[int] | None:
    """Return the retention priorities of a request's new blocks; None if none were given.

    1.2.0rc2 does not tell them.
    """
    found: Sequence[int] | None = getattr(data, "priorities", None)
    return found
