# SPDX-License-Identifier: Apache-2.0
"""Reading token ids out of lists, tuples and buffers into an array of u32."""
from cpython.buffer cimport PyBUF_CONTIG_RO, PyBUF_FORMAT
from cpython.buffer cimport PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from libc.stdint cimport int16_t, int32_t, int64_t, uint16_t, uint32_t
from libc.string cimport memcpy

from operator import index as operator_index

cdef extern from "Python.h":
    Py_ssize_t PySequence_Fast_GET_SIZE(object sequence)
    PyObject **PySequence_Fast_ITEMS(object sequence)

cdef extern from "tokens.h":
    Py_ssize_t kv_tokens_from_items(PyObject **items, Py_ssize_t count, uint32_t *out) noexcept

cdef int64_t TOKEN_MAX = 0xFFFFFFFF


def pack_tokens(tokens):
    """Return ``tokens`` as u32 little-endian bytes, without an object a token.

    Parameters
    ----------
    tokens
        list or tuple of int; or a one-dimensional contiguous buffer of 2-, 4- or 8-byte integers;
        or any other iterable of int, which is copied to a list first.

    Raises
    ------
    TypeError, ValueError
        If a token is no integer or not in 0 to 2**32 - 1; names its index and value.
    """
    cdef object source = sized(tokens)
    cdef Py_ssize_t count = len(source)
    packed = PyBytes_FromStringAndSize(NULL, 4 * count)
    copy_tokens(source, 0, count, <uint32_t *> PyBytes_AS_STRING(packed))
    return packed


cdef object sized(object tokens):
    """Return ``tokens`` if they can be read in place, else a list of them."""
    if isinstance(tokens, (list, tuple)) or PyObject_CheckBuffer(tokens):
        return tokens
    return list(tokens)


cdef int copy_tokens(
    object tokens, Py_ssize_t start, Py_ssize_t stop, uint32_t *out
) except -1:
    """Convert tokens ``start`` to before ``stop``; the caller has checked ``stop``."""
    cdef Py_ssize_t i = start
    if not isinstance(tokens, (list, tuple)):
        return copy_buffer(tokens, start, stop, out)
    while True:
        # Looking at an odd object runs Python code, which may change the list.
        if PySequence_Fast_GET_SIZE(tokens) < stop:
            raise RuntimeError("the list of tokens became shorter while it was read")
        i += kv_tokens_from_items(PySequence_Fast_ITEMS(tokens) + i, stop - i, out + (i - start))
        if i == stop:
            return 0
        out[i - start] = checked_token(tokens[i], i)
        i += 1


cdef uint32_t checked_token(object token, Py_ssize_t index) except? 0:
    """Return a token that is not a plain small int; raise if it is none at all."""
    try:
        value = operator_index(token)
    except TypeError:
        raise TypeError(f"token {index} is {token!r}: integers are needed") from None
    if not 0 <= value <= TOKEN_MAX:
        raise ValueError(f"token {index} is {value}: 0 to {TOKEN_MAX} are allowed")
    return value


cdef int copy_buffer(
    object tokens, Py_ssize_t start, Py_ssize_t stop, uint32_t *out
) except -1:
    """Convert items ``start`` to before ``stop`` of a buffer of integers."""
    cdef Py_buffer view
    cdef Py_ssize_t i
    cdef int64_t value
    cdef bint is_signed
    PyObject_GetBuffer(tokens, &view, PyBUF_CONTIG_RO | PyBUF_FORMAT)
    try:
        kind = (view.format or b"B").decode("ascii").lstrip("@=<")
        if view.ndim != 1 or kind not in tuple("hHiIlLqQ"):
            raise TypeError(
                f"tokens are a buffer of {view.ndim} dimensions and format {kind!r}: one dimension "
                "of 2-, 4- or 8-byte integers is needed"
            )
        if kind in "IL" and view.itemsize == 4:
            memcpy(out, <uint32_t *> view.buf + start, 4 * (stop - start))
            return 0
        is_signed = kind in "hilq"
        for i in range(start, stop):
            value = buffer_item(<char *> view.buf + i * view.itemsize, view.itemsize, is_signed)
            if not 0 <= value <= TOKEN_MAX:
                checked_token(memoryview(tokens)[i], i)
            out[i - start] = <uint32_t> value
        return 0
    finally:
        PyBuffer_Release(&view)


cdef inline int64_t buffer_item(
    const char *item, Py_ssize_t item_bytes, bint is_signed
) noexcept nogil:
    """Return one integer; one that does not fit in 63 bits comes back negative, hence refused."""
    if item_bytes == 4:
        return (<int32_t *> item)[0] if is_signed else <int64_t> (<uint32_t *> item)[0]
    if item_bytes == 8:
        return (<int64_t *> item)[0]
    return (<int16_t *> item)[0] if is_signed else <int64_t> (<uint16_t *> item)[0]
