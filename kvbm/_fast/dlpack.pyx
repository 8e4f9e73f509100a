# SPDX-License-Identifier: Apache-2.0
"""DLPack capsules: memory that is ours, shown to torch, NumPy and others without a copy.

The structs are those of DLPack 0.8 (`DLManagedTensor`, unversioned), from dlpack.h of the DLPack
specification. A capsule named "dltensor" owns a reference to the object that keeps the memory
alive; whoever consumes it renames the capsule and calls the deleter when it is done, otherwise the
capsule's own destructor does.
"""
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

DEVICE_CPU = 1
DEVICE_CUDA = 2
DEVICE_CUDA_HOST = 3

cdef enum:
    DIMENSIONS_MAX = 16


cdef struct DLDevice:
    int32_t device_type
    int32_t device_id


cdef struct DLDataType:
    uint8_t code             # 0 signed, 1 unsigned, 2 float, 4 bfloat
    uint8_t bits
    uint16_t lanes


cdef struct DLTensor:
    void *data
    DLDevice device
    int32_t ndim
    DLDataType dtype
    int64_t *shape
    int64_t *strides         # NULL: packed, last axis fastest
    uint64_t byte_offset


cdef struct DLManagedTensor:
    DLTensor dl_tensor
    void *manager_ctx        # the owner, one reference
    void (*deleter)(DLManagedTensor *) noexcept with gil


cdef struct Exported:        # what one capsule points to; `tensor` comes first
    DLManagedTensor tensor
    int64_t shape[DIMENSIONS_MAX]


cdef void delete_exported(DLManagedTensor *tensor) noexcept with gil:
    Py_DECREF(<object>tensor.manager_ctx)
    free(tensor)


cdef void destroy_capsule(object capsule) noexcept:
    cdef DLManagedTensor *tensor
    if PyCapsule_IsValid(capsule, "dltensor"):  # nobody has consumed it
        tensor = <DLManagedTensor *>PyCapsule_GetPointer(capsule, "dltensor")
        tensor.deleter(tensor)


def capsule(address: int, shape: tuple[int, ...], dtype: tuple[int, int],
            device: tuple[int, int], owner: object) -> object:
    """Return a capsule for packed memory.

    Parameters
    ----------
    address : int
        Of the first element.
    shape : tuple of int
        At most 16 axes.
    dtype : tuple of int
        DLPack's type code and the bits of an element.
    device : tuple of int
        DLPack's device type and the number of the device.
    owner : object
        Kept alive as long as somebody uses the memory.

    Raises
    ------
    ValueError
        There are more axes, or the address is 0.
    """
    cdef Exported *exported
    cdef DLTensor *tensor
    if not 0 < len(shape) <= DIMENSIONS_MAX or address == 0:
        raise ValueError(f"address {address:#x} and shape {shape}: one to {DIMENSIONS_MAX} axes of "
                         "memory that is there are allowed")
    code, bits = dtype
    device_type, device_id = device
    exported = <Exported *>malloc(sizeof(Exported))
    if exported == NULL:
        raise MemoryError("no memory for a DLPack tensor")
    try:
        tensor = &exported.tensor.dl_tensor
        for axis, size in enumerate(shape):
            exported.shape[<int>axis] = size
        tensor.data = <void *><uintptr_t>address
        tensor.device.device_type = device_type
        tensor.device.device_id = device_id
        tensor.ndim = <int32_t>len(shape)
        tensor.dtype.code = code
        tensor.dtype.bits = bits
        tensor.dtype.lanes = 1
        tensor.shape = exported.shape
        tensor.strides = NULL
        tensor.byte_offset = 0
        exported.tensor.manager_ctx = <void *>owner
        exported.tensor.deleter = delete_exported
        made = PyCapsule_New(exported, "dltensor", destroy_capsule)
    except BaseException:
        free(exported)
        raise
    Py_INCREF(owner)
    return made
