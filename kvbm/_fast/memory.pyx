# SPDX-License-Identifier: Apache-2.0
"""First touch of mapped memory, by a thread that does not hold the GIL."""
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t


cdef extern from *:
    """
    #include <sys/mman.h>
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23
    #endif
    """
    int MADV_POPULATE_WRITE
    int madvise(void *at, size_t bytes, int advice) nogil


def populate(memory, offset: int, count: int) -> int:
    """Allocate the pages behind a piece of a mapping, on the node of the calling thread.

    Several threads may populate different pieces of one mapping at once, which `posix_fallocate`
    on a shared-memory object cannot: it holds the object's lock.

    Parameters
    ----------
    memory : writable buffer
        The mapping.
    offset, count : int
        Bytes; `offset` a multiple of the page size.

    Returns
    -------
    int
        0; EINVAL where the kernel cannot (Linux before 5.14); EFAULT or ENOMEM where there is no
        memory, with no signal.
    """
    cdef Py_buffer view
    cdef uint8_t *at
    cdef size_t size = count
    cdef int result
    PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE)
    try:
        if not 0 <= offset <= view.len or not 0 <= count <= view.len - offset:
            raise ValueError(f"offset={offset}, count={count} is outside of {view.len} bytes")
        at = <uint8_t *>view.buf + <size_t>offset
        with nogil:
            result = madvise(at, size, MADV_POPULATE_WRITE)
            if result != 0:
                result = errno
    finally:
        PyBuffer_Release(&view)
    return result
