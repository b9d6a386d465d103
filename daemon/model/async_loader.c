#include "daemon/model/async_loader.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/cleanup.h"

/* Pause before an I/O error is tried again, doubled each time. */
#define RETRY_FIRST_US 100000u

/* A read that hangs (a dead network disk) does not hang the end of the daemon longer than this. */
#define LOADER_STOP_S 2

/* Most loader threads: `loading.max_concurrent` is bounded by the configuration well below. */
#define LOADER_MAX_THREADS 64u

struct loader {
    struct loader_options options;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t wake;
    struct load_task *waiting[_LOAD_PRIORITY_MAX];
    struct load_task *running[LOADER_MAX_THREADS]; /* by thread */
    uint32_t n_waiting_loads, n_running_loads;
    bool stopping;
    uint32_t n_threads;
    pthread_t threads[LOADER_MAX_THREADS];
};

struct loader_thread {
    struct loader *loader;
    uint32_t index;
};

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

/* Opens a model's file; O_NONBLOCK, so that a FIFO put in its place hangs nobody. */
static int open_model(struct load_task *task, int *ret_fd)
{
    _cleanup_close_ int fd = open(task->path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    struct stat st;

    if (fd < 0)
        return fault_set(&task->fault, -errno, "cannot open %s: %s", task->path, strerror(errno));
    if (fstat(fd, &st) < 0)
        return fault_set(&task->fault, -errno, "cannot look at %s: %s", task->path,
                         strerror(errno));
    task->identity = identity_of(&st);
    if (!S_ISREG(st.st_mode))
        return fault_set(&task->fault, -EBADMSG, "%s is not a regular file", task->path);
    *ret_fd = TAKE_FD(fd);
    return 0;
}

/* ---- one load ---- */

static int load_once(const struct loader_options *options, struct load_task *task)
{
    struct model_load_options load = {.kernels = options->kernels,
                                      .context_tokens = task->context_tokens};
    struct gguf_source source = {.fd = -1, .memory = task->memory, .size = task->memory_bytes};
    _cleanup_close_ int fd = -1;

    if (task->path) {
        int r = open_model(task, &fd);
        if (r < 0)
            return r;
        source = (struct gguf_source){.fd = fd, .size = task->identity.size};
    }
    atomic_store(&task->progress.done_bytes, 0);
    return model_load(&source, &load, &task->progress, &task->model, &task->fault);
}

/* Waits before another try; false when the load was cancelled meanwhile. */
static bool pause_before_retry(struct load_task *task, uint32_t attempt)
{
    uint64_t us = (uint64_t)RETRY_FIRST_US << MIN(attempt, 6u);

    for (uint64_t slept = 0; slept < us && !atomic_load(&task->progress.cancel); slept += 10000)
        usleep(10000);
    return !atomic_load(&task->progress.cancel);
}

void load_run(const struct loader_options *options, struct load_task *task)
{
    uint64_t began_us = clock_now_us(options->clock);

    metrics_add(options->metrics, M_LOADS, 1);
    for (uint32_t attempt = 0;; attempt++) {
        task->error = atomic_load(&task->progress.cancel) ? -ECANCELED : load_once(options, task);
        if (task->error != -EIO || attempt >= options->retries)
            break;
        if (!pause_before_retry(task, attempt))
            task->error = -ECANCELED;
    }
    task->load_us = clock_now_us(options->clock) - began_us;
    if (task->error == -ECANCELED)
        fault_set(&task->fault, -ECANCELED, "the load was cancelled");
    if (task->error == 0) {
        metrics_add(options->metrics, M_LOADS_DONE, 1);
        metrics_add(options->metrics, M_LOAD_BYTES, atomic_load(&task->progress.done_bytes));
        metrics_observe_us(options->metrics, M_LOAD_TIME, task->load_us);
    } else if (task->error != -ECANCELED) {
        metrics_add(options->metrics, M_LOADS_FAILED, 1);
    }
}

static void task_run(const struct loader_options *options, struct load_task *task)
{
    atomic_store(&task->started, true);
    if (options->begun)
        options->begun(options->userdata, task);
    switch (task->kind) {
    case TASK_LOAD: load_run(options, task); break;
    case TASK_FREE: task->model = model_free(task->model); break;
    case TASK_CALL: task->call(task); break;
    }
}

/* ---- threads ---- */

static void publish(const struct loader *loader)
{
    metrics_set(loader->options.metrics, M_LOADS_QUEUED, loader->n_waiting_loads);
    metrics_set(loader->options.metrics, M_LOADS_RUNNING, loader->n_running_loads);
}

static struct load_task *take_most_urgent(struct loader *loader)
{
    for (uint32_t i = 0; i < _LOAD_PRIORITY_MAX; i++) {
        struct load_task *task = loader->waiting[i];
        if (!task)
            continue;
        loader->waiting[i] = task->next;
        task->next = NULL;
        return task;
    }
    return NULL;
}

static void *loader_main(void *argument)
{
    struct loader_thread *self = argument;
    struct loader *loader = self->loader;
    uint32_t index = self->index;

    free(self);
    pthread_setname_np(pthread_self(), "hearth-loader");
    pthread_mutex_lock(&loader->lock);
    for (;;) {
        struct load_task *task = take_most_urgent(loader);
        bool load;
        if (!task) {
            if (loader->stopping)
                break;
            pthread_cond_wait(&loader->wake, &loader->lock);
            continue;
        }
        load = task->kind == TASK_LOAD;
        loader->n_waiting_loads -= load;
        loader->n_running_loads += load;
        loader->running[index] = task;
        publish(loader);
        pthread_mutex_unlock(&loader->lock);
        task_run(&loader->options, task);
        pthread_mutex_lock(&loader->lock);
        loader->running[index] = NULL;
        loader->n_running_loads -= load;
        publish(loader);
        pthread_mutex_unlock(&loader->lock);
        loader->options.done(loader->options.userdata, task);
        pthread_mutex_lock(&loader->lock);
    }
    pthread_mutex_unlock(&loader->lock);
    return NULL;
}

static int start_threads(struct loader *loader, uint32_t n, struct fault *ret_fault)
{
    sigset_t all, old;
    int r = 0;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (loader->n_threads < n && r == 0) {
        struct loader_thread *self = malloc(sizeof(*self));
        if (!self) {
            r = -ENOMEM;
            break;
        }
        *self = (struct loader_thread){.loader = loader, .index = loader->n_threads};
        r = -pthread_create(&loader->threads[loader->n_threads], NULL, loader_main, self);
        if (r == 0)
            loader->n_threads++;
        else
            free(self);
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return r == 0 ? 0 : fault_set(ret_fault, r, "cannot start a loader thread: %s", strerror(-r));
}

int loader_new(const struct loader_options *options, struct loader **ret_loader,
               struct fault *ret_fault)
{
    struct loader *loader = calloc(1, sizeof(*loader));
    int r;

    if (!loader)
        return fault_set(ret_fault, -ENOMEM, "no memory for the loader");
    loader->options = *options;
    pthread_mutex_init(&loader->lock, NULL);
    pthread_cond_init(&loader->wake, NULL);
    r = start_threads(loader, MIN(MAX(options->max_concurrent, 1u), LOADER_MAX_THREADS), ret_fault);
    if (r < 0) {
        loader_free(loader);
        return r;
    }
    *ret_loader = loader;
    return 0;
}

/* False when a thread is still stuck in a read: it keeps what it uses, and the process's end takes
 * it along. */
static bool join_threads(struct loader *loader)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += LOADER_STOP_S;
    for (uint32_t i = 0; i < loader->n_threads; i++)
        if (pthread_timedjoin_np(loader->threads[i], NULL, &until) != 0)
            return false;
    return true;
}

struct loader *loader_free(struct loader *loader)
{
    if (!loader)
        return NULL;
    pthread_mutex_lock(&loader->lock);
    loader->stopping = true;
    for (uint32_t i = 0; i < loader->n_threads; i++)
        if (loader->running[i])
            atomic_store(&loader->running[i]->progress.cancel, true);
    for (uint32_t i = 0; i < _LOAD_PRIORITY_MAX; i++)
        for (struct load_task *task = loader->waiting[i]; task; task = task->next)
            atomic_store(&task->progress.cancel, true);
    pthread_cond_broadcast(&loader->wake);
    pthread_mutex_unlock(&loader->lock);
    if (!join_threads(loader))
        return loader;
    pthread_cond_destroy(&loader->wake);
    pthread_mutex_destroy(&loader->lock);
    free(loader);
    return NULL;
}

static void enqueue(struct loader *loader, struct load_task *task)
{
    struct load_task **at = &loader->waiting[task->priority];

    while (*at)
        at = &(*at)->next;
    task->next = NULL;
    *at = task;
}

void loader_submit(struct loader *loader, struct load_task *task)
{
    pthread_mutex_lock(&loader->lock);
    enqueue(loader, task);
    loader->n_waiting_loads += task->kind == TASK_LOAD;
    publish(loader);
    pthread_cond_signal(&loader->wake);
    pthread_mutex_unlock(&loader->lock);
}

void loader_promote(struct loader *loader, struct load_task *task, enum load_priority priority)
{
    pthread_mutex_lock(&loader->lock);
    if (priority < task->priority) {
        struct load_task **at = &loader->waiting[task->priority];
        while (*at && *at != task)
            at = &(*at)->next;
        if (*at) {
            *at = task->next;
            task->priority = priority;
            enqueue(loader, task);
        }
    }
    pthread_mutex_unlock(&loader->lock);
}

void loader_cancel(struct loader *loader, struct load_task *task)
{
    (void)loader;
    atomic_store(&task->progress.cancel, true);
}

/* ---- tasks ---- */

struct load_task *load_task_new(enum task_kind kind, void *subject)
{
    struct load_task *task = calloc(1, sizeof(*task));

    if (task) {
        task->kind = kind;
        task->subject = subject;
    }
    return task;
}

struct load_task *load_task_free(struct load_task *task)
{
    if (!task)
        return NULL;
    model_free(task->model);
    free(task->path);
    free(task);
    return NULL;
}
