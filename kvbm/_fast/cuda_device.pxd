# SPDX-License-Identifier: Apache-2.0
# Declarations of cuda_driver.h, and one opened device.
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t


cdef extern from "cuda_driver.h" nogil:
    enum:
        KV_CU_SUCCESS
        KV_CU_INVALID_VALUE
        KV_CU_NOT_READY
        KV_CU_NOT_SUPPORTED
        KV_CU_STREAM_NON_BLOCKING
        KV_CU_EVENT_DISABLE_TIMING
        KV_CU_HOST_REGISTER_PORTABLE
        KV_CU_MEMORY_HOST
        KV_CU_MEMORY_DEVICE
        KV_CU_RANGE_START
        KV_CU_RANGE_SIZE
        KV_CU_ORDER_STREAM
        KV_CU_ORDER_ANY

    ctypedef struct kv_cu_context_st:
        pass
    ctypedef struct kv_cu_stream_st:
        pass
    ctypedef struct kv_cu_event_st:
        pass
    ctypedef struct kv_cu_module_st:
        pass
    ctypedef struct kv_cu_function_st:
        pass
    ctypedef kv_cu_context_st *kv_cu_context
    ctypedef kv_cu_stream_st *kv_cu_stream
    ctypedef kv_cu_event_st *kv_cu_event
    ctypedef kv_cu_module_st *kv_cu_module
    ctypedef kv_cu_function_st *kv_cu_function
    ctypedef uint64_t kv_cu_pointer

    ctypedef struct kv_cu_copy_2d:
        int source_kind
        const void *source_host
        kv_cu_pointer source_device
        size_t source_pitch
        int to_kind
        void *to_host
        kv_cu_pointer to_device
        size_t to_pitch
        size_t width
        size_t height

    ctypedef struct kv_cu_batch_attribute:
        int source_order

    ctypedef struct kv_cuda:
        int version
        int (*error_name)(int error, const char **name) noexcept nogil
        int (*device_get)(int *device, int ordinal) noexcept nogil
        int (*device_name)(char *name, int length, int device) noexcept nogil
        int (*device_uuid)(unsigned char *uuid, int device) noexcept nogil
        int (*device_bus_id)(char *id, int length, int device) noexcept nogil
        int (*context_retain)(kv_cu_context *context, int device) noexcept nogil
        int (*context_release)(int device) noexcept nogil
        int (*context_set)(kv_cu_context context) noexcept nogil
        int (*priority_range)(int *least, int *greatest) noexcept nogil
        int (*stream_create)(kv_cu_stream *stream, unsigned int flags, int priority) noexcept nogil
        int (*stream_destroy)(kv_cu_stream stream) noexcept nogil
        int (*stream_wait)(kv_cu_stream stream, kv_cu_event event,
                           unsigned int flags) noexcept nogil
        int (*stream_synchronize)(kv_cu_stream stream) noexcept nogil
        int (*event_create)(kv_cu_event *event, unsigned int flags) noexcept nogil
        int (*event_destroy)(kv_cu_event event) noexcept nogil
        int (*event_record)(kv_cu_event event, kv_cu_stream stream) noexcept nogil
        int (*event_query)(kv_cu_event event) noexcept nogil
        int (*host_register)(void *at, size_t bytes, unsigned int flags) noexcept nogil
        int (*host_unregister)(void *at) noexcept nogil
        int (*pointer_attribute)(void *value, int attribute, kv_cu_pointer pointer) noexcept nogil
        int (*copy_to_device)(kv_cu_pointer to, const void *source, size_t bytes,
                              kv_cu_stream stream) noexcept nogil
        int (*copy_to_host)(void *to, kv_cu_pointer source, size_t bytes,
                            kv_cu_stream stream) noexcept nogil
        int (*copy_2d)(const kv_cu_copy_2d *copy, kv_cu_stream stream) noexcept nogil
        int (*memory_allocate)(kv_cu_pointer *memory, size_t bytes) noexcept nogil
        int (*memory_free)(kv_cu_pointer memory) noexcept nogil
        int (*module_load)(kv_cu_module *module, const void *image) noexcept nogil
        int (*module_unload)(kv_cu_module module) noexcept nogil
        int (*module_function)(kv_cu_function *function, kv_cu_module module,
                               const char *name) noexcept nogil
        int (*launch)(kv_cu_function function, unsigned int grid_x, unsigned int grid_y,
                      unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                      unsigned int block_z, unsigned int shared_bytes, kv_cu_stream stream,
                      void **parameters, void **extra) noexcept nogil
        int (*copy_batch)(kv_cu_pointer *to, kv_cu_pointer *source, size_t *bytes, size_t count,
                          kv_cu_batch_attribute *attributes, size_t *indices,
                          size_t attribute_count, size_t *failed,
                          kv_cu_stream stream) noexcept nogil

    int kv_cuda_open(kv_cuda *cuda, const char *library, char *problem, size_t room) noexcept


cdef class CudaDevice:
    cdef kv_cuda cuda
    cdef kv_cu_context context     # the device's primary context, the one that engines use
    cdef int device
    cdef bint retained
    cdef readonly int index
    cdef readonly str library
    cdef readonly str name
    cdef list registered           # (address, bytes) of the host memory registered here
    cdef object memory_held        # keeps it mapped

    cdef object fault(self, str what, int error)
    cdef void tell(self, const char *what, int error, bint last) noexcept nogil
    cdef int check(self, str what, int error) except -1
    cdef int enter(self) except -1
    cdef int make_event(self, kv_cu_event *event) except -1
