# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t

cdef object sized(object tokens)
cdef int copy_tokens(
    object tokens, Py_ssize_t start, Py_ssize_t stop, uint32_t *out
) except -1
