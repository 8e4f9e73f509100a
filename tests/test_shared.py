# SPDX-License-Identifier: Apache-2.0
"""Opening a segment as a leader: create it, adopt it, replace it, or say why not."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

import kvbm.shared
from kvbm._fast.objects import SHARED_MEMORY
from kvbm._fast.segment import MAX_LEADERS, Segment, SegmentFault
from kvbm.errors import (
    FingerprintMismatch,
    SegmentAccessDenied,
    SegmentInUse,
    TooManyLeaders,
)
from kvbm.fingerprint import Fingerprint
from kvbm.instance import remove, segment_name
from kvbm.shared import SegmentSpec, close_and_remove, open_as_leader

_engines = itertools.count(1)


@pytest.fixture
def spec() -> Iterator[SegmentSpec]:
    """A small segment that outlives its users; removed at the end."""
    name = f"shared-{os.getpid()}"
    yield SegmentSpec(name, 16, 1, 16, Fingerprint({"model": "m"}), (0,))
    remove(name)


def segment_nonce(spec: SegmentSpec) -> int:
    """Nonce of the segment that is there."""
    segment = Segment.attach(segment_name(spec.instance))
    nonce = segment.nonce
    segment.close()
    return nonce


def path_of(spec: SegmentSpec) -> str:
    """Path of the segment's object."""
    return str(SHARED_MEMORY / segment_name(spec.instance).lstrip("/"))


def test_a_second_engine_adopts_what_the_first_made(spec: SegmentSpec) -> None:
    first = open_as_leader(spec, next(_engines))
    second = open_as_leader(replace(spec, nonces=(first.nonce,)), next(_engines))
    assert (first.nonce, first.leader, second.leader) == (second.nonce, 0, 1)
    first.close()
    second.close()


def test_a_named_segment_stays_and_is_adopted_after_a_restart(spec: SegmentSpec) -> None:
    first = open_as_leader(spec, next(_engines))
    nonce = first.nonce
    close_and_remove(first, spec.instance)
    again = open_as_leader(replace(spec, nonces=(nonce,)), next(_engines))
    assert again.nonce == nonce
    again.close()


@pytest.mark.parametrize("change", ["fingerprint", "slots", "arena"])
def test_content_that_does_not_fit_is_replaced_if_nobody_uses_it(
    spec: SegmentSpec, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_as_leader(spec, next(_engines))
    nonce = first.nonce
    first.close()
    changed = {
        "fingerprint": replace(spec, fingerprint=Fingerprint({"model": "n"}), nonces=(nonce,)),
        "slots": replace(spec, host_slots=8, nonces=(nonce,)),
        "arena": replace(spec, nonces=(nonce + 1,)),
    }[change]
    with caplog.at_level(logging.WARNING, "kvbm"):
        second = open_as_leader(changed, next(_engines))
    assert second.nonce != nonce
    assert "starting clean" in caplog.text
    second.close()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"fingerprint": Fingerprint({"model": "other"})}, FingerprintMismatch),
        ({"host_slots": 8}, SegmentInUse),
    ],
)
def test_content_that_somebody_uses_is_not_replaced(
    spec: SegmentSpec, changes: dict[str, object], error: type[Exception]
) -> None:
    first = open_as_leader(spec, next(_engines))
    other = replace(spec, nonces=(first.nonce,), **changes)  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        open_as_leader(other, next(_engines))
    assert first.name in str(caught.value)
    first.close()


def test_a_worker_that_looks_for_its_leader_is_no_user(spec: SegmentSpec) -> None:
    first = open_as_leader(spec, next(_engines))
    nonce = first.nonce
    first.close()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.002):  # a worker looks half as often
            with contextlib.suppress(FileNotFoundError, SegmentFault):
                Segment.attach(segment_name(spec.instance)).close()

    looking = threading.Thread(target=look)
    looking.start()
    try:
        other = replace(spec, fingerprint=Fingerprint({"model": "other"}), nonces=(nonce,))
        second = open_as_leader(other, next(_engines))
    finally:
        ended.set()
        looking.join()
    assert second.nonce != nonce
    second.close()


def test_what_differs_is_named_in_one_line_and_nothing_else_is(spec: SegmentSpec) -> None:
    common = {"model": "m", "ranks": 2}
    first = open_as_leader(
        replace(spec, fingerprint=Fingerprint({**common, "dtype": "float16"})), next(_engines)
    )
    wanted = Fingerprint({**common, "dtype": "bfloat16"})
    with pytest.raises(FingerprintMismatch) as caught:
        open_as_leader(replace(spec, fingerprint=wanted), next(_engines))
    assert str(caught.value) == (
        f"shared-memory object {first.name} has fingerprint dtype=float16, "
        "this process needs dtype=bfloat16"
    )
    first.close()


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, bytes(1 << 20)])
def test_an_object_that_is_no_segment_is_replaced(
    spec: SegmentSpec, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvbm.shared, "CREATOR_SECS", 0.2)  # it might be about to become one
    with open(path_of(spec), "wb") as file:
        file.write(content)
    segment = open_as_leader(spec, next(_engines))
    assert segment.shape == spec.shape
    segment.close()


def test_there_is_room_for_so_many_leaders_and_no_more(spec: SegmentSpec) -> None:
    segments = []
    try:
        segments.append(open_as_leader(spec, next(_engines)))
        fitting = replace(spec, nonces=(segments[0].nonce,))
        segments += [open_as_leader(fitting, next(_engines)) for _ in range(MAX_LEADERS - 1)]
        with pytest.raises(TooManyLeaders, match=str(MAX_LEADERS)):
            open_as_leader(fitting, next(_engines))
    finally:
        for segment in segments:
            segment.close()


def test_a_private_instance_goes_with_its_leader(spec: SegmentSpec) -> None:
    private = replace(spec, instance=f"p-{os.getpid():016x}")
    segment = open_as_leader(private, next(_engines))
    assert os.path.exists(path_of(private))
    close_and_remove(segment, private.instance)
    assert not os.path.exists(path_of(private))


def test_a_segment_is_its_owners_alone_until_a_group_is_named(spec: SegmentSpec) -> None:
    segment = open_as_leader(spec, next(_engines))
    assert os.stat(path_of(spec)).st_mode & 0o777 == 0o600
    segment.close()
    named = replace(spec, group=os.getgid(), nonces=(segment_nonce(spec),))
    segment = open_as_leader(named, next(_engines))
    assert os.stat(path_of(spec)).st_mode & 0o777 == 0o660
    assert os.stat(path_of(spec)).st_gid == os.getgid()
    segment.close()
    with pytest.raises(SegmentAccessDenied, match=f"lets group {os.getgid()} write"):
        open_as_leader(replace(named, group=None), next(_engines))
