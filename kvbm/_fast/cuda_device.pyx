# SPDX-License-Identifier: Apache-2.0
"""One CUDA device through the driver: its primary context and host memory registered with it.

The driver's library is opened when a device is, so importing this needs no CUDA. Through a table of
function pointers (cuda_driver.h) rather than through cuda.bindings, since the calls that matter are
made by a thread that does not hold the GIL, hundreds in a row.
"""
import logging

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint64_t, uintptr_t

logger = logging.getLogger("kvbm.cuda")

DRIVER_LIBRARY = "libcuda.so.1"


class CudaFault(Exception):
    """A call of the CUDA driver failed, or there is no usable driver.

    Parameters
    ----------
    message : str
        What failed.
    error : int
        The driver's error number, 0 if there is none.
    """

    def __init__(self, message: str, error: int = 0) -> None:
        super().__init__(message, error)
        self.error = error

    def __str__(self) -> str:
        return str(self.args[0])


cdef class CudaDevice:
    """A device, and the host memory that is registered with it.

    Parameters
    ----------
    index : int
        Ordinal of the device, as the engine's process counts them.
    library : str
        The driver's library.

    Raises
    ------
    CudaFault
        There is no driver of CUDA 12.0 or later, or no such device.
    """

    def __cinit__(self, int index, *, library: str = DRIVER_LIBRARY):
        cdef char problem[256]
        cdef char name[256]
        cdef bytes path = library.encode()
        self.registered = []
        self.index = index
        self.library = library
        if kv_cuda_open(&self.cuda, path, problem, sizeof(problem)) != 0:
            raise CudaFault(problem.decode(errors="replace"))
        self.check(f"device {index}", self.cuda.device_get(&self.device, index))
        self.check("cuDeviceGetName", self.cuda.device_name(name, sizeof(name), self.device))
        self.name = name.decode(errors="replace")
        self.check("cuDevicePrimaryCtxRetain",
                   self.cuda.context_retain(&self.context, self.device))
        self.retained = True

    cdef object fault(self, str what, int error):
        cdef const char *name = NULL
        if self.cuda.error_name(error, &name) != KV_CU_SUCCESS or name == NULL:
            return CudaFault(f"{what} failed: CUDA error {error}", error)
        return CudaFault(f"{what} failed: {name.decode()} ({error})", error)

    cdef void tell(self, const char *what, int error, bint last) noexcept nogil:
        """Log an error; `last`: nothing more is tried."""
        with gil:
            try:
                logger.error("%s%s", self.fault((<bytes>what).decode(), error),
                             "; the host tier of this rank is switched off" if last else "")
            except Exception:  # noqa: BLE001  a logger that fails must not end the copy thread
                pass

    cdef int check(self, str what, int error) except -1:
        if error != KV_CU_SUCCESS:
            raise self.fault(what, error)
        return 0

    cdef int enter(self) except -1:
        """Make the context current on this thread."""
        if not self.retained:
            raise CudaFault(f"device {self.index} is closed")
        return self.check("cuCtxSetCurrent", self.cuda.context_set(self.context))

    cdef int make_event(self, kv_cu_event *event) except -1:
        """An event that keeps no time."""
        return self.check("cuEventCreate",
                          self.cuda.event_create(event, KV_CU_EVENT_DISABLE_TIMING))

    @property
    def uuid(self) -> str:
        """The device's own number, 32 hexadecimal digits; empty if that is unknown."""
        cdef unsigned char uuid[16]
        if self.cuda.device_uuid(uuid, self.device) != KV_CU_SUCCESS:
            return ""
        return (<bytes>uuid[:16]).hex()

    @property
    def bus_id(self) -> str:
        """Where the device is on the PCI bus, as "0000:3B:00.0"; empty if that is unknown."""
        cdef char bus_id[64]
        if self.cuda.device_bus_id(bus_id, sizeof(bus_id), self.device) != KV_CU_SUCCESS:
            return ""
        return bus_id.decode(errors="replace")

    @property
    def driver_version(self) -> tuple[int, int]:
        """CUDA version of the driver, as (13, 0)."""
        return self.cuda.version // 1000, self.cuda.version % 1000 // 10

    @property
    def has_batches(self) -> bool:
        """Whether many copies can be submitted in one call (driver 12.8)."""
        return self.cuda.copy_batch != NULL

    @property
    def registered_bytes(self) -> int:
        """Host memory that is registered now."""
        return sum(size for _, size in self.registered)

    def allocation_of(self, address: int) -> tuple[int, int] | None:
        """Begin and size of the device allocation that an address lies in; None if unknown."""
        cdef uint64_t start = 0
        cdef size_t size = 0
        self.enter()
        if (self.cuda.pointer_attribute(&start, KV_CU_RANGE_START, address) != KV_CU_SUCCESS
                or self.cuda.pointer_attribute(&size, KV_CU_RANGE_SIZE, address) != KV_CU_SUCCESS
                or size == 0):
            return None
        return start, size

    def allocate(self, count: int) -> int:
        """Address of new device memory, for `free`; a `CudaFault` if there is no room."""
        cdef kv_cu_pointer memory = 0
        self.enter()
        self.check(f"cuMemAlloc of {count} bytes", self.cuda.memory_allocate(&memory, count))
        return memory

    def free(self, address: int) -> None:
        """Give memory of `allocate` back; nothing may be under way."""
        self.enter()
        self.check("cuMemFree", self.cuda.memory_free(address))

    def register(self, memory, offset: int, count: int) -> None:
        """Register a piece of host memory, so that copies to and from it need no host thread.

        One piece must hold whole copies: the driver refuses one that crosses from one registered
        piece into the next. Releases the GIL.

        Parameters
        ----------
        memory : writable buffer
            Held until `close`.
        offset, count : int
            Bytes; whole pages.

        Raises
        ------
        CudaFault
            The driver refuses, for instance since the system does not let it pin more memory.
        """
        cdef Py_buffer view
        cdef uint8_t *at
        cdef size_t size = count
        cdef int error
        self.enter()
        PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE)
        try:
            if not 0 <= offset <= view.len or not 0 < count <= view.len - offset:
                raise ValueError(f"offset={offset}, count={count} is outside of {view.len} bytes")
            at = <uint8_t *>view.buf + <size_t>offset
            with nogil:
                error = self.cuda.host_register(at, size, KV_CU_HOST_REGISTER_PORTABLE)
            self.check(f"cuMemHostRegister of {count} bytes", error)
            self.registered.append((<uintptr_t>at, count))
        finally:
            PyBuffer_Release(&view)
        self.memory_held = memory

    def close(self) -> None:
        """Unregister everything and leave the context; no copy may be under way."""
        cdef uint8_t *at
        if not self.retained:
            return
        self.enter()
        for address, _ in self.registered:
            at = <uint8_t *><uintptr_t>address
            with nogil:
                self.cuda.host_unregister(at)
        self.registered = []
        self.memory_held = None
        self.retained = False
        self.cuda.context_release(self.device)
