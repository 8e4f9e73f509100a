# SPDX-License-Identifier: Apache-2.0
"""Names of tiers, as routers read them."""

from __future__ import annotations

import pytest

from kvbm.events.model import Tier, tier_of, tiers_in


@pytest.mark.parametrize("tier", list(Tier))
def test_the_name_of_a_tier_is_read_as_that_tier(tier: Tier) -> None:
    assert tier_of(tier.medium) is tier


@pytest.mark.parametrize(
    ("medium", "tier"),
    [
        (None, Tier.DEVICE),
        ("gpu", Tier.DEVICE),
        ("CPU", Tier.HOST),
        ("STORAGE", Tier.DISK),
        ("EXTERNAL", None),
    ],
)
def test_other_names_are_read_as_the_router_reads_them(
    medium: str | None, tier: Tier | None
) -> None:
    assert tier_of(medium) is tier


def test_the_members_of_a_set_come_fastest_first() -> None:
    assert tiers_in(Tier.DISK | Tier.DEVICE) == [Tier.DEVICE, Tier.DISK]
    assert tiers_in(0) == []
