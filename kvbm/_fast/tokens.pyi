# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable

from typing_extensions import Buffer

def pack_tokens(tokens: Iterable[int] | Buffer) -> bytes: ...
