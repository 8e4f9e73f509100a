/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The words of a parent and its child, written apart from explore.py as a check on it: worker and
 * leader publish the same reservation of the child, a second leader evicts the child and then the
 * parent, any of them dies before any write, and a recovery clears what the dead held and recounts
 * the parent when nobody is inside. test_words.py runs it.
 *
 * -DREADER has a third leader that pins the child in the place of the worker. -DCOUNT_LATE,
 * -DUNCOUNT_EARLY, -DLOOK_EARLY and -DRECOUNT_INSIDE break one rule each.
 */
#ifndef DEATHS
#define DEATHS 1
#endif

#define RESET 0
#define PARTIAL 1
#define REGISTERED 2
#define EVICTING 3
#define WORD(s, h, c, g) ((s) << 9 | (h) << 6 | (c) << 3 | (g))
#define STATE(w) ((w) >> 9)
#define HOLDERS(w) (((w) >> 6) & 7)
#define CHILDREN(w) (((w) >> 3) & 7)
#define GENERATION(w) ((w) & 7)
#define HOLDER(leader) (1 << (6 + (leader)))
#define CHILD_ONE (1 << 3)

#define PARENT 0
#define CHILD 1
#define WORKER 3 /* participants 0, 1 and 2 are the leaders of these bits, 3 is leader 0's worker */

int word[2];
bool inside[4], dead[4], recovering;
byte deaths, ended;

#define IS(w, s, g) (STATE(w) == (s) && GENERATION(w) == (g))
/* A choice: the process ends here, or goes on. */
#define DIE if :: deaths < DEATHS -> deaths++; dead[me] = true; goto gone :: true fi
#define FREE(w) (STATE(w) == REGISTERED && HOLDERS(w) == 0 && CHILDREN(w) == 0)

inline swap(at, expected, desired) {
    ok = (word[at] == expected);
    if :: ok -> word[at] = desired :: else -> expected = word[at] fi
}

/* One step: die, or compare and swap. */
inline cas(at, expected, desired) { atomic { DIE; swap(at, expected, desired) } }

inline enter() { /* [S0] and [S1] */
#ifdef LOOK_EARLY
    declined = recovering;
    atomic { DIE; inside[me] = true };
#else
    atomic { DIE; inside[me] = true };
    declined = recovering;
#endif
    if :: declined -> atomic { DIE; inside[me] = false } :: else fi
}

inline count_parent() { /* [P1] */
    counted = false;
    p = word[PARENT];
    do
    :: !counted && IS(p, REGISTERED, 0) -> cas(PARENT, p, p + CHILD_ONE); counted = ok
    :: else -> break
    od
}

inline uncount_parent() { /* [E2] */
    ok = false;
    p = word[PARENT];
    do
    :: !ok && GENERATION(p) == 0 && CHILDREN(p) > 0 -> cas(PARENT, p, p - CHILD_ONE)
    :: else -> break
    od
}

inline let_go(leader) {
    ok = false;
    w = word[CHILD];
    do
    :: !ok && STATE(w) == REGISTERED && (w & HOLDER(leader)) ->
        cas(CHILD, w, w & ~HOLDER(leader))
    :: else -> break
    od
}

proctype publisher(byte me; bool owner) {
    int w, p;
    bool ok, declined, counted, published;
again:
    enter();
    if
    :: declined && owner -> !recovering; goto again
    :: declined && !owner -> goto gone
    :: else
    fi;
    w = word[CHILD];
    if
    :: IS(w, PARTIAL, 0) ->
#ifndef COUNT_LATE
        count_parent();
#else
        counted = true;
#endif
        published = false;
        do
        :: counted && !published && IS(w, PARTIAL, 0) -> /* [P2] */
            cas(CHILD, w, WORD(REGISTERED, HOLDERS(w), 0, 0)); published = ok
        :: else -> break
        od;
#ifdef COUNT_LATE
        if :: published -> count_parent() :: else fi;
#else
        if :: counted && !published -> uncount_parent() :: else fi;
#endif
    :: else
    fi;
    if
    :: owner ->
        let_go(0);
        w = word[CHILD];
        if
        :: IS(w, PARTIAL, 0) -> /* no parent: abandon */
            cas(CHILD, w, WORD(EVICTING, 1, 0, 1));
            if :: ok -> atomic { DIE; word[CHILD] = WORD(RESET, 0, 0, 1) } :: else fi
        :: else
        fi
    :: else
    fi;
    atomic { DIE; inside[me] = false };
gone:
    atomic { w = 0; ended++ }
}

proctype evictor(byte me) {
    int w, p, cell;
    bool ok, declined, moved;
    enter();
    if :: declined -> goto gone :: else fi;
    for (cell : 0 .. 1) {
        w = word[1 - cell];
        if
        :: FREE(w) ->
#ifdef UNCOUNT_EARLY
            if :: cell == 0 -> uncount_parent() :: else fi;
#endif
            cas(1 - cell, w, WORD(EVICTING, 2, 0, GENERATION(w) + 1)); moved = ok; /* [E1] */
            if
            :: moved ->
#ifndef UNCOUNT_EARLY
                if :: cell == 0 -> uncount_parent() :: else fi;
#endif
                atomic { DIE; word[1 - cell] = WORD(RESET, 0, 0, 1) } /* [E5] */
            :: else
            fi
        :: else
        fi
    }
    atomic { DIE; inside[me] = false };
gone:
    atomic { w = 0; ended++ }
}

proctype reader(byte me) {
    int w;
    bool ok;
    w = word[CHILD];
    do
    :: !ok && STATE(w) == REGISTERED -> cas(CHILD, w, w | HOLDER(2))
    :: else -> break
    od;
    if
    :: ok -> assert(IS(word[PARENT], REGISTERED, 0)); let_go(2)
    :: else
    fi;
gone:
    atomic { w = 0; ended++ }
}

#define DEAD_BITS (dead[0] * HOLDER(0) | dead[1] * HOLDER(1) | dead[2] * HOLDER(2))

inline recover() {
    for (cell : 0 .. 1) {
        w = word[cell];
        do
        :: (w & DEAD_BITS) && STATE(w) == REGISTERED -> atomic { swap(cell, w, w & ~DEAD_BITS) }
        :: (w & DEAD_BITS) && STATE(w) == PARTIAL ->
            atomic { swap(cell, w, WORD(EVICTING, HOLDERS(w), 0, GENERATION(w) + 1)) }
        :: (w & DEAD_BITS) && STATE(w) == EVICTING ->
            word[cell] = WORD(RESET, 0, 0, GENERATION(w));
            w = word[cell]
        :: else -> break
        od;
        w = 0
    }
    recovering = true; /* [S2] */
    alone = true;
    for (line : 0 .. 3) { alone = alone && (dead[line] || !inside[line]) } /* [S3] */
#ifdef RECOUNT_INSIDE
    alone = true;
#endif
    if
    :: alone ->
        w = word[CHILD];
        p = word[PARENT];
        children = (STATE(w) == REGISTERED -> 1 : 0);
        ok = false;
        do
        :: !ok && STATE(p) == REGISTERED && CHILDREN(p) != children ->
            atomic { swap(PARENT, p, WORD(REGISTERED, HOLDERS(p), children, GENERATION(p))) }
        :: else -> break
        od
    :: else
    fi;
    recovering = false
}

init {
    int w, p, cell, line;
    byte children;
    bool ok, alone;
    atomic {
        word[PARENT] = WORD(REGISTERED, 0, 0, 0);
        word[CHILD] = WORD(PARTIAL, 1, 0, 0);
        run publisher(0, true);
        run evictor(1);
#ifdef READER
        run reader(2)
#else
        run publisher(WORKER, false)
#endif
    }
    deaths > 0 || ended == 3;
    recover(); /* while the others go on */
    ended == 3;
    recover();
    assert(STATE(word[CHILD]) == REGISTERED || STATE(word[CHILD]) == RESET);
    assert(HOLDERS(word[CHILD]) == 0 && HOLDERS(word[PARENT]) == 0);
    assert(STATE(word[PARENT]) != REGISTERED ||
           CHILDREN(word[PARENT]) == (STATE(word[CHILD]) == REGISTERED -> 1 : 0))
}

/* I1 and I2 */
ltl safe {
    [] (STATE(word[CHILD]) == REGISTERED ->
        (IS(word[PARENT], REGISTERED, 0) && CHILDREN(word[PARENT]) >= 1))
}
