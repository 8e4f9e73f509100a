# SPDX-License-Identifier: Apache-2.0
"""Headers of a slab's slots: read, write, and the scan that finds what a slab holds.

The file's layout and the order in which a slot is written are described in slab.h. Headers go
through the page cache, since neighbours share a page and two workers may write two of them at once;
the data go past it.
"""
from libc.errno cimport EIO, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer

import numpy as np


cdef extern from *:
    """
    #include <fcntl.h>
    static int kv_fallocate(int fd, long long bytes) { return fallocate(fd, 0, 0, (off_t)bytes); }
    """
    int kv_fallocate(int fd, long long count) nogil

SLAB_HEADER = np.dtype([
    ("magic", "<u8"), ("state", "<u4"), ("generation", "<u4"), ("digest_lo", "<u8"),
    ("digest_hi", "<u8"), ("parent_lo", "<u8"), ("parent_hi", "<u8"), ("fingerprint", "<u8"),
    ("payload_bytes", "<u8"), ("data_checksum", "<u8"), ("sequence_hash", "<u8"),
    ("written_ns", "<u8"), ("slot", "<u4"), ("position", "<u4"), ("group", "<u4"),
    ("rank", "<u4"), ("reserved0", "<u8"), ("reserved1", "<u8"), ("header_checksum", "<u8"),
])


def allocate_file(fd: int, count: int) -> int:
    """Reserve the first `count` bytes of a file at once; 0, or the system's error number.

    Unlike `posix_fallocate`, it never writes where the file system cannot reserve (EOPNOTSUPP).
    """
    cdef int file = fd
    cdef long long size = count
    cdef int result
    with nogil:
        result = kv_fallocate(file, size)
        if result != 0:
            result = errno
    return result


def valid_headers(table, *, first: int = 0, rank: int, fingerprint: int,
                  payload_bytes: int) -> np.ndarray:
    """Copies of the headers in a piece of a slab's table that hold a block, in slot order.

    Parameters
    ----------
    table : buffer
        128 bytes a slot.
    first : int
        Slot of the first header in it.
    rank, fingerprint, payload_bytes : int
        What a header must name to count.

    Returns
    -------
    numpy.ndarray
        Of `SLAB_HEADER`.
    """
    cdef Py_buffer view
    cdef const kv_slab_header *headers
    cdef uint32_t number, count, begin = first, own_rank = rank
    cdef uint64_t owner = fingerprint, size = payload_bytes
    cdef uint8_t[::1] kept
    everything = np.frombuffer(table, SLAB_HEADER)
    good = np.zeros(len(everything), np.uint8)
    if len(everything) == 0:
        return everything
    kept = good
    PyObject_GetBuffer(table, &view, PyBUF_SIMPLE)
    try:
        headers = <const kv_slab_header *>view.buf
        count = <uint32_t>(view.len // sizeof(kv_slab_header))
        with nogil:
            for number in range(count):
                kept[number] = kv_slab_header_holds(&headers[number], begin + number, own_rank,
                                                    owner, size)
    finally:
        PyBuffer_Release(&view)
    return everything[good.astype(bool)]


# What a header can be for who looks at a slab from outside.
EMPTY, VALID, TORN, FOREIGN = range(4)


def header_conditions(table, *, first: int = 0, rank: int, fingerprint: int,
                      payload_bytes: int) -> np.ndarray:
    """What each header in a piece of a slab's table is; parameters as `valid_headers`.

    Returns
    -------
    numpy.ndarray
        uint8[headers]: `EMPTY`, also where none was ever written; `VALID`; `TORN`, where its own
        checksum is wrong; `FOREIGN`, where it is right but names another slot, rank or cache.
    """
    cdef const uint8_t[::1] raw = np.frombuffer(table, np.uint8)
    cdef const kv_slab_header *header
    cdef uint8_t[::1] found
    cdef uint32_t begin = first, own_rank = rank
    cdef uint64_t owner = fingerprint, size = payload_bytes
    cdef Py_ssize_t number, count = raw.shape[0] // <Py_ssize_t>sizeof(kv_slab_header)
    cdef int empty = EMPTY, valid = VALID, torn = TORN, foreign = FOREIGN
    conditions = np.zeros(count, np.uint8)
    found = conditions
    with nogil:
        for number in range(count):
            header = <const kv_slab_header *>&raw[number * <Py_ssize_t>sizeof(kv_slab_header)]
            if kv_slab_header_holds(header, <uint32_t>(begin + number), own_rank, owner, size):
                found[number] = valid
            elif not kv_slab_header_is_whole(header):
                found[number] = empty if is_blank(header) else torn
            elif (header.state == KV_SLAB_EMPTY and header.slot == <uint32_t>(begin + number)
                    and header.rank == own_rank):
                found[number] = empty
            else:
                found[number] = foreign
    return conditions


cdef bint is_blank(const kv_slab_header *header) noexcept nogil:
    cdef const uint64_t *word = <const uint64_t *>header
    cdef size_t i
    for i in range(sizeof(kv_slab_header) // sizeof(uint64_t)):
        if word[i] != 0:
            return False
    return True


cdef int transfer_header(const SlabFile *file, uint32_t slot, kv_slab_header *header,
                         bint write) noexcept nogil:
    """Move one header; 0 or the system's error number. A short transfer is EIO."""
    cdef kv_piece piece
    cdef ssize_t done
    cdef off_t offset = <off_t>(file.table_offset + <uint64_t>slot * sizeof(kv_slab_header))
    piece.iov_base = header
    piece.iov_len = sizeof(kv_slab_header)
    if write:
        done = file.calls.write(file.table_fd, &piece, 1, offset)
    else:
        done = file.calls.read(file.table_fd, &piece, 1, offset)
    if done < 0:
        return errno if errno != 0 else EIO
    return 0 if done == <ssize_t>sizeof(kv_slab_header) else EIO


cdef int slab_read_header(const SlabFile *file, uint32_t slot,
                          kv_slab_header *header) noexcept nogil:
    return transfer_header(file, slot, header, False)


cdef int slab_write_header(const SlabFile *file, uint32_t slot,
                           kv_slab_header *header) noexcept nogil:
    kv_slab_header_seal(header)
    return transfer_header(file, slot, header, True)


cdef int slab_empty_header(const SlabFile *file, uint32_t slot, uint32_t *generation,
                           bint *was_valid) noexcept nogil:
    """[B0] Before the first byte of a slot changes; gives the generation of its next content."""
    cdef kv_slab_header header
    cdef int problem = slab_read_header(file, slot, &header)
    if problem != 0:
        return problem
    was_valid[0] = kv_slab_header_holds(&header, slot, file.rank, file.fingerprint,
                                        file.payload_bytes)
    generation[0] = header.generation + 1
    memset(&header, 0, sizeof(header))
    header.state = KV_SLAB_EMPTY
    header.generation = generation[0]
    header.slot = slot
    header.rank = file.rank
    return slab_write_header(file, slot, &header)
