/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A CUDA driver whose device is the host's memory and whose streams only move when somebody asks
 * for an event. It obeys what the backend relies on, and refuses what the real one refuses:
 *
 *   - work on a stream runs in order, and no earlier than the waits in it allow;
 *   - a batch whose source order is ANY reads its source when it is submitted;
 *   - host memory of a copy lies in one registered piece, device memory in one allocation;
 *   - the package's one kernel does what cuda_staging.h says.
 *
 * The engine's stream is the null stream. A test holds it (a long kernel), puts kernels on it,
 * makes waits have no effect, and makes a function fail.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cuda_staging.h"

enum { OK = 0, INVALID_VALUE = 1, NOT_READY = 600, NOT_SUPPORTED = 801 };
enum { COPY, RECORD, WAIT, FILL, MOVE };
enum { COMMANDS = 1 << 16, STREAMS = 24, SPANS = 256 };

typedef struct { uint64_t recorded, reached; } event;
typedef struct {
    int kind;
    uint8_t *to, *source, *owned;
    size_t bytes;
    event *about;
    uint64_t number;
} command;
typedef struct { command *commands; size_t head, tail; } stream;
typedef struct { uint8_t *at; size_t bytes; } span;
typedef struct {
    size_t source_x, source_y;
    int source_kind;
    uint8_t *source_host, *source_device, *source_array;
    size_t source_pitch, to_x, to_y;
    int to_kind;
    uint8_t *to_host, *to_device, *to_array;
    size_t to_pitch, width, height;
} copy_2d;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static stream streams[STREAMS]; /* 0 is the null stream */
static int stream_count = 1, held, held_kernel, waits_ignored, batches = 1;
static span registered[SPANS], allocations[SPANS];
static int registered_count, allocation_count, events_alive, contexts_alive, streams_alive;
static int memories_alive, modules_alive, kernels_launched;
static char failing[64];
static int fail_after, fail_times, fail_error;

static int fails(const char *symbol) {
    if (fail_times == 0 || strcmp(symbol, failing) != 0 || fail_after-- > 0) return OK;
    fail_after = 0;
    fail_times--;
    return fail_error;
}
#define ENTER(symbol)                                                                              \
    pthread_mutex_lock(&lock);                                                                     \
    int error = fails(symbol)
#define LEAVE                                                                                      \
    pthread_mutex_unlock(&lock);                                                                   \
    return error

static int64_t piece_ns, kernel_ns, pitched_ns; /* what a call takes */
static void take(int64_t ns) {
    struct timespec begin, now;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    do clock_gettime(CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - begin.tv_sec) * 1000000000LL + now.tv_nsec - begin.tv_nsec < ns);
}
static int inside(const span *spans, int count, const uint8_t *at, size_t bytes) {
    for (int i = 0; i < count; i++)
        if (at >= spans[i].at && at + bytes <= spans[i].at + spans[i].bytes) return 1;
    return 0;
}
static command *push(stream *s, int kind) {
    if (s->commands == NULL) s->commands = calloc(COMMANDS, sizeof(command));
    if (s->tail - s->head >= COMMANDS) abort();
    command *c = &s->commands[s->tail++ % COMMANDS];
    memset(c, 0, sizeof *c);
    c->kind = kind;
    return c;
}
static void move_chunks(const kv_move *move) {
    size_t bytes = 16 * (size_t)move->vectors;
    for (uint32_t region = 0; region < move->regions; region++)
        for (uint32_t row = 0; row < move->rows; row++) {
            const kv_move_row *r = &move->row[row];
            uint8_t *block = (uint8_t *)(move->base[region] + r->block * move->stride);
            uint8_t *staged = (uint8_t *)move->staging + (r->first + region * r->pitch) * bytes;
            if (!inside(allocations, allocation_count, block, bytes) ||
                !inside(allocations, allocation_count, staged, bytes))
                abort(); /* the real one would lose its context */
            memcpy(move->to_staging ? staged : block, move->to_staging ? block : staged, bytes);
        }
}
static int step(stream *s) {
    if (s->head == s->tail || (s == streams && held)) return 0;
    command *c = &s->commands[s->head % COMMANDS];
    if (c->kind == WAIT && !waits_ignored && c->about->reached < c->number) return 0;
    if (c->kind == MOVE && (int)c->number == held_kernel) return 0;
    if (c->kind == COPY) memcpy(c->to, c->owned != NULL ? c->owned : c->source, c->bytes);
    if (c->kind == FILL) memset(c->to, (int)c->number, c->bytes);
    if (c->kind == MOVE) move_chunks((const kv_move *)c->owned);
    if (c->kind == RECORD && c->about->reached < c->number) c->about->reached = c->number;
    free(c->owned);
    s->head++;
    return 1;
}
static void advance(void) {
    for (int moved = 1; moved;) {
        moved = 0;
        for (int i = 0; i < stream_count; i++)
            while (step(&streams[i])) moved = 1;
    }
}
static int put_copy(stream *s, uint8_t *to, uint8_t *source, size_t bytes, int read_now) {
    int device_to = inside(allocations, allocation_count, to, bytes);
    const uint8_t *host = device_to ? source : to, *device = device_to ? to : source;
    if (!inside(allocations, allocation_count, device, bytes) ||
        !inside(registered, registered_count, host, bytes))
        return INVALID_VALUE;
    command *c = push(s, COPY);
    c->to = to;
    c->source = source;
    c->bytes = bytes;
    if (read_now) {
        c->owned = malloc(bytes);
        memcpy(c->owned, source, bytes);
    }
    return OK;
}
static stream *of(stream *s) { return s == NULL ? streams : s; }

/* ---- the driver ------------------------------------------------------------------------------ */
static int init(unsigned int flags) { return flags == 0 ? OK : INVALID_VALUE; }
static int driver_version(int *version) { *version = batches ? 12080 : 12060; return OK; }
static int error_name(int error, const char **name) {
    *name = error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_SIMULATED";
    return OK;
}
static int device_get(int *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? OK : 101;
}
static int device_name(char *name, int length, int device) {
    (void)device;
    snprintf(name, (size_t)length, "simulated device");
    return OK;
}
static int device_uuid(unsigned char uuid[16], int device) {
    ENTER("cuDeviceGetUuid");
    memset(uuid, 0xA0 + device, 16);
    LEAVE;
}
static int device_bus_id(char *id, int length, int device) {
    ENTER("cuDeviceGetPCIBusId");
    (void)device;
    snprintf(id, (size_t)length, "0000:3B:00.0");
    LEAVE;
}
static int context_retain(void **context, int device) {
    ENTER("cuDevicePrimaryCtxRetain");
    (void)device;
    *context = &contexts_alive;
    contexts_alive += error == OK;
    LEAVE;
}
static int context_release(int device) { (void)device; contexts_alive--; return OK; }
static int context_set(void *context) { return context == &contexts_alive ? OK : INVALID_VALUE; }
static int priority_range(int *least, int *greatest) { *least = 0; *greatest = -5; return OK; }
static int stream_create(stream **s, unsigned int flags, int priority) {
    ENTER("cuStreamCreateWithPriority");
    int free_one = 0;
    for (int i = 1; i < STREAMS && !free_one; i++)
        if (streams[i].commands == NULL) free_one = i;
    if (flags != 1 || priority != 0 || !free_one) error = INVALID_VALUE;
    if (error == OK) {
        *s = &streams[free_one];
        (*s)->commands = calloc(COMMANDS, sizeof(command));
        if (free_one >= stream_count) stream_count = free_one + 1;
        streams_alive++;
    }
    LEAVE;
}
static int stream_destroy(stream *s) {
    ENTER("cuStreamDestroy");
    free(s->commands);
    memset(s, 0, sizeof *s);
    streams_alive--;
    LEAVE;
}
static int stream_wait(stream *s, event *e, unsigned int flags) {
    ENTER("cuStreamWaitEvent");
    (void)flags;
    if (error == OK) {
        command *c = push(of(s), WAIT);
        c->about = e;
        c->number = e->recorded;
    }
    LEAVE;
}
static int stream_synchronize(stream *s) {
    ENTER("cuStreamSynchronize");
    advance();
    if (of(s)->head != of(s)->tail) error = NOT_READY; /* the real one would hang here */
    LEAVE;
}
static int event_create(event **e, unsigned int flags) {
    ENTER("cuEventCreate");
    if (flags != 2) error = INVALID_VALUE;
    if (error == OK) {
        *e = calloc(1, sizeof(event));
        events_alive++;
    }
    LEAVE;
}
static int event_destroy(event *e) { free(e); events_alive--; return OK; }
static int event_record(event *e, stream *s) {
    ENTER("cuEventRecord");
    if (error == OK) {
        command *c = push(of(s), RECORD);
        c->about = e;
        c->number = ++e->recorded;
    }
    LEAVE;
}
static int event_query(event *e) {
    ENTER("cuEventQuery");
    advance();
    if (error == OK && e->reached < e->recorded) error = NOT_READY;
    LEAVE;
}
static int host_register(uint8_t *at, size_t bytes, unsigned int flags) {
    ENTER("cuMemHostRegister");
    (void)flags;
    if (error == OK && registered_count == SPANS) error = INVALID_VALUE;
    if (error == OK) registered[registered_count++] = (span){at, bytes};
    LEAVE;
}
static int host_unregister(uint8_t *at) {
    ENTER("cuMemHostUnregister");
    int found = 0;
    for (int i = 0; i < registered_count; i++)
        if (registered[i].at == at) {
            registered[i] = registered[--registered_count];
            found = 1;
            break;
        }
    if (!found) error = INVALID_VALUE;
    LEAVE;
}
static int pointer_attribute(void *value, int attribute, uint8_t *pointer) {
    for (int i = 0; i < allocation_count; i++)
        if (inside(&allocations[i], 1, pointer, 1)) {
            uint64_t answer = attribute == 11 ? (uint64_t)allocations[i].at : allocations[i].bytes;
            memcpy(value, &answer, sizeof answer);
            return OK;
        }
    return INVALID_VALUE;
}
static int copy_one(uint8_t *to, uint8_t *source, size_t bytes, stream *s) {
    ENTER("cuMemcpyAsync");
    if (error == OK) error = put_copy(of(s), to, source, bytes, 0);
    LEAVE;
}
static int copy_pitched(const copy_2d *c, stream *s) {
    ENTER("cuMemcpy2DAsync");
    take(pitched_ns);
    uint8_t *to = c->to_kind == 1 ? c->to_host : c->to_device;
    uint8_t *source = c->source_kind == 1 ? c->source_host : c->source_device;
    uint8_t *device = c->to_kind == 1 ? source : to;
    size_t pitch = c->to_kind == 1 ? c->source_pitch : c->to_pitch;
    size_t extent = (c->height - 1) * pitch + c->width;
    if (c->width > c->source_pitch || c->width > c->to_pitch ||
        !inside(allocations, allocation_count, device, extent))
        error = INVALID_VALUE;
    for (size_t y = 0; error == OK && y < c->height; y++)
        error = put_copy(of(s), to + y * c->to_pitch, source + y * c->source_pitch, c->width, 0);
    LEAVE;
}
static int copy_batch(uint8_t **to, uint8_t **source, size_t *bytes, size_t count,
                      const int *attribute, size_t *indices, size_t attributes, size_t *failed,
                      stream *s) {
    ENTER("cuMemcpyBatchAsync");
    take(piece_ns * (int64_t)count);
    if (s == NULL || attributes != 1 || indices[0] != 0 || (*attribute != 1 && *attribute != 3))
        error = INVALID_VALUE;
    for (size_t i = 0; error == OK && i < count; i++) {
        error = put_copy(s, to[i], source[i], bytes[i], *attribute == 3);
        *failed = i;
    }
    LEAVE;
}

static int memory_allocate(uint8_t **memory, size_t bytes) {
    ENTER("cuMemAlloc");
    if (error == OK) {
        *memory = malloc(bytes);
        allocations[allocation_count++] = (span){*memory, bytes};
        memories_alive++;
    }
    LEAVE;
}
static int memory_free(uint8_t *memory) {
    ENTER("cuMemFree");
    for (int i = 0; i < allocation_count; i++)
        if (allocations[i].at == memory) {
            allocations[i] = allocations[--allocation_count];
            memories_alive--;
            break;
        }
    free(memory);
    LEAVE;
}
static int module_load(const void **module, const char *image) {
    ENTER("cuModuleLoadData");
    if (strcmp(image, KV_MOVE_PTX) != 0) error = INVALID_VALUE;
    modules_alive += error == OK;
    if (error == OK) *module = image;
    LEAVE;
}
static int module_unload(const void *module) {
    ENTER("cuModuleUnload");
    (void)module;
    modules_alive--;
    LEAVE;
}
static int module_function(const void **function, const void *module, const char *name) {
    ENTER("cuModuleGetFunction");
    if (strcmp(name, KV_MOVE_NAME) != 0) error = INVALID_VALUE;
    if (error == OK) *function = module;
    LEAVE;
}
static int launch(const void *function, unsigned int grid_x, unsigned int grid_y,
                  unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                  unsigned int block_z, unsigned int shared_bytes, stream *s, void **parameters,
                  void **extra) {
    ENTER("cuLaunchKernel");
    take(kernel_ns);
    const kv_move *move = parameters[0];
    if (function == NULL || extra != NULL || shared_bytes != 0 || grid_x == 0 ||
        block_x == 0 || block_x > KV_MOVE_THREADS || block_x % 32 != 0 ||
        grid_y * grid_z * block_y * block_z != 1 ||
        move->rows > KV_MOVE_ROWS_MAX || move->regions > KV_MOVE_REGIONS_MAX)
        error = INVALID_VALUE;
    if (error == OK) {
        command *c = push(of(s), MOVE);
        c->number = ++kernels_launched;
        c->owned = malloc(sizeof *move);
        memcpy(c->owned, move, sizeof *move);
    }
    LEAVE;
}

int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags,
                        int *status) {
    const struct { const char *symbol; void *function; } table[] = {
        {"cuInit", init}, {"cuDriverGetVersion", driver_version}, {"cuGetErrorName", error_name},
        {"cuDeviceGet", device_get}, {"cuDeviceGetName", device_name},
        {"cuDeviceGetUuid", device_uuid}, {"cuDeviceGetPCIBusId", device_bus_id},
        {"cuDevicePrimaryCtxRetain", context_retain},
        {"cuDevicePrimaryCtxRelease", context_release}, {"cuCtxSetCurrent", context_set},
        {"cuCtxGetStreamPriorityRange", priority_range},
        {"cuStreamCreateWithPriority", stream_create}, {"cuStreamDestroy", stream_destroy},
        {"cuStreamWaitEvent", stream_wait}, {"cuStreamSynchronize", stream_synchronize},
        {"cuEventCreate", event_create}, {"cuEventDestroy", event_destroy},
        {"cuEventRecord", event_record}, {"cuEventQuery", event_query},
        {"cuMemHostRegister", host_register}, {"cuMemHostUnregister", host_unregister},
        {"cuPointerGetAttribute", pointer_attribute}, {"cuMemcpyHtoDAsync", copy_one},
        {"cuMemcpyDtoHAsync", copy_one}, {"cuMemcpy2DAsync", copy_pitched},
        {"cuMemcpyBatchAsync", copy_batch}, {"cuMemAlloc", memory_allocate},
        {"cuMemFree", memory_free}, {"cuModuleLoadData", module_load},
        {"cuModuleUnload", module_unload}, {"cuModuleGetFunction", module_function},
        {"cuLaunchKernel", launch},
    };
    (void)version;
    (void)flags;
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strcmp(table[i].symbol, symbol) == 0) {
            *function = table[i].function;
            *status = 0;
            return OK;
        }
    *status = 1;
    return INVALID_VALUE;
}

/* ---- the test's side ------------------------------------------------------------------------- */
void fake_reset(int with_batches) {
    batches = with_batches;
    allocation_count = held = held_kernel = waits_ignored = fail_times = kernels_launched = 0;
    piece_ns = kernel_ns = pitched_ns = 0;
}
void fake_hold(int on) { pthread_mutex_lock(&lock); held = on; pthread_mutex_unlock(&lock); }
void fake_hold_kernel(int number) {
    pthread_mutex_lock(&lock);
    held_kernel = number;
    pthread_mutex_unlock(&lock);
}
void fake_ignore_waits(int on) { waits_ignored = on; }
void fake_allocation(uint8_t *at, size_t bytes) {
    allocations[allocation_count++] = (span){at, bytes};
}
void fake_fail(const char *symbol, int after, int times, int error) {
    pthread_mutex_lock(&lock);
    snprintf(failing, sizeof failing, "%s", symbol);
    fail_after = after;
    fail_times = times;
    fail_error = error;
    pthread_mutex_unlock(&lock);
}
void fake_kernel(uint8_t *to, int value, size_t bytes) {
    pthread_mutex_lock(&lock);
    command *c = push(streams, FILL);
    c->to = to;
    c->number = (uint64_t)value;
    c->bytes = bytes;
    pthread_mutex_unlock(&lock);
}
void fake_costs(int64_t piece, int64_t kernel, int64_t pitched) {
    piece_ns = piece;
    kernel_ns = kernel;
    pitched_ns = pitched;
}
void fake_run(void) { pthread_mutex_lock(&lock); advance(); pthread_mutex_unlock(&lock); }
int fake_alive(void) {
    return registered_count + events_alive + contexts_alive + streams_alive + memories_alive +
           modules_alive;
}
