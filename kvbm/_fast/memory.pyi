# SPDX-License-Identifier: Apache-2.0
from typing_extensions import Buffer

def populate(memory: Buffer, offset: int, count: int) -> int: ...
