# SPDX-License-Identifier: Apache-2.0
"""After how long the blocks of a request are used again: what a policy of eviction can learn from.

`Lifetimes` remembers who used a block last, be it cached or not, in a table of fixed size in which
a new block overwrites an old one. And it counts, for cohorts of requests: how many have come to an
age unused (`reached`), and how many of these were used before the next age (`used`), the life
table of actuaries. A request is counted in a column when it has left it, so what is still running
or waiting biases nothing. All is done in a time that does not depend on how long it has run.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from kvbm._fast.atomics cimport kv_prefetch
from kvbm._fast.keys cimport Keys
from kvbm._fast.ranks cimport RANK_AGES, USES, Use, Uses, age_column, use_of

import numpy as np

cdef enum:
    COUNTED_MAX = 64               # requests counted a call and column; one arrives a call
    PREFETCHED = 8                 # blocks whose memory is asked for ahead


cdef class Lifetimes:
    """What has become of the last requests.

    Parameters
    ----------
    uses : Uses
        Their numbers, and when they returned their blocks.
    cohorts : int
        Kinds of requests, 256 at most.
    remembered : int
        Blocks whose last use is known; rounded up to a power of two.

    Attributes
    ----------
    reached : numpy.ndarray
        float64[cohorts, AGES]; requests that came to this age unused, and have left it.
    used : numpy.ndarray
        float64[cohorts, AGES]; those of them that were used at this age.
    """

    def __cinit__(self, Uses uses not None, int cohorts, uint64_t remembered):
        cdef uint64_t size = 1
        if not 1 <= cohorts <= 256 or not 1 <= remembered <= <uint64_t>1 << 32:
            raise ValueError(f"{cohorts} cohorts, {remembered} blocks: 1 to 256, 1 to 2**32")
        while size < remembered:
            size *= 2
        self.uses = uses
        self.memory = <Remembered *>calloc(size, sizeof(Remembered))
        if self.memory == NULL:
            raise MemoryError("no memory for the blocks that are remembered")
        self.memory_mask = size - 1
        self.reached = np.zeros((cohorts, RANK_AGES))
        self.used = np.zeros((cohorts, RANK_AGES))
        self.reached_rows = self.reached
        self.used_rows = self.used
        for column in range(RANK_AGES):
            self.next_use[column] = uses.ranks.last + 1

    def __dealloc__(self):
        free(self.memory)

    def trace_back(self, Keys keys not None, start: int, stop: int,
                   use: int) -> tuple[int, int, int]:
        """Find the deepest block of a sequence that was used before, and note its new use.

        Parameters
        ----------
        keys : Keys
            Of the sequence, looked up before.
        start, stop : int
            Blocks before `start` are known to have been used; `stop` ends the sequence.
        use : int
            The new use.

        Returns
        -------
        known : int
            Blocks from the begin of the sequence that were used before.
        former : int
            The last use of block `known - 1`, 0 if it is not known.
        forks : int
            How many sequences before had no longer known part than up to this block: those who go
            on from a prompt that they have in common are many, a conversation goes on once.
        """
        cdef Py_ssize_t i, first = max(start, 0)
        cdef uint64_t lo, hi
        cdef uint32_t former
        cdef Remembered *entry
        for i in range(min(stop, keys.count()) - 1, -1, -1):
            if i >= PREFETCHED and i > first:
                keys.digest(i - PREFETCHED, &lo, &hi)
                kv_prefetch(&self.memory[lo & self.memory_mask])
            keys.digest(i, &lo, &hi)
            entry = &self.memory[lo & self.memory_mask]
            if entry.digest != lo or entry.use == 0:
                entry.digest = lo
                entry.forks = 0
                former = 0
            else:
                former = entry.use
            entry.use = use
            if former != 0 or i < first:
                entry.forks += 1
                return i + 1, former, entry.forks - 1
        return 0, 0, 0

    def begin(self, use: int, cohort: int) -> None:
        """Note of which cohort a use is; once, when it begins."""
        cdef Use *found = use_of(&self.uses.ranks, <uint32_t>use)
        if not 0 <= cohort < len(self.reached):
            raise ValueError(f"cohort {cohort} is outside 0..{len(self.reached) - 1}")
        if found != NULL:
            found.cohort = <uint8_t>cohort

    def used_again(self, use: int) -> None:
        """Note that the blocks of a use were used again, now; only the first time counts."""
        cdef Use *found = use_of(&self.uses.ranks, <uint32_t>use)
        cdef uint64_t now = self.uses.now()
        if found != NULL and found.ended == 0:
            found.ended = <uint8_t>(
                1 + age_column(now - found.returned if now > found.returned else 0))

    def fade(self, factor: float) -> None:
        """What has been counted so far counts this much less."""
        self.reached *= factor
        self.used *= factor

    def count(self) -> None:
        """Count what has left an age since the last call; to be called at each arrival."""
        cdef uint64_t now = self.uses.now()
        cdef uint32_t column
        with nogil:
            for column in range(RANK_AGES):
                self.count_column(column, now)

    cdef void count_column(self, uint32_t column, uint64_t now) noexcept nogil:
        cdef uint32_t number, left = COUNTED_MAX
        cdef uint32_t last = self.uses.ranks.last
        cdef Use *use
        while self.next_use[column] <= last and left != 0:
            number = self.next_use[column]
            use = use_of(&self.uses.ranks, number)
            if use == NULL:                # overtaken: nothing is known any more
                self.next_use[column] = last - USES + 1
                continue
            if use.ended == 0 and (now <= use.returned
                                   or age_column(now - use.returned) <= column):
                return                     # it has not left this age, and none that came later has
            left -= 1
            self.next_use[column] += 1
            if use.ended == 0 or use.ended - 1 >= column:
                self.reached_rows[use.cohort, column] += 1
            if use.ended - 1 == column:
                self.used_rows[use.cohort, column] += 1


def best_rates(hazards, widths):
    """Worth of keeping what has a chance of use that changes with age, a tick.

    For each age the best that a length of stay can bring: the chance of being used within it by
    the time it is expected to last (Gittins' index).

    Parameters
    ----------
    hazards : numpy.ndarray
        float64[kinds, ages]: chance of being used at an age, for what has come to it unused.
    widths : numpy.ndarray
        float64[ages]: ticks of each age.

    Returns
    -------
    numpy.ndarray
        float64[kinds, ages].
    """
    cdef const double[:, ::1] hazard = hazards
    cdef const double[::1] width = widths
    worth = np.zeros_like(hazards)
    cdef double[:, ::1] best = worth
    cdef Py_ssize_t kind, age, later
    cdef double left, used, stay, now
    if hazard.shape[1] != width.shape[0]:
        raise ValueError(f"{hazard.shape[1]} ages, {width.shape[0]} widths")
    for kind in range(hazard.shape[0]):
        for age in range(hazard.shape[1]):
            left, used, stay = 1.0, 0.0, 0.0
            for later in range(age, hazard.shape[1]):
                now = left * hazard[kind, later]
                used += now
                stay += width[later] * (left - now / 2)
                left -= now
                if used > best[kind, age] * stay:
                    best[kind, age] = used / stay
    return worth
