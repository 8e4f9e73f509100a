# SPDX-License-Identifier: Apache-2.0
"""The compiled parts of this comparison, built when they are first needed."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

from tests.fast.probe import load as load_source


@functools.cache
def load(name: str) -> ModuleType:
    """Return one of the modules beside this file."""
    return load_source(Path(__file__).with_name(f"{name}.pyx"))
