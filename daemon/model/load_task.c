#include "daemon/model/load_task.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/cleanup.h"

/* Pause before an I/O error is tried again, doubled each time up to the longest. */
#define RETRY_FIRST_US   100000u
#define RETRY_LONGEST_US 6400000u
/* How often a pause looks whether the load was cancelled. */
#define RETRY_LOOK_US 10000u

/* ---- files ---- */

static struct file_identity identity_of(const struct stat *st)
{
    return (struct file_identity){.size = (uint64_t)st->st_size, .mtime = st->st_mtim};
}

int file_identity_get(const char *path, struct file_identity *ret_identity)
{
    struct stat st;

    if (stat(path, &st) < 0)
        return -errno;
    *ret_identity = identity_of(&st);
    return 0;
}

bool file_identity_equal(const struct file_identity *a, const struct file_identity *b)
{
    return a->size == b->size && a->mtime.tv_sec == b->mtime.tv_sec &&
           a->mtime.tv_nsec == b->mtime.tv_nsec;
}

static const char *shown_name(const struct load_task *task)
{
    return task->path ? task->path : "the file";
}

/* Opens a model's file; O_NONBLOCK, so that a FIFO put in its place hangs nobody. */
static int open_model(struct load_task *task, int *ret_fd)
{
    _cleanup_close_ int fd = -1;
    struct stat st;

    fd = task->path ? open(task->path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK)
                    : fcntl(task->fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return fault_set(&task->fault, -errno, "cannot open %s: %s", shown_name(task),
                         strerror(errno));
    if (fstat(fd, &st) < 0)
        return fault_set(&task->fault, -errno, "cannot look at %s: %s", shown_name(task),
                         strerror(errno));
    task->identity = identity_of(&st);
    if (!S_ISREG(st.st_mode))
        return fault_set(&task->fault, -EBADMSG, "%s is not a regular file", shown_name(task));
    *ret_fd = TAKE_FD(fd);
    return 0;
}

/* ---- steps ---- */

static bool is_cancelled(const struct load_task *task)
{
    return atomic_load(&task->progress.cancel);
}

/* Whether an error is worth another try, after a pause. */
static bool try_again(const struct loader_options *options, struct load_task *task, int error)
{
    uint32_t n;
    uint64_t us;

    if (error != -EIO)
        return false;
    n = atomic_fetch_add(&task->n_retries, 1);
    if (n >= options->retries)
        return false;
    us = MIN((uint64_t)RETRY_FIRST_US << MIN(n, 31u), (uint64_t)RETRY_LONGEST_US);
    for (uint64_t slept = 0; slept < us && !is_cancelled(task); slept += RETRY_LOOK_US)
        usleep(RETRY_LOOK_US);
    if (is_cancelled(task))
        return false;
    metrics_add(options->metrics, M_LOAD_RETRIES, 1);
    return true;
}

static int begin_once(const struct loader_options *options, struct load_task *task)
{
    /* A user's own file is read through the page cache: it may be on any file system. */
    struct model_load_options load = {.kernels = options->kernels,
                                      .context_tokens = task->context_tokens,
                                      .max_bytes = task->max_bytes,
                                      .direct = task->path != NULL,
                                      .legacy = &task->legacy,
                                      .pulse = options->pulse};
    struct gguf_source source = {.fd = -1, .memory = task->memory, .size = task->memory_bytes};
    _cleanup_close_ int fd = -1;
    int r;

    if (!task->memory) {
        r = open_model(task, &fd);
        if (r < 0)
            return r;
        source = (struct gguf_source){.fd = fd, .size = task->identity.size};
    }
    r = model_load_begin(&source, &load, &task->progress, &task->load, &task->fault);
    if (r == 0)
        task->file_fd = TAKE_FD(fd);
    return r;
}

int load_task_begin(const struct loader_options *options, struct load_task *task)
{
    int r;

    metrics_add(options->metrics, M_LOADS, 1);
    task->began_us = clock_now_us(options->clock);
    do
        r = is_cancelled(task) ? -ECANCELED : begin_once(options, task);
    while (r < 0 && try_again(options, task, r));
    return r;
}

int load_task_slice(const struct loader_options *options, struct load_task *task,
                    struct load_hand *hand, struct fault *ret_fault)
{
    int r;

    do
        r = model_load_slice(task->load, hand, ret_fault);
    while (r < 0 && try_again(options, task, r));
    if (r < 0)
        hand->load = NULL; /* the piece is given up with the load */
    return r;
}

static void count_ending(const struct loader_options *options, const struct load_task *task)
{
    struct metrics *metrics = options->metrics;

    if (task->error == 0) {
        metrics_add(metrics, M_LOADS_DONE, 1);
        metrics_add(metrics, M_LOAD_BYTES, atomic_load(&task->progress.done_bytes));
        metrics_add(metrics, M_LOAD_DIRECT_BYTES, atomic_load(&task->progress.direct_bytes));
        metrics_add(metrics, M_LOAD_RECYCLED_BYTES, atomic_load(&task->progress.recycled_bytes));
        metrics_observe_us(metrics, M_LOAD_TIME, task->load_us);
    } else if (task->error == -ECANCELED) {
        metrics_add(metrics, M_LOADS_CANCELLED, 1);
    } else {
        metrics_add(metrics, M_LOADS_FAILED, 1);
    }
}

void load_task_conclude(const struct loader_options *options, struct load_task *task, int error)
{
    if (error == 0)
        error = model_load_end(task->load, &task->model, &task->fault);
    task->load = model_load_free(task->load);
    if (task->file_fd >= 0)
        close(task->file_fd);
    task->file_fd = -1;
    if (task->own && task->fd >= 0)
        close(TAKE_FD(task->fd));
    task->error = error;
    task->load_us = task->began_us ? clock_now_us(options->clock) - task->began_us : 0;
    if (error == -ECANCELED)
        fault_set(&task->fault, -ECANCELED, "the load was cancelled");
    count_ending(options, task);
}

void load_sync(const struct loader_options *options, struct load_task *task)
{
    _cleanup_(load_hand_done) struct load_hand hand = {0};
    int r;

    atomic_store(&task->started, true);
    r = load_task_begin(options, task);
    if (r == 0)
        do
            r = load_task_slice(options, task, &hand, &task->fault);
        while (r > 0);
    load_task_conclude(options, task, r);
}

/* ---- memory that goes ---- */

struct arena_legacy *load_task_take_legacy(struct load_task *task)
{
    return atomic_exchange(&task->legacy, NULL);
}

void load_task_release(struct load_task *task)
{
    arena_legacy_free(load_task_take_legacy(task));
    atomic_store(&task->legacy, model_free_leaving(TAKE_PTR(task->model), task->keep_bytes));
}

/* ---- tasks ---- */

struct load_task *load_task_new(enum task_kind kind, void *subject)
{
    struct load_task *task = calloc(1, sizeof(*task));

    if (task) {
        task->kind = kind;
        task->subject = subject;
        task->fd = task->file_fd = -1;
        task->uid = LOAD_FOR_MANY;
    }
    return task;
}

struct load_task *load_task_free(struct load_task *task)
{
    if (!task)
        return NULL;
    model_load_free(task->load);
    if (task->file_fd >= 0)
        close(task->file_fd);
    if (task->fd >= 0)
        close(task->fd);
    model_free(task->model);
    arena_legacy_free(load_task_take_legacy(task));
    free(task->path);
    free(task);
    return NULL;
}
