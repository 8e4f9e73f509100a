# SPDX-License-Identifier: Apache-2.0
"""Tables are followed from when the leader has opened them, and let go of at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from kvbm._fast.keys import Keys
from kvbm.events import table_source
from kvbm.events.model import Tier
from kvbm.events.table_source import TableSource, table_sources
from tests.fast.instances import Instance, cache, digests, instance


@pytest.fixture
def made() -> Iterator[Instance]:
    """A segment."""
    one = instance()
    try:
        yield one
        one.prove()
    finally:
        one.remove()


def test_a_table_is_not_touched_before_the_leader_has_opened_it(made: Instance) -> None:
    opened = False
    cache(made.leader(), Keys(digests(3)))
    with closing(TableSource(Tier.DISK, made.name, lambda: opened)) as source:
        assert source.delta() == ([], [])
        opened = True
        assert len(source.delta().added) == 3


def test_what_nobody_has_counted_is_seen_a_little_later(
    made: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = made.leader()
    with closing(TableSource(Tier.HOST, made.name, lambda: True)) as source:
        monkeypatch.setattr(table_source, "REST", 0)
        cache(table, Keys(digests(3)))
        assert len(source.delta().added) == 3
        refs = [ref for ref, _ in table.reserve(Keys(digests(3, "b")), 0, 3)]
        table.publish(refs)
        watch = source._watch
        assert watch is not None
        assert watch.moved()  # somebody else has taken the hint
        assert source.delta() == ([], [])
        monkeypatch.setattr(table_source, "LOOK_SECS", 0.0)
        assert len(source.delta().added) == 3
        for ref in refs:
            table.unpin(ref)


def test_a_large_table_is_looked_at_less_often(
    made: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_source, "REST", 1e9)
    table = made.leader()
    with closing(TableSource(Tier.HOST, made.name, lambda: True)) as source:
        source.delta()
        cache(table, Keys(digests(3)))
        assert source.delta() == ([], [])
        source._rest_until = 0.0
        assert len(source.delta().added) == 3  # the change that was counted meanwhile is not lost


def test_nothing_is_held_at_the_end(made: Instance) -> None:
    source = TableSource(Tier.HOST, made.name, lambda: True)
    source.delta()
    source.close()
    source.close()
    made.creator.close()
    with closing(made.attach()) as alone:
        assert not alone.has_other_users()


def test_an_instance_has_a_table_a_tier() -> None:
    host, disk = table_sources("name", lambda: False)
    assert (host.tier, disk.tier) == (Tier.HOST, Tier.DISK)
    assert disk.delta() == ([], [])
