# SPDX-License-Identifier: Apache-2.0
"""The protocol with one rule broken at a time, and where that must be noticed.

Only outcomes count here: the table of transitions, which would notice some of these at once, is not
checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from tests.model.explore import Model
from tests.model.rules import PROTOCOL, Rules
from tests.model.setting import Scenario, build


class Mutation(NamedTuple):
    """One broken rule: its flag in `Rules`, the scenario that notices it, and how.

    `deaths` are those that it takes.
    """

    rule: str
    about: str
    scenario: str
    notices: str
    deaths: int = 0

    @property
    def rules(self) -> Rules:
        """The protocol without this rule."""
        return dataclasses.replace(PROTOCOL, **{self.rule: False})

    def model(self, among: Mapping[str, Scenario]) -> Model:
        """Its scenario without the rule, with no more deaths than it takes."""
        scenario = among[self.scenario]._replace(crashes=self.deaths)
        return build(scenario, self.rules, strict=False)


MUTATIONS = [
    Mutation(
        "count_before_register",
        "a child is registered before it is counted",
        "publish and evict",
        "I2",
    ),
    Mutation(
        "move_before_uncount",
        "a child is uncounted before its word has moved",
        "publish and evict",
        "I2",
    ),
    Mutation(
        "digest_before_publish",
        "a block is published before its digest is written",
        "look-up and reuse",
        "I6",
    ),
    Mutation(
        "digest_before_partial",
        "the digest is written when the block can be seen as being filled already",
        "parent and reuse",
        "I1: block 1 (B) is below X",
    ),
    Mutation(
        "generation_moves",
        "the generation does not move at an eviction",
        "parent and reuse",
        "I1: block 1 (B) is below X",
    ),
    Mutation(
        "generation_moves",
        "the generation does not move when a reservation is given back",
        "publish and abandon",
        "I6",
    ),
    Mutation(
        "parent_generation",
        "a child is counted on whatever the parent's record holds now",
        "parent and reuse",
        "I1",
    ),
    Mutation(
        "parent_registered",
        "a child is counted on a parent that is still being filled",
        "parent being filled",
        "I1",
    ),
    Mutation(
        "loser_uncounts",
        "the second publisher of a block leaves its count",
        "duplicate publish",
        "counts 2 children, it has 1",
    ),
    Mutation("evict_requires_no_child", "a parent is evicted", "publish and evict", "I1"),
    Mutation(
        "evict_requires_no_holder", "a held block is evicted", "chain", "a held chain is broken"
    ),
    Mutation(
        "reset_before_give_back",
        "a record is given back before its word is RESET",
        "chain",
        "I4",
    ),
    Mutation(
        "pin_compares",
        "a pin does not compare the digest",
        "look-up and reuse",
        "wrong bytes: X were read for A",
    ),
    Mutation(
        "identified_once",
        "a reservation is named a second time, with another digest",
        "named late",
        "I1: block",
    ),
    Mutation(
        "second_look",
        "a summary bit is cleared without a second look",
        "pool",
        "the summary bit is clear",
    ),
    Mutation(
        "ring_has_room",
        "an operation is submitted to a ring without room",
        "ring",
        "waits forever",
    ),
    Mutation(
        "rows_checked",
        "a worker does not look at a load's blocks again after the copy",
        "load outlives its leader",
        "wrong bytes",
        deaths=1,
    ),
    Mutation(
        "inside_before_look",
        "a participant looks for a recovery before it shows itself",
        "recovery beside a storer",
        "I4",
        deaths=1,
    ),
    Mutation(
        "recovering_before_look",
        "recovery looks for participants before it shows itself",
        "recovery beside a storer",
        "I4",
        deaths=1,
    ),
    Mutation(
        "recount_alone",
        "recovery recounts while somebody is inside",
        "recovery beside a storer",
        "I2",
        deaths=1,
    ),
    Mutation(
        "rebuild_alone",
        "recovery rebuilds the pools while somebody is inside",
        "recovery beside a storer",
        "I4",
        deaths=1,
    ),
    Mutation(
        "recovery_leaves_counts",
        "recovery uncounts a parent that the dead may have uncounted",
        "recovery beside a storer",
        "I2",
        deaths=1,
    ),
    Mutation(
        "running_protected",
        "recovery frees a slot that a live worker of the dead leader fills",
        "store outlives its leader",
        "I6",
        deaths=1,
    ),
    Mutation(
        "finishing_recovered",
        "recovery leaves an operation whose last rank died while it published",
        "worker is replaced",
        "waits forever",
        deaths=1,
    ),
    Mutation(
        "dead_lines_held",
        "recovery only looks at the locks of dead lines",
        "worker comes late",
        "an operation is left",
        deaths=1,
    ),
    Mutation(
        "claim_checks_role",
        "a line is claimed before what its last owner held has been returned",
        "leader is replaced",
        "slots are lost",
        deaths=1,
    ),
    Mutation(
        "claim_checks_leader",
        "a worker takes whoever has the leader's line for its leader",
        "worker comes late",
        "a worker of the first engine runs an operation of the second engine",
        deaths=1,
    ),
    Mutation(
        "waits_have_deadlines",
        "a leader waits for an operation without a deadline",
        "worker is replaced",
        "waits forever",
        deaths=1,
    ),
    Mutation(
        "rebuild_final_words",
        "recovery fills a pool word first and then takes out what is named",
        "recoverer dies",
        "I4",
        deaths=1,
    ),
    Mutation(
        "lines_after_rebuild",
        "dead lines are released although the recount had to wait",
        "recovery beside a storer",
        "are lost",
        deaths=1,
    ),
    Mutation(
        "left_recovering_is_cleared",
        "nobody clears `recovering` after a recoverer without a line",
        "recovery by a guest",
        "a recovery is left under way",
        deaths=1,
    ),
    Mutation(
        "disk_recovered",
        "nobody returns what a dead leader held in the disk tier's table",
        "spill",
        "of a dead process is left",
        deaths=1,
    ),
    Mutation(
        "spill_published_last",
        "a block is published in the disk table before its bytes are written",
        "two spills",
        "I6",
    ),
    Mutation(
        "spill_compares",
        "a spill does not look at the header of the host slot",
        "restore",
        "were read for A",
        deaths=1,
    ),
    Mutation(
        "fetch_compares_digest",
        "a fetch does not compare the digest in the slab's header",
        "fetch",
        "I6: block 0 (A) is registered, slot 0 holds ['X']",
        deaths=1,
    ),
    Mutation(
        "fetch_compares_checksum",
        "a fetch does not compare the checksum of what has arrived",
        "damaged block",
        "I6: block 0 (A) is registered, slot 0 holds ['torn']",
    ),
    Mutation(
        "epoch_moves",
        "a reset evicts what nobody holds, under the old key epoch",
        "reset beside a spill",
        "is found",
    ),
]

# A pin that requires the generation under which the look-up has verified the digest needs no
# comparison of its own: either of the two is enough, and the sources compare.
PIN_BY_GENERATION = dataclasses.replace(PROTOCOL, pin_compares=False, pin_expects_generation=True)
