/* One piece of work for the loader: a load, a model's memory to be given back, or a call that may
 * wait for a disk.
 *
 * A load goes step by step (begin, slices, end), so that the loader's threads may share it, hand it
 * over and give it up; a program without a loader runs it in one go by load_sync().
 *
 * Hides opening and checking files, and which errors are tried again.
 * Threads: what a field says; the steps are a loader's thread's, or load_sync()'s caller's. */
#ifndef HEARTH_MODEL_LOAD_TASK_H
#define HEARTH_MODEL_LOAD_TASK_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "daemon/engine/engine.h"
#include "daemon/metrics/metrics.h"
#include "lib/clock.h"

enum load_priority {
    LOAD_INTERACTIVE, /* a request waits */
    LOAD_WARM,        /* somebody asked for it */
    LOAD_PRELOAD,     /* the configuration asked for it */
    LOAD_PREDICTED,
    _LOAD_PRIORITY_MAX,
};

/* Nobody waits for these: they run where they disturb nobody. */
static inline bool load_is_idle(enum load_priority priority)
{
    return priority >= LOAD_PRELOAD;
}

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

/* For whom several users, or none, ask. */
#define LOAD_FOR_MANY UINT32_MAX

/* Allocated by the caller, the loader's from submit until `done`. */
struct load_task {
    enum task_kind kind;
    enum load_priority priority;
    void *subject; /* the caller's */

    /* TASK_LOAD: a file by its path, an open file (which the task owns), or memory. */
    char *path;
    int fd; /* -1: none */
    const uint8_t *memory;
    uint64_t memory_bytes;
    uint64_t max_bytes; /* of weights in memory; 0: no bound */
    uint32_t context_tokens;
    int32_t rank;                   /* the higher goes first within a priority */
    uint32_t uid;                   /* the only user who waits for it; LOAD_FOR_MANY */
    bool own;                       /* on a thread of its own, which closes `fd`, too: the file may hang */
    struct model_progress progress; /* any thread */
    _Atomic bool started;           /* any thread: the loader has begun it */
    _Atomic uint32_t n_hands;       /* any thread: threads that work at it now */

    /* TASK_LOAD, once it was given up: the caller's. */
    struct load_task *next_stuck;
    uint64_t kept_bytes; /* of memory until it returns */

    /* TASK_FREE: in, NULL where `legacy` alone is given back; TASK_LOAD: out. */
    struct model *model;
    uint64_t keep_bytes; /* TASK_FREE: the most of the model's memory that stays, in `legacy` */
    /* Memory for a successor; owned. TASK_LOAD: in, until the loader takes it for the weights or
     * somebody takes it back by load_task_take_legacy(). TASK_FREE: in without a model, else out.
     */
    struct arena_legacy *_Atomic legacy;
    uint64_t inherited_us; /* TASK_LOAD: when it got that; 0: it has not, or it was taken back */

    /* TASK_CALL. */
    void (*call)(struct load_task *task);
    void *result; /* what it left, the caller's to free before load_task_free() */

    /* Results, set before `done`. */
    int error; /* 0, or a negative errno with a sentence */
    struct fault fault;
    struct file_identity identity;
    uint64_t load_us;

    /* The loader's. */
    struct load_task *next;
    enum load_stage { LOAD_WAITS, LOAD_BEGINS, LOAD_PIECES, LOAD_OVER } stage;
    bool listed;                /* among the waiting */
    bool idle;                  /* begun by a thread of idle priority, and not handed over yet */
    _Atomic bool step_back;     /* asks the idle thread to leave it */
    _Atomic uint32_t n_retries; /* so far */
    uint64_t began_us;
    int file_fd;
    struct model_load *load;
};

struct loader_options {
    const struct kernel_table *kernels;
    uint32_t max_concurrent; /* loads at once */
    uint32_t per_uid;        /* of them those that one user alone waits for; 0: no bound */
    uint32_t retries;        /* of I/O errors, a load */
    struct metrics *metrics;
    const struct clock *clock;
    const struct engine_pulse *pulse; /* whom loads step back for; NULL: nobody */
    /* A task has begun or is done; on a loader thread. */
    void (*begun)(void *userdata, struct load_task *task);
    void (*done)(void *userdata, struct load_task *task);
    void *userdata;
};

struct load_task *load_task_new(enum task_kind kind, void *subject);
/* Frees a model and a legacy that are still in it, too. Returns NULL. */
struct load_task *load_task_free(struct load_task *task);

/* The legacy, the caller's now; NULL: there is none, or it was taken before. Any thread. */
struct arena_legacy *load_task_take_legacy(struct load_task *task);

/* Does what a TASK_FREE is for. */
void load_task_release(struct load_task *task);

/* Runs a load in the calling thread: for `loading.async: no` and for programs without a loader.
 * Neither `begun` nor `done` is called. */
void load_sync(const struct loader_options *options, struct load_task *task);

/* The steps. Opens the file and reads its header, trying again after I/O errors: 0, or -errno with
 * the sentence in task->fault. */
int load_task_begin(const struct loader_options *options, struct load_task *task);
/* One piece, tried again after I/O errors: 1; 0: none is left; -errno with a sentence. */
int load_task_slice(const struct loader_options *options, struct load_task *task,
                    struct load_hand *hand, struct fault *ret_fault);
/* The load is over, with `error` or with all its pieces: fills the results, counts. */
void load_task_conclude(const struct loader_options *options, struct load_task *task, int error);

/* The file's identity now; -errno. */
int file_identity_get(const char *path, struct file_identity *ret_identity);
bool file_identity_equal(const struct file_identity *a, const struct file_identity *b);

#endif
