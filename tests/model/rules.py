# SPDX-License-Identifier: Apache-2.0
"""The rules of the protocol that the model can break, one flag each; all true is the protocol."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """What the actors obey.

    Attributes
    ----------
    digest_before_partial : bool
        A reservation writes digest and parent while it owns the record and the word is still RESET.
    digest_before_publish : bool
        A reservation writes its digest before the block can be published.
    count_before_register : bool
        [P1] comes before [P2].
    parent_generation : bool
        [P1] requires the generation that the child names.
    parent_registered : bool
        [P1] requires the parent REGISTERED.
    loser_uncounts : bool
        A publisher whose [P2] fails takes back its [P1].
    move_before_uncount : bool
        [E1] comes before [E2].
    evict_requires_no_child, evict_requires_no_holder : bool
        What [E1] requires of the word.
    generation_moves : bool
        [E1] and abandon advance the generation.
    reset_before_give_back : bool
        [E5] comes before [E6].
    pin_compares : bool
        A pin compares the digest after its compare-and-swap.
    pin_expects_generation : bool
        A pin requires the generation under which the look-up verified the digest (not needed when
        `pin_compares`; false in the protocol).
    identified_once : bool
        A reservation gets the identity that it is published under once (`control.identify`).
    rows_checked : bool
        A worker checks state and generation of each row's block before and after the copy.
    second_look : bool
        A taker looks at a pool's word again after it has cleared the summary bit.
    ring_has_room : bool
        An operation is submitted only when every rank's ring has room.
    inside_before_look : bool
        [S0] comes before [S1].
    recovering_before_look : bool
        [S2] comes before [S3].
    recount_alone : bool
        Recovery recounts children only when nobody is inside.
    rebuild_alone : bool
        Recovery rebuilds the pools only when nobody is inside.
    dead_lines_held : bool
        Recovery takes the locks of the dead lines and of all lines of a dead leader's workers, and
        holds them until it is through, so that nobody comes to life there meanwhile.
    claim_checks_role : bool
        Who has taken a line's lock claims the line only if it is not marked as used.
    claim_checks_leader : bool
        A worker that has taken its line's lock claims the line only if its leader's line is used,
        by a live process, under the engine's key.
    running_protected : bool
        Recovery leaves blocks alone that a live worker still fills.
    finishing_recovered : bool
        Recovery completes an operation whose finishing rank is dead.
    recovery_leaves_counts : bool
        Recovery finishes an eviction without uncounting.
    rebuild_final_words : bool
        Recovery stores each pool word once, with its final value.
    lines_after_rebuild : bool
        Dead lines are marked as unused only after a recount and rebuild.
    waits_have_deadlines : bool
        A leader cancels an operation that does not end.
    left_recovering_is_cleared : bool
        A recovery that finds nobody dead clears `recovering` if a dead recoverer left it set.
    disk_recovered : bool
        Who finds a dead leader recovers the disk tier's segment as well.
    spill_published_last : bool
        A spill's blocks are published in the disk table after their bytes have been written.
    fetch_compares_digest, fetch_compares_checksum : bool
        A fetch compares the slab's header with the row, and what has arrived with its checksum.
    spill_compares : bool
        A spill compares the host slot with the row, before it is written and afterwards.
    epoch_moves : bool
        A reset moves the key epoch of a table before it evicts.
    """

    digest_before_partial: bool = True
    digest_before_publish: bool = True
    count_before_register: bool = True
    parent_generation: bool = True
    parent_registered: bool = True
    loser_uncounts: bool = True
    move_before_uncount: bool = True
    evict_requires_no_child: bool = True
    evict_requires_no_holder: bool = True
    generation_moves: bool = True
    reset_before_give_back: bool = True
    pin_compares: bool = True
    pin_expects_generation: bool = False
    identified_once: bool = True
    rows_checked: bool = True
    second_look: bool = True
    ring_has_room: bool = True
    inside_before_look: bool = True
    recovering_before_look: bool = True
    recount_alone: bool = True
    rebuild_alone: bool = True
    dead_lines_held: bool = True
    claim_checks_role: bool = True
    claim_checks_leader: bool = True
    running_protected: bool = True
    finishing_recovered: bool = True
    recovery_leaves_counts: bool = True
    rebuild_final_words: bool = True
    lines_after_rebuild: bool = True
    waits_have_deadlines: bool = True
    left_recovering_is_cleared: bool = True
    disk_recovered: bool = True
    spill_published_last: bool = True
    fetch_compares_digest: bool = True
    fetch_compares_checksum: bool = True
    spill_compares: bool = True
    epoch_moves: bool = True


PROTOCOL = Rules()
