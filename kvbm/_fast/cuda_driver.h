/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The few functions of the CUDA driver that copies need, found when they are asked for.
 *
 * Nothing of CUDA is needed to build or to import the package: libcuda.so.1, which comes with the
 * driver, is opened by kv_cuda_open, and each function is asked for under the version whose
 * signature is written here (cuGetProcAddress), so that a newer driver gives the same one. Types
 * are the driver's, reduced to what the ABI needs. Source: CUDA driver API reference, cuda.h.
 */
#ifndef KVBM_CUDA_DRIVER_H
#define KVBM_CUDA_DRIVER_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef int kv_cu_result;
typedef int kv_cu_device;
typedef struct kv_cu_context_st *kv_cu_context;
typedef struct kv_cu_stream_st *kv_cu_stream;
typedef struct kv_cu_event_st *kv_cu_event;
typedef struct kv_cu_module_st *kv_cu_module;
typedef struct kv_cu_function_st *kv_cu_function;
typedef uint64_t kv_cu_pointer;

enum {
    KV_CU_SUCCESS = 0,
    KV_CU_INVALID_VALUE = 1,
    KV_CU_NOT_READY = 600,
    KV_CU_NOT_SUPPORTED = 801,
    KV_CU_STREAM_NON_BLOCKING = 1,
    KV_CU_EVENT_DISABLE_TIMING = 2,
    KV_CU_HOST_REGISTER_PORTABLE = 1,
    KV_CU_MEMORY_HOST = 1,
    KV_CU_MEMORY_DEVICE = 2,
    KV_CU_RANGE_START = 11,  /* CU_POINTER_ATTRIBUTE_RANGE_START_ADDR */
    KV_CU_RANGE_SIZE = 12,
    KV_CU_ORDER_STREAM = 1,  /* the source is read in stream order */
    KV_CU_ORDER_ANY = 3      /* the source may be read at once: it is complete already */
};

typedef struct kv_cu_copy_2d {
    size_t source_x, source_y;
    int source_kind;
    const void *source_host;
    kv_cu_pointer source_device;
    void *source_array;
    size_t source_pitch;
    size_t to_x, to_y;
    int to_kind;
    void *to_host;
    kv_cu_pointer to_device;
    void *to_array;
    size_t to_pitch;
    size_t width, height;
} kv_cu_copy_2d;

typedef struct kv_cu_batch_attribute {
    int source_order;
    int source_hint[2], to_hint[2]; /* only looked at for managed memory */
    unsigned int flags;
} kv_cu_batch_attribute;

_Static_assert(sizeof(kv_cu_copy_2d) == 128, "CUDA_MEMCPY2D_v2");
_Static_assert(sizeof(kv_cu_batch_attribute) == 24, "CUmemcpyAttributes_v1");

/* name in the table, name in the driver, version of the signature, arguments */
#define KV_CU_FUNCTIONS(X)                                                                         \
    X(init, "cuInit", 12000, (unsigned int flags))                                                 \
    X(driver_version, "cuDriverGetVersion", 12000, (int *version))                                 \
    X(error_name, "cuGetErrorName", 12000, (kv_cu_result error, const char **name))                \
    X(device_get, "cuDeviceGet", 12000, (kv_cu_device *device, int ordinal))                       \
    X(device_name, "cuDeviceGetName", 12000, (char *name, int length, kv_cu_device device))        \
    X(device_uuid, "cuDeviceGetUuid", 12000, (unsigned char uuid[16], kv_cu_device device))        \
    X(device_bus_id, "cuDeviceGetPCIBusId", 12000, (char *id, int length, kv_cu_device device))    \
    X(context_retain, "cuDevicePrimaryCtxRetain", 12000,                                           \
      (kv_cu_context *context, kv_cu_device device))                                               \
    X(context_release, "cuDevicePrimaryCtxRelease", 12000, (kv_cu_device device))                  \
    X(context_set, "cuCtxSetCurrent", 12000, (kv_cu_context context))                              \
    X(priority_range, "cuCtxGetStreamPriorityRange", 12000, (int *least, int *greatest))           \
    X(stream_create, "cuStreamCreateWithPriority", 12000,                                          \
      (kv_cu_stream *stream, unsigned int flags, int priority))                                    \
    X(stream_destroy, "cuStreamDestroy", 12000, (kv_cu_stream stream))                             \
    X(stream_wait, "cuStreamWaitEvent", 12000,                                                     \
      (kv_cu_stream stream, kv_cu_event event, unsigned int flags))                                \
    X(stream_synchronize, "cuStreamSynchronize", 12000, (kv_cu_stream stream))                     \
    X(event_create, "cuEventCreate", 12000, (kv_cu_event *event, unsigned int flags))              \
    X(event_destroy, "cuEventDestroy", 12000, (kv_cu_event event))                                 \
    X(event_record, "cuEventRecord", 12000, (kv_cu_event event, kv_cu_stream stream))              \
    X(event_query, "cuEventQuery", 12000, (kv_cu_event event))                                     \
    X(host_register, "cuMemHostRegister", 12000, (void *at, size_t bytes, unsigned int flags))     \
    X(host_unregister, "cuMemHostUnregister", 12000, (void *at))                                   \
    X(pointer_attribute, "cuPointerGetAttribute", 12000,                                           \
      (void *value, int attribute, kv_cu_pointer pointer))                                         \
    X(copy_to_device, "cuMemcpyHtoDAsync", 12000,                                                  \
      (kv_cu_pointer to, const void *source, size_t bytes, kv_cu_stream stream))                   \
    X(copy_to_host, "cuMemcpyDtoHAsync", 12000,                                                    \
      (void *to, kv_cu_pointer source, size_t bytes, kv_cu_stream stream))                         \
    X(copy_2d, "cuMemcpy2DAsync", 12000, (const kv_cu_copy_2d *copy, kv_cu_stream stream))         \
    X(memory_allocate, "cuMemAlloc", 12000, (kv_cu_pointer *memory, size_t bytes))                 \
    X(memory_free, "cuMemFree", 12000, (kv_cu_pointer memory))                                     \
    X(module_load, "cuModuleLoadData", 12000, (kv_cu_module *module, const void *image))           \
    X(module_unload, "cuModuleUnload", 12000, (kv_cu_module module))                               \
    X(module_function, "cuModuleGetFunction", 12000,                                               \
      (kv_cu_function *function, kv_cu_module module, const char *name))                           \
    X(launch, "cuLaunchKernel", 12000,                                                             \
      (kv_cu_function function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,     \
       unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared,      \
       kv_cu_stream stream, void **parameters, void **extra))

typedef struct kv_cuda {
    void *library;
    int version; /* of the driver, as 12080 */
#define KV_CU_MEMBER(name, symbol, version, arguments) kv_cu_result(*name) arguments;
    KV_CU_FUNCTIONS(KV_CU_MEMBER)
#undef KV_CU_MEMBER
    /* NULL before driver 12.8: then copies are submitted one by one. */
    kv_cu_result (*copy_batch)(kv_cu_pointer *to, kv_cu_pointer *source, size_t *bytes,
                               size_t count, kv_cu_batch_attribute *attributes, size_t *indices,
                               size_t attribute_count, size_t *failed, kv_cu_stream stream);
} kv_cuda;

typedef kv_cu_result (*kv_cu_lookup)(const char *symbol, void **function, int version,
                                     uint64_t flags, int *status);

/* POSIX: what dlsym returns for a function may be stored as a pointer to one. */
static inline void *kv_cu_find(kv_cu_lookup lookup, const char *symbol, int version) {
    void *function = NULL;
    int status = 0;
    if (lookup(symbol, &function, version, 0, &status) != KV_CU_SUCCESS || status != 0) return NULL;
    return function;
}

/* Returns 0; else the reason is in `problem` and nothing stays open. */
static inline int kv_cuda_open(kv_cuda *cuda, const char *library, char *problem, size_t room) {
    kv_cu_lookup lookup;
    void *found;
    memset(cuda, 0, sizeof *cuda);
    cuda->library = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (cuda->library == NULL) {
        snprintf(problem, room, "%s cannot be opened: %s", library, dlerror());
        return -1;
    }
    found = dlsym(cuda->library, "cuGetProcAddress_v2");
    memcpy(&lookup, &found, sizeof lookup);
    if (found == NULL) {
        snprintf(problem, room, "%s is older than CUDA 12.0", library);
        goto failed;
    }
#define KV_CU_FIND(name, symbol, since, arguments)                                                 \
    found = kv_cu_find(lookup, symbol, since);                                                     \
    memcpy(&cuda->name, &found, sizeof found);                                                     \
    if (found == NULL) {                                                                           \
        snprintf(problem, room, "%s has no %s", library, symbol);                                  \
        goto failed;                                                                               \
    }
    KV_CU_FUNCTIONS(KV_CU_FIND)
#undef KV_CU_FIND
    if (cuda->init(0) != KV_CU_SUCCESS || cuda->driver_version(&cuda->version) != KV_CU_SUCCESS) {
        snprintf(problem, room, "%s finds no usable device (cuInit failed)", library);
        goto failed;
    }
    found = cuda->version >= 12080 ? kv_cu_find(lookup, "cuMemcpyBatchAsync", 12080) : NULL;
    memcpy(&cuda->copy_batch, &found, sizeof found);
    return 0;
failed:
    dlclose(cuda->library);
    cuda->library = NULL;
    return -1;
}

#endif
