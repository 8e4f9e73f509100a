/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From Python ints to token ids, without a call or an object per token.
 *
 * A token id fits one digit of CPython's int (30 bits), and such an int can be read in place. What
 * CPython offers for that changed in 3.12, so it is named here and nowhere else. Every other object
 * (larger ints, NumPy scalars, things that are no integer at all) is left to the caller.
 */
#ifndef KVBM_TOKENS_H
#define KVBM_TOKENS_H

#include <Python.h>
#include <stdint.h>

#if PY_VERSION_HEX < 0x030B0000
#include <longintrepr.h> /* Python.h includes it from 3.11 on */
#endif

/* The value of a non-negative int of at most one digit; -1 for anything else. */
static inline int64_t kv_token_value(PyObject *item) {
    if (!PyLong_CheckExact(item)) {
        return -1;
    }
#if PY_VERSION_HEX >= 0x030C0000
    if (!PyUnstable_Long_IsCompact((PyLongObject *)item)) {
        return -1;
    }
    return PyUnstable_Long_CompactValue((PyLongObject *)item); /* negative: refused as well */
#else
    Py_ssize_t digits = Py_SIZE(item); /* its sign is the sign of the int */
    if (digits == 1) {
        return ((PyLongObject *)item)->ob_digit[0];
    }
    return digits == 0 ? 0 : -1;
#endif
}

/*
 * Converts items one by one until `count` are done or one needs the caller's care; returns how many
 * were converted. Runs no Python code. The ints are spread over the heap: fetch some ahead.
 */
static inline Py_ssize_t kv_tokens_from_items(PyObject *const *items, Py_ssize_t count,
                                              uint32_t *out) {
    enum { AHEAD = 16 };
    Py_ssize_t i = 0;
    for (; i < count - AHEAD; i++) {
        __builtin_prefetch(items[i + AHEAD]);
        int64_t value = kv_token_value(items[i]);
        if (value < 0) {
            return i;
        }
        out[i] = (uint32_t)value;
    }
    for (; i < count; i++) {
        int64_t value = kv_token_value(items[i]);
        if (value < 0) {
            return i;
        }
        out[i] = (uint32_t)value;
    }
    return count;
}

#endif /* KVBM_TOKENS_H */
