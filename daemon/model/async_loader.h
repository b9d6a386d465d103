/* The async loader: models are read and packed on threads of its own.
 *
 * A load is asked for with a priority and runs when a thread is free, the most urgent first; its
 * progress can be watched and it can be cancelled from any thread. I/O errors are tried again with
 * growing pauses; a malformed file is not. The same threads give models' memory back and look
 * through directories, so that the reactor never waits for a disk.
 *
 * Hides the threads, the queue, opening and checking files, retries.
 * Threads: loader_* functions are the reactor's. `done` runs on a loader thread: it passes the task
 * on and does nothing else. */
#ifndef HEARTH_MODEL_ASYNC_LOADER_H
#define HEARTH_MODEL_ASYNC_LOADER_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "daemon/clock.h"
#include "daemon/engine/engine.h"
#include "daemon/metrics/metrics.h"

enum load_priority {
    LOAD_INTERACTIVE, /* a request waits */
    LOAD_WARM,        /* somebody asked for it */
    LOAD_PRELOAD,     /* the configuration asked for it */
    LOAD_PREDICTED,
    _LOAD_PRIORITY_MAX,
};

enum task_kind {
    TASK_LOAD,
    TASK_FREE, /* a model's memory */
    TASK_CALL, /* a function that may wait for a disk */
};

/* What a file was when it was read: a change makes a failed load worth trying again. */
struct file_identity {
    uint64_t size;
    struct timespec mtime;
};

/* One piece of work; allocated by the caller, the loader's from submit until `done`. */
struct load_task {
    enum task_kind kind;
    enum load_priority priority;
    void *subject; /* the caller's */

    /* TASK_LOAD: a file, or memory where `path` is NULL. */
    char *path;
    const uint8_t *memory;
    uint64_t memory_bytes;
    uint32_t context_tokens;
    struct model_progress progress; /* any thread */
    _Atomic bool started;           /* any thread: the loader has begun it */

    /* TASK_FREE: in; TASK_LOAD: out. */
    struct model *model;

    /* TASK_CALL. */
    void (*call)(struct load_task *task);
    void *result; /* what it left, the caller's to free before load_task_free() */

    /* Results, set before `done`. */
    int error; /* 0, or a negative errno with a sentence */
    struct fault fault;
    struct file_identity identity;
    uint64_t load_us;

    struct load_task *next; /* the loader's */
};

struct loader;

struct loader_options {
    const struct kernel_table *kernels;
    uint32_t max_concurrent; /* loads at once: that many threads */
    uint32_t retries;        /* of I/O errors */
    struct metrics *metrics;
    const struct clock *clock;
    /* A task has begun or is done; on a loader thread. */
    void (*begun)(void *userdata, struct load_task *task);
    void (*done)(void *userdata, struct load_task *task);
    void *userdata;
};

int loader_new(const struct loader_options *options, struct loader **ret_loader,
               struct fault *ret_fault);
/* Cancels what waits and runs, and waits for the threads, but not for ever. Tasks get their `done`.
 * Returns NULL, or the loader where a thread is still stuck in a read: it lives on, and so must what
 * its `done` uses. */
struct loader *loader_free(struct loader *loader);
void loader_submit(struct loader *loader, struct load_task *task);
/* Makes a waiting task more urgent. */
void loader_promote(struct loader *loader, struct load_task *task, enum load_priority priority);
/* Asks a load to end with -ECANCELED. */
void loader_cancel(struct loader *loader, struct load_task *task);
/* Runs a load in the calling thread: for `loading.async: no` and for programs without a loader. */
void load_run(const struct loader_options *options, struct load_task *task);

struct load_task *load_task_new(enum task_kind kind, void *subject);
/* Frees a model that is still in it, too. Returns NULL. */
struct load_task *load_task_free(struct load_task *task);
/* The file's identity now; -errno. */
int file_identity_get(const char *path, struct file_identity *ret_identity);
bool file_identity_equal(const struct file_identity *a, const struct file_identity *b);

#endif
