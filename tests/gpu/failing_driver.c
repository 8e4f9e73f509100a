/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The real CUDA driver, of which a few functions fail when a test asks for it: the error comes back
 * instead of the call being made, so that the context lives on.
 *
 * libcuda.so.1 is what the package opens; it can be given this library instead.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { ILLEGAL_ADDRESS = 700, NO_DRIVER = 999 };
enum { COPY, WAIT, QUERY, KINDS };

typedef int (*lookup_function)(const char *, void **, int, uint64_t, int *);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int left[KINDS];
static const char *const names[KINDS] = {"copy", "wait", "query"};

static int fails(int kind) {
    pthread_mutex_lock(&lock);
    int strikes = left[kind] > 0;
    left[kind] -= strikes;
    pthread_mutex_unlock(&lock);
    return strikes;
}

static int (*real_batch)(void *, void *, void *, size_t, void *, void *, size_t, void *, void *);
static int (*real_2d)(const void *, void *);
static int (*real_wait)(void *, void *, unsigned);
static int (*real_query)(void *);

static int batch(void *to, void *source, void *bytes, size_t count, void *attributes, void *indices,
                 size_t attribute_count, void *failed, void *stream) {
    if (fails(COPY)) return ILLEGAL_ADDRESS;
    return real_batch(to, source, bytes, count, attributes, indices, attribute_count, failed,
                      stream);
}
static int pitched(const void *copy, void *stream) {
    return fails(COPY) ? ILLEGAL_ADDRESS : real_2d(copy, stream);
}
static int wait_for(void *stream, void *event, unsigned flags) {
    return fails(WAIT) ? ILLEGAL_ADDRESS : real_wait(stream, event, flags);
}
static int query(void *event) { return fails(QUERY) ? ILLEGAL_ADDRESS : real_query(event); }

static const struct { const char *symbol; void *instead; void *real; } table[] = {
    {"cuMemcpyBatchAsync", (void *)batch, &real_batch},
    {"cuMemcpy2DAsync", (void *)pitched, &real_2d},
    {"cuStreamWaitEvent", (void *)wait_for, &real_wait},
    {"cuEventQuery", (void *)query, &real_query},
};

int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags,
                        int *status) {
    static lookup_function real;
    if (real == NULL) {
        void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        void *found = library == NULL ? NULL : dlsym(library, "cuGetProcAddress_v2");
        if (found == NULL) return NO_DRIVER;
        memcpy(&real, &found, sizeof real);
    }
    int error = real(symbol, function, version, flags, status);
    for (size_t i = 0; error == 0 && *status == 0 && i < sizeof table / sizeof table[0]; i++)
        if (strcmp(table[i].symbol, symbol) == 0) {
            memcpy(table[i].real, function, sizeof *function);
            *function = table[i].instead;
        }
    return error;
}

/* ---- the test's side ------------------------------------------------------------------------- */
int failing_arm(const char *kind, int times) {
    for (int i = 0; i < KINDS; i++)
        if (strcmp(names[i], kind) == 0) {
            pthread_mutex_lock(&lock);
            left[i] = times;
            pthread_mutex_unlock(&lock);
            return 0;
        }
    return -1;
}
int failing_left(void) {
    int sum = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < KINDS; i++) sum += left[i];
    pthread_mutex_unlock(&lock);
    return sum;
}
