# SPDX-License-Identifier: Apache-2.0
"""Request traces in Mooncake's format.

One JSON object a line and request: ``timestamp`` (ms), ``input_length`` and ``output_length``
(tokens), ``hash_ids`` (an id a block of the prompt; equal ids mean equal prefixes up to and
including that block). From the FAST'25 release of https://github.com/kvcache-ai/Mooncake.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from kvbm.errors import TraceError


class Request(NamedTuple):
    """One request of a trace.

    Attributes
    ----------
    timestamp_ms : int
        When it arrives, from the start of the trace; never before the request ahead of it.
    input_tokens, output_tokens : int
        Lengths of prompt and answer.
    blocks : list of int
        Ids of the prompt's blocks, from the first on.
    """

    timestamp_ms: int
    input_tokens: int
    output_tokens: int
    blocks: list[int]


class Trace(NamedTuple):
    """Requests in the order of arrival.

    Attributes
    ----------
    name : str
        Where they come from.
    requests : list of Request
        At least one.
    """

    name: str
    requests: list[Request]

    @property
    def references(self) -> int:
        """Blocks that are asked for, over all requests."""
        return sum(len(request.blocks) for request in self.requests)

    @property
    def distinct(self) -> int:
        """Blocks that differ: what an unbounded cache would hold at the end."""
        return len({block for request in self.requests for block in request.blocks})


FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _request(line: str) -> Request:
    """Read one line; the ValueError says what is wrong in it."""
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError("an object is needed")
    missing = [field for field in FIELDS if field not in entry]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    timestamp, *lengths, blocks = (entry[field] for field in FIELDS)
    for field, value in zip(FIELDS, (timestamp, *lengths), strict=False):
        if not _is_count(value):
            raise ValueError(f"{field}={value!r}: an integer of 0 or more is needed")
    if not isinstance(blocks, list) or not all(_is_count(block) for block in blocks):
        raise ValueError("hash_ids: a list of integers of 0 or more is needed")
    return Request(timestamp, lengths[0], lengths[1], blocks)


def parse(lines: Iterable[str], name: str) -> Trace:
    """Read a trace from its lines.

    Raises
    ------
    TraceError
        Names the first line that is not a request, or not in the order of time.
    """
    requests: list[Request] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = _request(line)
            if requests and request.timestamp_ms < requests[-1].timestamp_ms:
                raise ValueError(
                    f"timestamp={request.timestamp_ms} is before the one ahead of it "
                    f"({requests[-1].timestamp_ms})"
                )
        except ValueError as error:
            raise TraceError(f"{name}, line {number}: {error}") from None
        requests.append(request)
    if not requests:
        raise TraceError(f"{name} has no request")
    return Trace(name, requests)


def read(path: Path) -> Trace:
    """Read a trace from a file.

    Raises
    ------
    TraceError
        The file cannot be read or is not a trace.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            return parse(lines, path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from None


def lines(trace: Trace) -> Iterator[str]:
    """Write a trace: the inverse of `parse`."""
    for request in trace.requests:
        yield json.dumps(dict(zip(FIELDS, request, strict=True))) + "\n"
